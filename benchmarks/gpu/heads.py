"""linear_logprob and logits_logprob: forward, backward, both, with inactive rows, and the same work by peers."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import needs
from benchmarks.gpu.clock import Bench, failures, relative

SHAPES = {"qwen7b": (16384, 3584, 152064), "llama": (8192, 4096, 262144), "qwen3b": (8192, 2048, 151936)}
TINY = (24, 16, 70)


class Case:
    """One shape: two sets of hidden states over one weight, targets, an upstream gradient and main_grad."""

    def __init__(self, bench: Bench, shape: tuple[int, int, int]) -> None:
        self.rows, self.width, self.vocab = TINY if bench.dry else shape
        self.hidden = [bench.randn(self.rows, self.width, dtype=bench.dtype).requires_grad_() for _ in range(2)]
        self.weight = bench.randn(self.vocab, self.width, dtype=bench.dtype, scale=self.width ** -0.5).requires_grad_()
        self.target, self.upstream = bench.integers(self.vocab, self.rows), bench.randn(self.rows)
        self.product = 2 * self.rows * self.width * self.vocab      # FLOP of one product over all rows


def linear(bench: Bench, name: str) -> dict[str, Any]:
    """Our op at one shape. Backward with recompute is three products; `inactive` sets that share of the upstream gradient to 0, where only the device
    knows (`backward_`) and where the host names the active rows (`backward_known_`)."""
    from sophiavl_fast.kernels import linear_logprob

    case = Case(bench, SHAPES[name])
    main_grad = torch.zeros(case.vocab, case.width, device=bench.device)
    forward = lambda i, active=None: linear_logprob(case.hidden[i], case.weight, case.target, backend=bench.backend, main_grad=main_grad, active=active)[0]

    def value(i: int) -> Tensor:
        with torch.no_grad():
            return forward(i)

    def spread(i: int) -> Any:
        with torch.no_grad():
            return linear_logprob(case.hidden[i], case.weight, case.target, entropy=True, backend=bench.backend)

    both = lambda i: torch.autograd.grad(forward(i), (case.hidden[i], case.weight), case.upstream, allow_unused=True)[0]
    out: dict[str, Any] = {"shape": [case.rows, case.width, case.vocab]}
    out["forward"] = bench.rates(bench.eager(value, 2), flops=case.product) | bench.peak(value)
    out["forward_graph"] = bench.tried(lambda: bench.rates(bench.graph(value, 2), flops=case.product))
    out["forward_entropy"] = bench.tried(lambda: bench.rates(bench.eager(spread, 2), flops=case.product))
    out["both"] = bench.rates(bench.eager(both, 2), flops=4 * case.product) | bench.peak(both)
    out["both_graph"] = bench.tried(lambda: bench.rates(bench.graph(both, 2), flops=4 * case.product))
    for share in (0.0, 0.25, 0.5, 0.75):
        out |= _backward(bench, case, forward, share)
    return out | ({"error": "; ".join(wrong)} if (wrong := failures(out)) else {})


def _backward(bench: Bench, case: Case, forward: Callable[..., Tensor], share: float) -> dict[str, Any]:
    """The backward pass alone with that share of the rows inactive: rows found on the device, named by the host, and the first in a CUDA graph."""
    g = case.upstream.where(bench.rand(case.rows) >= share, 0)
    active = g.nonzero()[:, 0]
    held: list[Tensor] = []

    def hold(rows: Tensor | None = None) -> None:
        held[:] = [forward(i, rows) for i in range(2)]

    back = lambda i: torch.autograd.grad(held[i], (case.hidden[i], case.weight), g, retain_graph=True, allow_unused=True)[0]
    rates = lambda found: bench.rates(found, flops=3 * case.product * len(active) / case.rows) | {"active": len(active) / case.rows}

    def eager(rows: Tensor | None) -> dict[str, Any]:
        hold(rows)
        return rates(bench.eager(back, 2)) | bench.peak(back)

    suffix = f"_inactive_{int(100 * share)}" if share else ""
    return {f"backward{suffix}": bench.tried(lambda: eager(None)), f"backward_known{suffix}": bench.tried(lambda: eager(active)),
            f"backward_graph{suffix}": bench.tried(lambda: rates(bench.graph(back, 2, before=hold)))}


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What everyone writes first."""
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]


def linear_peers(bench: Bench, name: str) -> dict[str, Any]:
    """naive, torch.compile and Liger must run; TRL (its kernel over logits, its chunked function over hidden states) and verl where they can be
    imported. Each is compared with the naive one first."""
    case = Case(bench, SHAPES[name])
    plain = lambda function: lambda i: function(case.hidden[i], case.weight, case.target)
    peers: dict[str, Callable[[], Callable[[int], Tensor]]] = {
        "naive": lambda: plain(naive), "torch.compile": lambda: plain(bench.compiled(naive)), "liger": lambda: _liger(bench, case),
        "trl": lambda: _trl(bench, case), "trl_chunked": lambda: _trl_chunked(case), "verl": lambda: _verl(bench, case)}
    with torch.no_grad():
        want = naive(case.hidden[0], case.weight, case.target)
    out: dict[str, Any] = {"shape": [case.rows, case.width, case.vocab]}
    for peer, make in peers.items():
        out[peer] = bench.tried(lambda: _peer(bench, case, make(), want, total=peer == "liger"))  # noqa: B023
    return out | must_run(out, "both")


MUST_RUN = ("naive", "torch.compile", "liger")


def must_run(out: dict[str, Any], figure: str) -> dict[str, str]:
    """What a part adds where one of the three peers that must run did not."""
    wrong = [line for peer in MUST_RUN if figure not in out[peer] for line in failures(out[peer], peer, absent=True) or [peer]]
    return {"error": f"these peers must run: {'; '.join(wrong)}"} if wrong else {}


def _peer(bench: Bench, case: Case, run: Callable[[int], Tensor], want: Tensor, *, total: bool) -> dict[str, Any]:
    """Forward alone and both. A peer with a summed loss (`total`) computes its gradient while going forward."""
    def both(i: int) -> Any:
        value = run(i)
        return torch.autograd.grad(value, (case.hidden[i], case.weight), None if total else case.upstream)

    with torch.no_grad() if not total else torch.enable_grad():
        got = run(0)
    found: dict[str, Any] = {"error": relative(-got if total else got, want.sum() if total else want)}
    assert found["error"] < 2e-2, f"off by {found['error']:.3g}"
    if not total:
        def forward(i: int) -> Tensor:
            with torch.no_grad():
                return run(i)

        found["forward"] = bench.rates(bench.eager(forward, 2), flops=case.product) | bench.peak(forward)
    found["both"] = bench.rates(bench.eager(both, 2), flops=4 * case.product) | bench.peak(both)
    return found


def _liger(bench: Bench, case: Case) -> Callable[[int], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if bench.dry:  # its kernels want a device: here only the call is checked
        inspect.signature(liger_fused_linear_cross_entropy).bind(case.hidden[0], case.weight, case.target, reduction="sum")
        return lambda i: F.cross_entropy(F.linear(case.hidden[i], case.weight), case.target, reduction="sum")
    return lambda i: liger_fused_linear_cross_entropy(case.hidden[i], case.weight, case.target, reduction="sum")


def _trl(bench: Bench, case: Case) -> Callable[[int], Tensor]:
    """Its Triton kernel over logits; on a CPU, where that cannot run, only the import is checked."""
    from trl.kernels import selective_log_softmax_and_entropy

    if bench.dry:
        return lambda i: naive(case.hidden[i], case.weight, case.target)
    return lambda i: selective_log_softmax_and_entropy(F.linear(case.hidden[i], case.weight), case.target)[0]


def _trl_chunked(case: Case) -> Callable[[int], Tensor]:
    """With the chunk of 32,768 columns that TRL's trainer takes, and no output but the log-prob."""
    from trl.kernels import ChunkedLogProbFunction

    return lambda i: ChunkedLogProbFunction.apply(case.hidden[i], case.weight, None, case.target, 1.0, 32768, None, 1.0, ())[0]


def _verl(bench: Bench, case: Case) -> Callable[[int], Tensor]:
    function = needs.load(needs.VERL).linear_cross_entropy
    if bench.dry:  # as above
        return lambda i: naive(case.hidden[i], case.weight, case.target)
    return lambda i: function(case.hidden[i], case.weight, case.target, 1.0, "none")[0]


def logits(bench: Bench) -> dict[str, Any]:
    """logits_logprob in bf16 at [8192, 151936]: one pass forward; backward in place (read and write once); and the same work by peers."""
    from sophiavl_fast.kernels import logits_logprob

    rows, vocab = bench.size(8192, 12), bench.size(151936, 70)
    sets = [bench.randn(rows, vocab, dtype=bench.dtype) for _ in range(2)]
    target, bytes_ = bench.integers(vocab, rows), rows * vocab * sets[0].element_size()
    ours = lambda x, **options: logits_logprob(x, target, backend=bench.backend, **options)
    plain = lambda x: torch.log_softmax(x.float(), -1).gather(1, target[:, None])[:, 0]
    out: dict[str, Any] = {"shape": [rows, vocab]}

    def forward(function: Callable[[Tensor], Any]) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            with torch.no_grad():
                return function(sets[i])

        return run

    def both(function: Callable[[Tensor], Any]) -> Callable[[int], Tensor]:
        return lambda i: torch.autograd.grad(total(function(leaf := sets[i].detach().requires_grad_())), leaf)[0]

    total = lambda values: sum(v.sum() for v in values if v is not None) if isinstance(values, tuple) else values.sum()
    figure = lambda run, passes: bench.rates(bench.eager(run, 2), bytes_=passes * bytes_) | bench.peak(run)
    graph = lambda run, passes: bench.rates(bench.graph(run, 2), bytes_=passes * bytes_)
    logprob, entropy = lambda x: ours(x)[0], lambda x: ours(x, entropy=True)
    for name, run, passes in (("forward", forward(logprob), 1), ("both", both(logprob), 3), ("forward_entropy", forward(entropy), 1),
                              ("both_entropy", both(entropy), 3)):
        out[name] = figure(run, passes)
        out[f"{name}_graph"] = bench.tried(lambda: graph(run, passes))  # noqa: B023
    want = forward(logprob)(0)
    for name, make in (("naive", lambda: plain), ("torch.compile", lambda: bench.compiled(plain))):
        out[f"{name}_forward"] = bench.tried(lambda: _checked(forward(make()), want) | figure(forward(make()), 1))  # noqa: B023
        out[f"{name}_both"] = bench.tried(lambda: figure(both(make()), 3))  # noqa: B023
    out["trl_forward_entropy"] = bench.tried(lambda: _checked(forward(trl := _trl_logits(bench, target, ours)), want) | figure(forward(trl), 1))
    out["trl_both_entropy"] = bench.tried(lambda: figure(both(_trl_logits(bench, target, ours)), 3))
    # from here on the logits are overwritten by their gradients
    inplace = both(lambda leaf: ours(leaf.view_as(leaf), inplace=True)[0])
    out["both_in_place"], out["both_in_place_graph"] = figure(inplace, 3), bench.tried(lambda: graph(inplace, 3))
    out["liger_both"] = bench.tried(lambda: figure(both(_liger_logits(bench, target, sets[0], logprob)), 3))
    out |= _grpo(bench, sets, target, lambda run: figure(run, 3))
    peers = {peer: {"both": None} if "median_ms" in out[f"{peer}_both"] else out[f"{peer}_both"] for peer in MUST_RUN}
    wrong = [*failures({key: value for key, value in out.items() if not key.startswith("trl")}), *must_run(peers, "both").values()]
    return out | ({"error": "; ".join(dict.fromkeys(wrong))} if wrong else {})


def _checked(run: Callable[[int], Any], want: Tensor) -> dict[str, float]:
    """Its error on the first set, at most 2e-2."""
    got = run(0)
    error = relative(got[0] if isinstance(got, tuple) else got, want)
    assert error < 2e-2, f"off by {error:.3g}"
    return {"error": error}


def _trl_logits(bench: Bench, target: Tensor, ours: Callable[..., Any]) -> Callable[[Tensor], Any]:
    from trl.kernels import selective_log_softmax_and_entropy

    if bench.dry:  # its kernel wants a device
        return lambda x: ours(x, entropy=True)
    return lambda x: selective_log_softmax_and_entropy(x, target)


def _liger_logits(bench: Bench, target: Tensor, sample: Tensor, logprob: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The summed loss, whose gradient is made, in place, while going forward."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    if bench.dry:
        inspect.signature(liger_cross_entropy).bind(sample, target, reduction="sum")
        return lambda x: -logprob(x)
    few = min(64, len(sample))
    got = liger_cross_entropy(sample[:few].clone(), target[:few], reduction="sum")
    error = relative(got, F.cross_entropy(sample[:few].float(), target[:few], reduction="sum"))
    assert error < 2e-2, f"off by {error:.3g}"
    return lambda x: liger_cross_entropy(x.view_as(x), target, reduction="sum")


def _grpo(bench: Bench, sets: list[Tensor], target: Tensor, figure: Callable[[Callable[[int], Tensor]], dict[str, Any]]) -> dict[str, Any]:
    """From logits [n, L + 1, V] to the gradient of the clipped loss with its k3 term, in place: ours in two ops, Liger's in one. The last row of each
    response is nobody's target."""
    from sophiavl_fast.kernels import grpo_loss, logits_logprob

    n = bench.size(8, 2)
    length = len(target) // n
    ids = target.view(n, length)[:, :-1].contiguous()
    ignored = torch.cat([ids, ids.new_full((n, 1), -100)], 1).flatten()
    bounds = torch.arange(0, len(target) + 1, length, device=bench.device)
    counted = ignored != -100
    for x in sets:  # they were overwritten
        x.copy_(bench.randn(*x.shape, dtype=x.dtype))
    with torch.no_grad():
        near = logits_logprob(sets[0], ignored, backend=bench.backend)[0]
    old, ref = (near + bench.randn(len(target), scale=0.3) for _ in range(2))
    advantage, count = bench.randn(n), n * (length - 1)
    own = lambda x: x.view(n, length)[:, :-1].contiguous()

    def ours(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        logprob, _ = logits_logprob(leaf.view_as(leaf), ignored, inplace=True, backend=bench.backend)
        value, _ = grpo_loss(logprob, advantage, bounds, old_logprob=old, ref_logprob=ref, mask=counted, kl_coef=0.04, denominator=float(count),
                             backend=bench.backend)
        return torch.autograd.grad(value, leaf)[0]

    def liger(x: Tensor) -> Tensor:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        options = {"temperature": 1.0, "beta": 0.04, "eps_low": 0.2, "eps_high": 0.2, "inplace": True, "loss_type": "dapo", "reduce": True}
        leaf = x.detach().requires_grad_()
        arguments = (leaf.view(n, length, -1), own(old), own(ref), ids, advantage)
        if bench.dry:
            inspect.signature(triton_grpo_loss).bind(*arguments, **options)
            return ours(x)
        return torch.autograd.grad(triton_grpo_loss(*arguments, **options)[0], leaf)[0]

    real = lambda x: x.view(n, length, -1)[:, :-1]
    want = real(ours(sets[0].clone()))

    def checked() -> dict[str, Any]:
        error = relative(real(liger(sets[0].clone())), want)
        assert error < 2e-2, f"off by {error:.3g}"
        return {"error": error} | figure(lambda i: liger(sets[i]))

    return {"liger_grpo": bench.tried(checked), "ours_grpo": bench.tried(lambda: figure(lambda i: ours(sets[i])))}
