"""What the nccl channel puts on the wire, on a pretended device: vLLM's own consumer must find the bucket in it. NCCL itself takes no part."""
import queue
import threading

import pytest
import torch

from sophiavl_fast.rollout.transfer import nccl
from tests.pretend_cuda import pretended_cuda

packed_tensor = pytest.importorskip("vllm.distributed.weight_transfer.packed_tensor")


class Wire:
    """Both ends' communicator; what one broadcasts the other gets, and sizes must agree as they must for NCCL."""

    def __init__(self) -> None:
        self.inside: queue.Queue = queue.Queue()

    def broadcast(self, tensor, src, stream=None):
        if threading.current_thread().name == "consumer":
            sent = self.inside.get(timeout=20)
            assert sent.shape == tensor.shape and sent.dtype == tensor.dtype
            tensor.copy_(sent)
        else:
            assert stream is not None, "an engine's broadcasts are on its own stream"
            self.inside.put(tensor.clone())


class Engine:
    """The remote call: vLLM's consumer on the bucket's description."""

    name = "engine 0"

    def __init__(self, wire: Wire, limit: int) -> None:
        self.wire, self.limit, self.loaded = wire, limit, []

    def diagnosis(self) -> str:
        return ""

    def update(self, told: dict) -> None:
        threading.current_thread().name = "consumer"
        listed = [(name, (shape, getattr(torch, dtype))) for name, dtype, shape in zip(told["names"], told["dtype_names"], told["shapes"])]
        packed_tensor.packed_nccl_broadcast_consumer(iter(listed), self.wire, 0, self.loaded.extend, buffer_size_bytes=self.limit, device="cuda")


@pytest.mark.parametrize("limit", [1, 64, 1000, 1 << 30])
def test_the_engine_finds_the_bucket(monkeypatch, limit):
    """Several messages a bucket where it is larger than the buffer, cut where the consumer cuts."""
    monkeypatch.setattr(packed_tensor, "DEFAULT_PACKED_BUFFER_SIZE_BYTES", limit)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    torch.manual_seed(limit)
    with pretended_cuda(), pytest.warns(UserWarning) if limit < 500 else pytest.MonkeyPatch.context():
        bucket = [(f"w{i}", torch.randn(shape, device="cuda").to(dtype)) for i, (shape, dtype) in enumerate(
            [((3, 5), torch.float32), ((7,), torch.bfloat16), ((), torch.float32), ((2, 3, 4), torch.bfloat16), ((130,), torch.float32)])]
        channel = object.__new__(nccl.NcclChannel)   # its start is NCCL's
        channel._communicator = wire = Wire()
        channel._control = engine = Engine(wire, limit)
        channel._timeout_s, channel._device, channel._stream = 20.0, 0, torch.cuda.Stream(0)
        channel.send(channel.convert(bucket))
        found = dict(engine.loaded)
        assert wire.inside.empty() and len(engine.loaded) == len(bucket)
        for name, sent in bucket:
            assert sent.dtype == found[name].dtype and torch.equal(sent, found[name])
