"""Trainer side of vLLM's own nccl backend: engines on other GPUs."""
from __future__ import annotations

from typing import Any

import torch

from sophiavl_fast.rollout.server import pick_port
from sophiavl_fast.rollout.transfer.control import Control
from sophiavl_fast.rollout.transfer.source import Bucket, description
from sophiavl_fast.rollout.transfer.together import together


class NcclChannel:
    """A communicator of the trainer (rank 0, its device `gpu`) and one engine's workers; packed broadcasts, one call a bucket."""

    def __init__(self, control: Control, host: str, timeout_s: float, gpu: int) -> None:
        from vllm.distributed.weight_transfer import nccl_common

        self._control, self._timeout_s = control, timeout_s
        meeting: dict[str, Any] = {"master_address": host, "master_port": pick_port(0), "world_size": 1 + control.workers()}
        info = nccl_common.worker_init_payload(nccl_common.NCCLWeightTransferInitInfo(**meeting, rank_offset=1, packed=True))

        def join() -> Any:
            torch.cuda.set_device(gpu)   # the current device is a thread's own
            return nccl_common.trainer_init(meeting)

        self._communicator = together(join, lambda: control.init_transfer(info), control, phase="weight transfer (set-up)", timeout_s=timeout_s)
        # Not vLLM's own producer: its streams are one set a process, so that an engine that has died would hold up the others' broadcasts.
        self._device, self._stream = gpu, torch.cuda.Stream(gpu)

    def convert(self, bucket: Bucket) -> Bucket:
        torch.cuda.current_stream().synchronize()   # gathered on this thread's stream, read on the other's
        return bucket

    def send(self, bucket: Bucket) -> None:
        from vllm.distributed.weight_transfer import packed_tensor

        # Packed without gaps, and read in place: a wide type must not lie behind an odd number of narrow ones.
        bucket = sorted(bucket, key=lambda item: -item[1].element_size())

        def broadcast() -> None:
            torch.cuda.set_device(self._device)
            tensors, sent = iter(bucket), []   # held until the stream has passed them
            with torch.cuda.stream(self._stream):
                while chunk := packed_tensor.pack_tensors(tensors, lambda item: item[1], packed_tensor.DEFAULT_PACKED_BUFFER_SIZE_BYTES):
                    self._communicator.broadcast(chunk.packed_tensor, src=0, stream=self._stream)
                    sent.append(chunk)
            self._stream.synchronize()

        together(broadcast, lambda: self._control.update(description(bucket)), self._control, phase="weight transfer (send)", timeout_s=self._timeout_s)

    def committed(self) -> None:
        pass

    def close(self) -> None:
        self._communicator.destroy()
