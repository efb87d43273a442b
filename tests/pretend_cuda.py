"""A CUDA device that is not there: device mistakes are found on a CPU.

Within `pretended_cuda()` a tensor that is made on "cuda", or moved there, says that it lies on cuda:0 and is computed by the CPU. What makes it so is
a mark on its *storage*, not a subclass: views, `param.data = view`, shards of flat buffers and saved tensors are right by themselves, autograd's
engine sees plain CPU tensors, and nothing that asks `type(x) is Tensor` notices. Two layers:

    Python      torch.Tensor's device, is_cuda, to, cpu, numpy, ... and every factory are patched: they know what the caller *wished*.
    dispatcher  a TorchDispatchMode sees each op that runs, those of C++ backward formulas included: results of marked tensors are marked, ops
                that mix devices raise what CUDA raises, ops for which a host waits for the GPU are counted with the line that asked for them.

It cannot see: kernels' own numerics and limits, races of streams and of non_blocking copies, memory, NCCL, and ops that CUDA lacks.
Tensors that C++ makes out of nothing (`at::zeros(..., grad.options())` in a backward formula) take the device of what they first meet.
"""
from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # reads all of torch's functions when it is first needed, and must not find ours
import torch.distributed as dist
import torch.utils._device
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests import pretend_torch_cuda

ROOT = Path(__file__).resolve().parent.parent
HARNESS = {__file__, pretend_torch_cuda.__file__}
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NEW = ("new_tensor", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
# Their results' sizes, or their values, are needed on the host before it can go on.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Marks:
    """A set of storages, by identity. A weak reference keeps a dead storage's address from being given to another while it is a member."""

    def __init__(self) -> None:
        self.held: dict[int, StorageWeakRef] = {}
        self._limit = 4096

    def __contains__(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self.held

    def add(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.held[reference.cdata] = reference
        if len(self.held) > self._limit:
            for key in [key for key, held in self.held.items() if held.expired()]:
                del self.held[key]
            self._limit = max(4096, 2 * len(self.held))

    def discard(self, tensor: Tensor) -> None:
        self.held.pop(_storage(tensor), None)


class Pretence:
    """The pretended device. syncs counts (kind, our own file:line, where the op was asked for); `since` gives those of a block."""

    def __init__(self) -> None:
        self.marked, self.unplaced, self.pinned = Marks(), Marks(), Marks()
        self.syncs: Counter[tuple[str, str, str]] = Counter()
        self.wish = threading.local()

    @contextmanager
    def since(self) -> Iterator[Counter[tuple[str, str, str]]]:
        before, found = self.syncs.copy(), Counter()
        yield found
        found.update(self.syncs - before)

    def sync(self, kind: str) -> None:
        ours = asked = None
        frame: Any = sys._getframe(1)
        while frame is not None and ours is None:
            file = frame.f_code.co_filename
            if file not in HARNESS and "/torch/" not in file and not file.startswith("<"):
                line = f"{_short(file)}:{frame.f_lineno}"
                asked = asked or line
                ours = line if file.startswith(str(ROOT)) or "/sophiavl_fast/" in file else None
            frame = frame.f_back
        self.syncs[kind, ours or "?", asked or "?"] += 1

    @contextmanager
    def wished(self, on_cuda: bool | None) -> Iterator[None]:
        """What Python asked for decides where fresh results of the ops within lie; None: ops decide, but nothing is left unplaced."""
        outer = getattr(self.wish, "value", ())
        self.wish.value = (on_cuda,)
        try:
            yield
        finally:
            self.wish.value = outer

    # -- the dispatcher's layer

    def run(self, mode: TorchDispatchMode, func: Any, args: tuple, kwargs: dict) -> Any:
        if _composite(func):  # below autograd, as in inference mode and inside our own ops, these come whole: look at what they are made of
            with mode:
                return func.decompose(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        known = {_storage(t) for t in given}
        here = any(place in self.marked.held for place in known)
        if here:
            self._check(func, args, given, kwargs)
        self._count(func, args, kwargs, here)
        if func.namespace == "sophiavl":  # our own ops are Python: go on watching inside
            body = torch._library.custom_ops.OPDEFS[f"sophiavl::{func._opname}"]._init_fn
            with mode, torch._C._AutoDispatchBelowAutograd():
                out = body(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        wish = getattr(self.wish, "value", ())
        for t in _tensors((out,)):
            if (place := _storage(t)) in known or not place:
                if here and place in self.unplaced.held:
                    self.unplaced.discard(t)
                    self.marked.add(t)
            elif wish and wish[0] is not None:
                (self.marked.add if wish[0] else self.marked.discard)(t)
            elif here:
                self.marked.add(t)
            elif not wish and all(place in self.unplaced.held for place in known):
                self.unplaced.add(t)
        return out

    def _check(self, func: Any, args: tuple, given: list[Tensor], kwargs: dict) -> None:
        name = func._opname
        if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' (in {func})")
        strangers = [t for t in given if t not in self.marked and t not in self.unplaced]
        if not strangers or name in ("copy_", "_to_copy", "set_"):
            return
        if name in INDEXING and args[0] in self.marked:
            strangers = [t for t in strangers if not any(t is index for index in args[1])]
        scalars = func.namespace != "aten" or torch.Tag.pointwise in func.tags or name in INDEXING or "fill" in name or name.startswith("_foreach")
        if any(t.dim() or not scalars for t in strangers) or any(t is args[i] for t in strangers for i in _written(func) if i < len(args)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in {func})")

    def _count(self, func: Any, args: tuple, kwargs: dict, here: bool) -> None:
        name = func._opname
        if here and name in WAITING:
            self.sync("item" if name == "_local_scalar_dense" else name)
        elif here and name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.sync(name)
        elif here and name in INDEXING:
            indices = [t for t in args[1] if t is not None]
            filled = name != "index" and len(indices) == 1 and indices[0].dtype == torch.bool and args[2].numel() == 1  # a masked_fill
            if any(t.dtype in (torch.bool, torch.uint8) and t in self.marked for t in indices) and not filled:
                self.sync("mask as index")
            if any(t not in self.marked and t not in self.unplaced for t in indices):
                self.sync("upload of an index")
        elif name == "copy_" and (args[0] in self.marked) != (args[1] in self.marked) and args[1] not in self.unplaced:
            self.crossed(args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking")))

    def crossed(self, source: Tensor, non_blocking: bool) -> None:
        """A copy between host and device: the host waits, but for a pinned one that it said not to wait for."""
        if source in self.marked:
            if not non_blocking:
                self.sync("download")
        elif not (non_blocking and source in self.pinned):
            self.sync("upload")

    # -- Python's layer

    def to(self, original: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = kwargs.get("other", args[0] if args else None)
        wish = kwargs.get("device", args[0] if args else None)
        if isinstance(other, Tensor):
            wish = other.device
            args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "other"} | {"dtype": other.dtype, "device": wish}
        elif not isinstance(wish, str | int | torch.device) or isinstance(wish, bool):
            return original(tensor, *args, **kwargs)
        else:
            args, kwargs = args[0 if "device" in kwargs else 1:], kwargs | {"device": wish}
        device = _device(wish)
        for name, value in zip(("dtype", "non_blocking", "copy"), args):
            kwargs[name] = value
        on_cuda = device.type == "cuda"
        if device.type not in ("cuda", "cpu") or tensor.is_meta:
            return original(tensor, **kwargs)
        kwargs["device"] = CPU
        if on_cuda == (tensor in self.marked):
            return original(tensor, **kwargs)
        self.crossed(tensor, kwargs.get("non_blocking", False))
        with self.wished(on_cuda):
            return original(tensor, **kwargs | {"copy": True})

    def factory(self, original: Callable[..., Any]) -> Callable[..., Any]:
        name = getattr(original, "__name__", "")

        @functools.wraps(original)
        def make(*args: Any, **kwargs: Any) -> Any:
            wish, pin = kwargs.get("device"), kwargs.pop("pin_memory", False)
            device = None if wish is None else _device(wish)
            if name in ("as_tensor", "asarray") and isinstance(args[0], Tensor):
                return args[0].to(**{k: v for k, v in kwargs.items() if v is not None}) if kwargs else args[0]
            if device is not None and device.type == "cuda":
                if pin or kwargs.get("generator") is not None:
                    raise RuntimeError("only dense CPU tensors can be pinned" if pin else "Expected a 'cuda' device type for generator but found 'cpu'")
                kwargs["device"] = CPU
                if name in ("tensor", "as_tensor", "asarray", "new_tensor"):
                    self.sync("upload")
            with self.wished(None if device is None else device.type == "cuda"):
                out = original(*args, **kwargs)
                if device is not None and device.type == "cuda" and name in ("as_tensor", "asarray"):
                    out = out.clone()
            if isinstance(out, Tensor) and device is not None and not out.is_meta:  # some are made without the dispatcher's knowing
                (self.marked.add if device.type == "cuda" else self.marked.discard)(out)
            if pin:
                self.pinned.add(out)
            return out

        return make

    def tensor_patches(self) -> dict[str, Any]:
        """Attributes of torch.Tensor."""
        old = {name: getattr(Tensor, name) for name in ("device", "is_cuda", "is_cpu", "to", "numpy", "__array__", "tolist", "type", "get_device", *NEW)}

        def numpy(method: str) -> Callable[..., Any]:
            def convert(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if tensor in self.marked:
                    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
                return old[method](tensor, *args, **kwargs)
            return convert

        def tolist(tensor: Tensor) -> Any:
            if tensor in self.marked:
                self.sync("tolist")
            return old["tolist"](tensor)

        def type_(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            named = old["type"](tensor, *args, **kwargs)
            return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) and tensor in self.marked else named

        def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
            if tensor in self.marked:
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
            out = tensor.clone()
            self.pinned.add(out)
            return out

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.to(old["to"], tensor, *args, **kwargs)

        return {
            "device": property(lambda t: CUDA if t in self.marked else old["device"].__get__(t)),
            "is_cuda": property(lambda t: t in self.marked or old["is_cuda"].__get__(t)),
            "is_cpu": property(lambda t: t not in self.marked and old["is_cpu"].__get__(t)),
            "to": to, "cpu": lambda t, **_: to(t, "cpu"), "cuda": lambda t, device=None, non_blocking=False, **_: to(t, "cuda", non_blocking=non_blocking),
            "numpy": numpy("numpy"), "__array__": numpy("__array__"), "tolist": tolist, "type": type_,
            "pin_memory": pin_memory, "is_pinned": lambda t, *_: t in self.pinned,
            "get_device": lambda t: 0 if t in self.marked else old["get_device"](t), **{name: self.factory(old[name]) for name in NEW},
        }


class _Watch(TorchDispatchMode):
    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.pretence.run(self, func, args, kwargs or {})


@contextmanager
def pretended_cuda() -> Iterator[Pretence]:
    """Within the block torch has one CUDA device. Threads started there see it too; process groups run over gloo."""
    pretence = Pretence()
    constructors = torch.utils._device._device_constructors()  # caches the original factories; must not see the wrapped ones
    cuda, start, run = pretend_torch_cuda.torch_cuda(pretence.sync), dist.init_process_group, threading.Thread.run

    def over_gloo(backend: str | None = None, **kwargs: Any) -> None:
        start("gloo" if backend and "nccl" in backend else backend, **kwargs)

    def watched(thread: threading.Thread) -> None:
        with _Watch(pretence):
            run(thread)

    names = [name for name in dir(torch) if any(getattr(torch, name) is made for made in constructors)] + [n for n in dir(torch) if n.endswith("_like")]
    patches = [
        *(mock.patch.object(torch, name, pretence.factory(getattr(torch, name))) for name in names),
        *(mock.patch.object(Tensor, name, value, create=True) for name, value in pretence.tensor_patches().items()),
        *(mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()),
        *(mock.patch.object(torch.cuda.random, name, cuda[name]) for name in ("get_rng_state", "set_rng_state")),
        mock.patch.object(dist, "init_process_group", over_gloo), mock.patch.object(threading.Thread, "run", watched),
    ]
    for patch in patches:
        patch.start()
    try:
        with _Watch(pretence):
            yield pretence
    finally:
        for patch in reversed(patches):
            patch.stop()


def _storage(tensor: Tensor) -> int:
    """Its identity; 0: it has none (sparse and the like)."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


@functools.cache
def _composite(func: Any) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)


@functools.cache
def _written(func: Any) -> tuple[int, ...]:
    """Places of the positional arguments that an op writes to."""
    return tuple(i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)


def _device(wish: Any) -> torch.device:
    return CUDA if isinstance(wish, int) else torch.device(wish)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for x in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else (tree,):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple | dict):
            yield from _tensors(x)


def _short(file: str) -> str:
    return file.removeprefix(f"{ROOT}/").rsplit("site-packages/", 1)[-1]
