"""Time, rates and memory on one device. On a CPU (a dry run) everything runs once and the figures mean nothing."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Bench:
    """What every part is given: the device, whether it is a dry run (tiny shapes), the backend under test, the measured ceilings."""

    device: torch.device
    dry: bool
    backend: str = "triton"
    seconds: float = 0.25                      # of measurement a figure
    flops: float = float("nan")                # bf16 product, FLOP/s, measured here
    bandwidth: float = float("nan")            # copy, bytes read plus written a second, measured here
    launch: float = 0.0                        # an empty kernel among others in a CUDA graph, seconds, measured here
    deadline: float = float("inf")             # on the monotonic clock: when the whole run must be over
    seed: int = 0
    generators: dict[str, torch.Generator] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def size(self, real: int, tiny: int) -> int:
        """A shape of the dry run, or of the device."""
        return tiny if self.dry else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Fresh random numbers: never zeros, which run faster than data does."""
        kind = self.device.type
        g = self.generators.setdefault(kind, torch.Generator(self.device).manual_seed(self.seed))
        return torch.randn(shape, device=self.device, dtype=torch.float32, generator=g).mul_(scale).to(dtype)

    def rand(self, *shape: int) -> Tensor:
        g = self.generators.setdefault(self.device.type, torch.Generator(self.device).manual_seed(self.seed))
        return torch.rand(shape, device=self.device, generator=g)

    def integers(self, high: int, *shape: int) -> Tensor:
        g = self.generators.setdefault(self.device.type, torch.Generator(self.device).manual_seed(self.seed))
        return torch.randint(0, high, shape, device=self.device, generator=g)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile; in a dry run without code generation, which would take minutes."""
        return torch.compile(function, backend="aot_eager" if self.dry else "inductor", dynamic=False)

    def clear(self) -> None:
        """Wait for the device, so that its errors come up here, and give back what is cached."""
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def alive(self) -> bool:
        """Whether the device still takes work: after some errors (an illegal address) a process's context never does again."""
        if self.dry:
            return True
        try:
            torch.ones(1, device=self.device).item()
        except Exception:
            return False
        return True

    def tried(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What it makes, or how it failed: one figure less, not the part; unless the device is gone."""
        try:
            made = make()
            self.clear()
            return made
        except Exception as error:
            if not self.alive():
                raise
            kind = "absent" if isinstance(error, ImportError) else "failed"
            return {kind: f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}

    # -- figures

    def eager(self, run: Callable[[int], Any], sets: int) -> dict[str, float]:
        """Median ms of run(i) over rotating input sets i, by CUDA events around each call."""
        for i in range(min(sets, 1) if self.dry else max(sets, 3)):
            run(i % sets)
        if self.dry:
            began = time.perf_counter()
            run(0)
            return _figures([1e3 * (time.perf_counter() - began)])
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(0)
        torch.cuda.synchronize()
        count = int(min(max(self.seconds / max(time.perf_counter() - began, 1e-6), 5), 400))
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for i, (start, end) in enumerate(marks):
            start.record()
            run(i % sets)
            end.record()
        torch.cuda.synchronize()
        return _figures([start.elapsed_time(end) for start, end in marks])

    def graph(self, run: Callable[[int], Any], sets: int, *, repeat: int = 1, before: Callable[[], Any] | None = None) -> dict[str, float]:
        """Median ms of one call inside a CUDA graph that holds every set `repeat` times: launch gaps shrink to the device's own.

        before: eager work that `run` goes on from, on the stream of the capture: a backward pass runs on the stream of its forward pass.
        """
        if self.dry:
            if before is not None:
                before()
            return self.eager(run, sets)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            if before is not None:
                before()
            for _ in range(3):
                run(0)
        torch.cuda.current_stream().wait_stream(side)
        graph, calls = torch.cuda.CUDAGraph(), sets * repeat
        # the outer context puts the stream back where a capture fails, which the inner one then does not
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=side):
            for i in range(calls):
                run(i % sets)
        found = self.eager(lambda _: graph.replay(), 1)
        graph.reset()
        return {name: value / calls if name != "runs" else value for name, value in found.items()}

    def peak(self, run: Callable[[int], Any]) -> dict[str, float]:
        """MB beyond what is held before run(0): what it leaves behind (its results), and the peak beyond these as well."""
        if self.dry:
            return {"peak_extra_mb": float("nan"), "results_mb": float("nan")}
        run(0)
        self.clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run(0)
        torch.cuda.synchronize()
        after, top = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        del kept
        return {"peak_extra_mb": (top - after) / 1e6, "results_mb": (after - before) / 1e6}

    def rates(self, figures: dict[str, float], *, flops: float = 0.0, bytes_: float = 0.0, launches: int = 0) -> dict[str, float]:
        """Achieved rates and their share of the measured ceilings; `of_floor` is the floor over the time.

        The floor: the longer of arithmetic and traffic, and as many empty kernels in a graph as the work cannot do without.
        """
        seconds = figures["median_ms"] / 1e3
        floor = max(flops / self.flops if flops else 0.0, bytes_ / self.bandwidth if bytes_ else 0.0) + launches * self.launch
        found = {"floor_ms": 1e3 * floor, "of_floor": floor / seconds}
        found |= {"tflops": flops / seconds / 1e12} if flops else {}
        return figures | found | ({"gb_per_s": bytes_ / seconds / 1e9} if bytes_ else {})


def _figures(ms: list[float]) -> dict[str, float]:
    return {"median_ms": median(ms), "min_ms": min(ms), "max_ms": max(ms), "runs": len(ms)}


def ceilings(bench: Bench) -> dict[str, Any]:
    """A large bf16 product, a large copy, on random data, and an empty kernel in a CUDA graph: what percentages refer to. Sets them on `bench`."""
    n, big = bench.size(8192, 32), bench.size(1 << 30, 1 << 10)
    a, b = bench.randn(n, n, dtype=bench.dtype), bench.randn(n, n, dtype=bench.dtype)
    product = bench.eager(lambda i: a @ b, 1)
    source = bench.randn(big)
    target = torch.empty_like(source)
    copy = bench.eager(lambda i: target.copy_(source), 1)
    bench.flops, bench.bandwidth = 2 * n ** 3 / product["median_ms"] * 1e3, 2 * 4 * big / copy["median_ms"] * 1e3
    empty = {} if bench.dry else bench.graph(lambda i: torch.cuda._sleep(0), 1, repeat=200)  # one thread that looks at the clock
    bench.launch = empty.get("median_ms", 0.0) / 1e3
    return {"product": product | {"size": n, "tflops": bench.flops / 1e12}, "copy": copy | {"bytes": 8 * big, "gb_per_s": bench.bandwidth / 1e9},
            "launch": empty}


def failures(node: Any, path: str = "", *, absent: bool = False) -> list[str]:
    """'where: how' of everything below that failed; with `absent` also of what could not be imported."""
    if not isinstance(node, dict):
        return []
    own = [f"{path}: {node[kind]}" for kind in ("failed", *(("absent",) if absent else ())) if isinstance(node.get(kind), str)]
    return own + [line for key, below in node.items() for line in failures(below, f"{path}/{key}" if path else key, absent=absent)]


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in fp64; NaN anywhere is infinity."""
    got, want = got.detach().double(), want.detach().double()
    error = ((got - want).norm() / want.norm().clamp(min=1e-300)).item()
    return float("inf") if error != error else error
