"""Trainer side of vLLM's own ipc backend: an engine on the trainer's GPU maps its tensors, nothing is copied twice."""
from __future__ import annotations

import base64
import pickle

import torch
from torch.multiprocessing.reductions import reduce_tensor

from sophiavl_fast.rollout.transfer.control import Control
from sophiavl_fast.rollout.transfer.source import Bucket, description


class IpcChannel:
    """Handles of every tensor, pickled, over HTTP on loopback behind the token (the one place where the project pickles).

    The tensors stay alive until the update is committed: the engine reads them in place.
    """

    def __init__(self, control: Control, gpu: int) -> None:
        self._control = control
        self._shared: list[Bucket] = []
        self._gpu = str(torch.cuda.get_device_properties(gpu).uuid)
        control.init_transfer({"packed": False})

    def convert(self, bucket: Bucket) -> Bucket:
        torch.cuda.current_stream().synchronize()   # gathered on this thread's stream
        return bucket

    def send(self, bucket: Bucket) -> None:
        self._shared.append(bucket)
        handles = [{self._gpu: reduce_tensor(tensor)[1]} for _, tensor in bucket]
        self._control.update(description(bucket) | {"ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode()})

    def committed(self) -> None:
        self._shared.clear()
        torch.cuda.ipc_collect()

    def close(self) -> None:
        self._shared.clear()
