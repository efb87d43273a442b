"""Are the kernels right on this device: every op against fp64 on the same device, at ragged shapes, in memory full of NaN.

`python -m benchmarks.gpu.correct` runs the small shapes alone: that is what compute-sanitizer is given.
"""
from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checkout

checkout.use()

from benchmarks.gpu import process  # noqa: E402
from benchmarks.gpu.clock import Bench, relative  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# relative error ||got - exact|| / ||exact||: bf16 operands are compared with fp64 products of the same rounded operands
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LONGEST = 100.0   # seconds of one compute-sanitizer tool
# linear_logprob: what a scene adds to ragged shapes, an ignored target, upstream gradients of 0, a temperature and a vocabulary with padding set huge
SCENES: dict[str, frozenset[str]] = {name: frozenset(flags.split()) for name, flags in {
    "plain": "entropy", "no entropy": "", "bias": "entropy bias", "bans": "entropy bias bans", "main_grad": "main_grad", "active": "entropy active",
    "active main_grad": "active main_grad", "temperature": "entropy tau", "nan": "entropy nan", "fp16": "entropy half",
    "fp16 all": "entropy half bias active tau nan", "all": "entropy bias bans main_grad active tau nan"}.items()}
MIDDLE = (257, 512, 4102)                                  # where every scene runs
LARGE = ("plain", "all")                                   # those that also run elsewhere, at the sizes of real vocabularies above all
SMALL = ("plain", "no entropy", "main_grad", "fp16 all", "all")  # those that a hundredfold slower device is given


@dataclass(slots=True)
class Checks:
    """The largest error a quantity has shown, and a line for each that is wrong: nothing stops at the first."""

    bench: Bench
    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def within(self, what: str, slot: str, got: Tensor, exact: Tensor, limit: float) -> None:
        error = relative(got, exact)
        self.worst[slot] = max(error, self.worst.get(slot, 0.0))
        self.true(error <= limit, f"{what} {slot}: relative error {error:.3g}, limit {limit:g}")

    def true(self, held: bool, what: str) -> None:
        if not held:
            self.failures.append(what)

    @contextmanager
    def scene(self, what: str) -> Iterator[None]:
        """What a scene raises is one failure more, unless the device is gone."""
        try:
            yield
            self.bench.clear()
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            if not self.bench.alive():
                raise RuntimeError("; ".join(self.failures)) from error


def run(bench: Bench, *, small: bool = False) -> dict[str, Any]:
    """All ops: the largest errors seen, and in `error` what is wrong."""
    checks, out = Checks(bench), {}
    with poisoned():
        for name, check in (("linear_logprob", linear), ("logits_logprob", logits), ("grpo_loss", loss), ("trust_advantage", trust)):
            checks.worst = out[name] = {}
            check(bench, checks, small)
    return out | ({"failures": checks.failures, "error": f"{len(checks.failures)} wrong: " + "; ".join(checks.failures[:5])} if checks.failures else {})


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (integers: their largest), so that what a kernel does not write, or reads too early, shows."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def linear(bench: Bench, checks: Checks, small: bool) -> None:
    """Log-prob, entropy, all gradients and main_grad in every scene; twice the same bits."""
    large = [(5, 64, 300), MIDDLE, (2048, 2048, 151936), (1000, 3584, 152064)]
    middle = (33, 64, 130) if bench.dry else MIDDLE
    shapes = [(5, 16, 37), middle] if bench.dry else [middle] if small else large
    for shape, (name, flags) in itertools.product(shapes, SCENES.items()):
        if name in (LARGE if shape != middle else SMALL if small else SCENES):
            with checks.scene(what := f"linear_logprob {name} {list(shape)}"):
                _linear(bench, checks, what, shape, flags, torch.float16 if "half" in flags else torch.float32 if bench.dry else torch.bfloat16)
        if name == "plain" and shape == middle and not bench.dry:
            with checks.scene(what := f"linear_logprob fp32 {list(shape)}"):
                _linear(bench, checks, what, shape, flags, torch.float32)


def _linear(bench: Bench, checks: Checks, what: str, shape: tuple[int, int, int], flags: frozenset[str], dtype: torch.dtype) -> None:
    from sophiavl_fast.kernels import linear_logprob

    rows, width, vocab = shape
    hidden, weight = bench.randn(rows, width, dtype=dtype), bench.randn(vocab, width, dtype=dtype, scale=3 * width ** -0.5)
    true = vocab - 3
    weight[true:] = 1e4
    target = bench.integers(true, rows)
    target[1] = -100
    bias = bench.randn(vocab) if "bias" in flags else None
    if bias is not None and "bans" in flags:
        banned = torch.arange(0, true, 7, device=bench.device)
        bias[banned[~torch.isin(banned, target)]] = -torch.inf
    if "nan" in flags:
        hidden[1], target[3] = torch.nan, -100
        hidden[3] = torch.inf
    active = torch.arange(0, rows, 2, device=bench.device).flip(0) if "active" in flags else None
    tau = torch.tensor(0.7, device=bench.device) if "tau" in flags else 0.9
    g, h = bench.randn(rows).where(bench.rand(rows) < 0.6, 0), bench.randn(rows).where(bench.rand(rows) < 0.6, 0)
    if active is not None:  # the caller's promise: no other row has a gradient
        others = torch.ones(rows, dtype=torch.bool, device=bench.device).index_fill(0, active, False)
        g, h = g.masked_fill(others, 0), h.masked_fill(others, 0)
    held = bench.randn(vocab, width) if "main_grad" in flags else None

    def outcome(kind: torch.dtype, backend: str) -> dict[str, Tensor]:
        x, w = (t.detach().to(kind).requires_grad_() for t in (hidden, weight))
        b = None if bias is None else bias.to(torch.float64 if kind == torch.float64 else torch.float32).requires_grad_()
        sums = None if held is None else held.to(torch.float64 if kind == torch.float64 else torch.float32, copy=True)
        lp, entropy = linear_logprob(x, w, target, bias=b, temperature=tau, entropy="entropy" in flags, vocab_size=true, active=active, main_grad=sums,
                                     backend=backend)
        values, upstream = {"logprob": lp} | ({} if entropy is None else {"entropy": entropy}), (g.to(lp.dtype), h.to(lp.dtype))
        leaves = {"d_hidden": x} | ({"d_weight": w} if sums is None else {}) | ({} if b is None else {"d_bias": b})
        wanted = [*leaves.values(), *([] if sums is None else [w])]
        made = torch.autograd.grad([*values.values()], wanted, upstream[: len(values)], allow_unused=True)
        found = {name: t.detach() for name, t in values.items()} | dict(zip(leaves, made))
        return found | ({} if sums is None or held is None else {"main_grad": sums - held.to(sums.dtype)})

    got, again, exact = outcome(dtype, bench.backend), outcome(dtype, bench.backend), outcome(torch.float64, "reference")
    for name, value in got.items():
        checks.true(torch.equal(value, again[name]), f"{what} {name}: other bits the second time")
        checks.within(what, f"{name} {str(dtype)[6:]}", value, exact[name], LIMITS[dtype])


def logits(bench: Bench, checks: Checks, small: bool) -> None:
    """The same from logits that are there: extreme ones, entropy, temperatures, in place, bans, padding, NaN in ignored rows."""
    rows, vocab = (9, 41) if bench.dry else (33, 3001) if small else (513, 151936)
    wide, half = bench.dtype, torch.float16
    for name, dtype, scale, flags in (
        ("plain", wide, 1.0, ""), ("extreme", wide, 300.0, ""), ("entropy", wide, 3.0, "entropy"), ("in place", wide, 3.0, "entropy inplace"),
        ("temperature", wide, 3.0, "entropy tau inplace"), ("masked", wide, 3.0, "entropy nan bans padded"),
        ("fp16", half, 3.0, "entropy tau padded"), ("fp32", torch.float32, 3.0, "entropy bans nan")):
        with checks.scene(what := f"logits_logprob {name}"):
            _logits(bench, checks, what, bench.randn(rows, vocab, dtype=dtype, scale=scale), frozenset(flags.split()))


def _logits(bench: Bench, checks: Checks, what: str, x: Tensor, flags: frozenset[str]) -> None:
    from sophiavl_fast.kernels import logits_logprob

    rows, vocab, dtype = len(x), x.shape[1], x.dtype
    true = vocab - 5 if "padded" in flags else vocab
    target = bench.integers(true, rows)
    x[:, true:] = 1e4
    if "bans" in flags:
        banned = torch.arange(0, true, 7, device=bench.device)
        x[:, banned[~torch.isin(banned, target)]] = -torch.inf
    if "nan" in flags:
        target[2] = -100
        x[2] = torch.nan
    g, h = bench.randn(rows), bench.randn(rows)
    tau = torch.tensor(0.7, device=bench.device) if "tau" in flags else 1.0
    made = {}
    for side, kind in (("got", dtype), ("exact", torch.float64)):
        leaf = x.detach().to(kind, copy=True).requires_grad_()
        inplace = "inplace" in flags and side == "got"
        given = leaf.view_as(leaf) if inplace else leaf  # the in-place gradient overwrites what it is given, and that must be no leaf
        lp, entropy = logits_logprob(given, target, temperature=tau, entropy="entropy" in flags, vocab_size=true, inplace=inplace,
                                     backend=bench.backend if side == "got" else "reference")
        values = [lp] if entropy is None else [lp, entropy]
        (d,) = torch.autograd.grad(values, leaf, [g.to(lp.dtype), h.to(lp.dtype)][: len(values)])
        made[side] = [*(v.detach() for v in values), d]
        checks.true(not inplace or d.data_ptr() == leaf.data_ptr(), f"{what}: the gradient does not lie where the logits were")
    names = ("logprob", *(("entropy",) if "entropy" in flags else ()), "d_logits")
    for slot, got, exact in zip(names, *made.values()):
        checks.within(what, f"{slot} {str(dtype)[6:]}", got, exact, LIMITS[dtype])


def loss(bench: Bench, checks: Checks, small: bool) -> None:
    """Variants of the loss over ragged responses, empty ones included: loss, statistics, gradients; NaN in masked places; coefficients as tensors."""
    from sophiavl_fast.kernels.triton_loss import NAMED

    count = 12 if bench.dry else 70 if small else 700
    lengths = bench.integers(bench.size(40, 6), count)
    lengths[::5] = 0
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens = int(bounds[-1])
    one = lambda value: torch.tensor(value, device=bench.device)
    more: dict[str, dict[str, Any]] = {
        "k1": {"kl": "k1", "entropy_coef": 0.02}, "no old": {"old_logprob": None}, "a token's advantage": {"advantage": bench.randn(tokens)},
        "mask a response": {"mask": True, "mismatch_mask": bench.rand(count) < 0.7, "ratio": "sequence"},
        "tensors": {"clip_low": one(0.1), "clip_high": one(0.3), "dual_clip": one(3.0), "pre_clip": one(0.8), "tis_cap": one(1.5), "kl_coef": one(0.05),
                    "entropy_coef": one(0.01), "denominator": one(77.0)},
        "tensors, constant": {"variant": "cispo", "aggregate": "constant", "max_length": one(512.0), "clip_high": one(4.0), "kl": "k1", "kl_coef": one(0.05)}}
    for name, change in (NAMED | more).items():
        with checks.scene(what := f"grpo_loss {name}"):
            _loss(bench, checks, what, bounds, tokens, change)


def _loss(bench: Bench, checks: Checks, what: str, bounds: Tensor, tokens: int, change: dict[str, Any]) -> None:
    from sophiavl_fast.kernels import STATS, grpo_loss

    logprob = -bench.rand(tokens) * 3 - 0.01
    near = lambda: logprob + bench.randn(tokens, scale=0.3)
    o = {"old_logprob": near(), "ref_logprob": near(), "rollout_logprob": near(), "entropy": bench.rand(tokens), "kl_coef": 0.1, "denominator": 100.0,
         "advantage": bench.randn(len(bounds) - 1)} | change
    for mask, share in (("mask", 0.8), ("mismatch_mask", 0.9)):
        if o.get(mask) is True:
            o[mask] = bench.rand(tokens) < share
    if o.get("mask") is not None:
        for value in (logprob, o["old_logprob"], o["ref_logprob"], o["rollout_logprob"]):
            value[~o["mask"]] = torch.nan
    advantage, made = o.pop("advantage"), {}
    for side, wide in (("got", torch.float32), ("exact", torch.float64)):
        cast = lambda v: v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: B023
        options = {key: cast(value) for key, value in o.items()}
        leaves = [logprob.detach().to(wide, copy=True).requires_grad_()]
        if options.get("entropy_coef") is not None:
            leaves.append(options["entropy"].detach().requires_grad_())
            options["entropy"] = leaves[-1]
        value, stats = grpo_loss(leaves[0], cast(advantage), bounds, backend=bench.backend if side == "got" else "reference", **options)
        made[side] = (value.detach(), stats, *torch.autograd.grad(value, leaves))
    checks.true(len(made["got"][1]) == len(STATS), f"{what}: {len(made['got'][1])} statistics, {len(STATS)} have names")
    for slot, got, exact in zip(("loss", "stats", "d_logprob", "d_entropy"), *made.values()):
        checks.within(what, slot, got, exact, 2e-5)


def trust(bench: Bench, checks: Checks, small: bool = False) -> None:
    """Every mode with every normalisation, what happens to uniform groups in turn, over ragged groups; coefficients as numbers and as tensors."""
    from sophiavl_fast.kernels import trust_advantage

    sizes = bench.integers(bench.size(17, 5), 12 if bench.dry else 70 if small else 4096)
    bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    rows = int(bounds[-1])
    outcome = (bench.rand(rows) < 0.5).float()
    one = lambda value: torch.tensor(value, device=bench.device)
    modes, normalizes, uniforms = ("paper", "repo", "variance", "off"), ("std", "mean", "batch", "none"), ("score", "center", "skip")
    for i, (mode, normalize) in enumerate(itertools.product(modes, normalizes)):
        uniform = uniforms[(i + i // 4) % 3]
        thinking = bench.rand(rows, 4) if mode == "variance" else bench.rand(rows)
        thinking = thinking.where(bench.rand(*thinking.shape) < 0.98, torch.nan)
        given: dict[str, Any] = {"alpha": one(0.5), "anneal": one(0.4), "threshold": one(0.6)} if i % 2 else {"anneal": 0.4}
        given |= {"sigma_filter": one(1.5) if i % 2 else 1.5} if normalize == "batch" and mode != "off" else {}
        run_ = lambda backend: trust_advantage(outcome, thinking, bounds, mode=mode, normalize=normalize, uniform=uniform, quorum=0.7, backend=backend,  # noqa: B023
                                               **given)  # noqa: B023
        with checks.scene(what := f"trust_advantage {mode} {normalize} {uniform}"):
            got, exact = run_(bench.backend), run_("reference")
            checks.true(torch.equal(got.used, exact.used), f"{what}: another set of groups is used")
            for name, a, b in zip(got._fields[:3], got, exact):
                checks.true(torch.equal(a.isnan(), b.isnan()), f"{what} {name}: NaN elsewhere")
                checks.within(what, name, a.nan_to_num(), b.nan_to_num(), 1e-6)


def sanitize(bench: Bench, tool: str | None = None, command: Callable[[], list[str]] | None = None) -> dict[str, Any]:
    """compute-sanitizer over the small shapes, where the tool and the device allow it; `error` says what it found or did not get to."""
    tool = tool or shutil.which("compute-sanitizer") or next((str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None)
    if tool is None or (bench.dry and command is None):
        return {"tool": tool, "ran": False, "why": "a dry run" if bench.dry else "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"tool": tool, "ran": True}
    # without the caching allocator every tensor is an allocation of its own, whose bounds the tool knows
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    wrong, kinds = [], ("memcheck", "racecheck")
    for i, kind in enumerate(kinds):
        limit = min(LONGEST, (bench.left() - 3) / (len(kinds) - i))
        target = command() if command else [sys.executable, "-m", "benchmarks.gpu.correct"]
        code, text = process.run([tool, "--tool", kind, "--error-exitcode", "9", *target], seconds=limit, env=environment, cwd=ROOT, capture=True)
        found[kind] = text.strip().splitlines()[-1:]
        if "not supported" in text:
            return found | {"ran": False, "why": "the device is not supported here"}
        if code != 0:
            why = f"not done after {limit:.0f} s" if code is None else f"exit code {code}: {' / '.join(text.splitlines()[-4:])}"
            wrong.append(f"compute-sanitizer {kind}: {why}")
    return found | ({"error": "; ".join(wrong)} if wrong else {})


if __name__ == "__main__":
    seen = run(Bench(torch.device("cuda"), False), small=True)
    print(seen)
    sys.exit("error" in seen)
