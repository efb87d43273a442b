"""torch.cuda's answers on the pretended device of pretend_cuda.py."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch


class _Stub:
    """A stream or an event: every method does nothing; `synchronize` counts."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = torch.device("cuda", 0), 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: torch.cuda.synchronize() if name == "synchronize" else None


def torch_cuda(sync: Callable[[str], None]) -> dict[str, Any]:
    """Attributes of torch.cuda that speak of one idle card of 80 GiB; `sync(kind)` is told of each wait for it."""
    generator = torch.Generator().manual_seed(0)
    nothing = lambda *args, **kwargs: None
    properties = SimpleNamespace(name="pretended", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0, uuid="0", warp_size=32)
    numbers = dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), lambda *args: 0)
    return numbers | dict.fromkeys(("set_device", "init", "_lazy_init", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "seed"), nothing) | {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0, "default_generators": (generator,),
        "get_device_capability": lambda device=None: (9, 0), "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name, "mem_get_info": lambda device=None: (80 << 30, 80 << 30), "memory_stats": lambda *args: {},
        "is_bf16_supported": lambda *args: True, "is_current_stream_capturing": lambda: False,
        "Stream": _Stub, "Event": _Stub, "current_stream": _Stub, "default_stream": _Stub, "stream": lambda stream: nullcontext(),
        "synchronize": lambda *args: sync("synchronize"), "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state) and None,
        "manual_seed": lambda seed: generator.manual_seed(int(seed)) and None, "manual_seed_all": lambda seed: generator.manual_seed(int(seed)) and None,
    }
