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
        self._device = gpu

    def convert(self, bucket: Bucket) -> Bucket:
        torch.cuda.current_stream().synchronize()   # gathered on this thread's stream, read on the other's
        return bucket

    def send(self, bucket: Bucket) -> None:
        from vllm.distributed.weight_transfer import packed_tensor

        def broadcast() -> None:
            torch.cuda.set_device(self._device)
            packed_tensor.packed_nccl_broadcast_producer(
                iterator=iter(bucket), group=self._communicator, src=0, post_iter_func=lambda item: item[1],
                buffer_size_bytes=packed_tensor.DEFAULT_PACKED_BUFFER_SIZE_BYTES, num_buffers=packed_tensor.DEFAULT_PACKED_NUM_BUFFERS)
            torch.cuda.current_stream().synchronize()

        together(broadcast, lambda: self._control.update(description(bucket)), self._control, phase="weight transfer (send)", timeout_s=self._timeout_s)

    def committed(self) -> None:
        pass

    def close(self) -> None:
        self._communicator.destroy()
