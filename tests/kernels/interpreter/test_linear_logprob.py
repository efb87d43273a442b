"""linear_logprob in Triton, interpreted, against float64; every error is measured by what the naive version in the same dtype loses."""
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sophiavl_fast.kernels import linear_logprob, triton_logprob, triton_logprob_plans

from tests.kernels.interpreter.logprob_scenes import PLANS, assert_close, make, op, plain, run, use

SHAPES = [(37, 40, 333), (130, 72, 700)]


def compare(T, H, V, *, dtype, seed=0, temperature=1.0, entropy=True, bias=True, padding=0, spread=1.0, **options):
    hidden, weight, offset, target = make(T, H, V, dtype=dtype, seed=seed, bias=bias, spread=spread)
    upstream = torch.randn(2, T, generator=torch.Generator().manual_seed(seed + 1))
    tau = torch.tensor(temperature) if seed % 2 else temperature
    wide = torch.cat([weight, torch.full((padding, H), torch.nan, dtype=dtype)])
    long = None if offset is None else torch.cat([offset, torch.full((padding,), torch.nan)])
    got = run(op(target, temperature=tau, entropy=entropy, vocab_size=V, **options), (hidden, wide, long), upstream)
    first = 3 if entropy else 2
    for grad in got[first:]:
        assert not grad[V:].any()
    got[first:] = [grad[:V] for grad in got[first:]]
    exact = run(plain(target, temperature=temperature, entropy=entropy, dtype=torch.float64), (hidden, weight, offset), upstream)
    naive = run(plain(target, temperature=temperature, entropy=entropy), (hidden, weight, offset), upstream)
    # a logit of size s is rounded by eps s on its way through the temperature
    assert_close(got, exact, naive, eps=1e-6 * (1 + spread))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_float64(shape, name, dtype, monkeypatch):
    """Ragged T, H and V over several tiles, NaN in the padding rows of the weight, bias and temperature, gradients of everything."""
    use(monkeypatch, name)
    compare(*shape, dtype=dtype, temperature=0.7, padding=5, seed=len(name))


def test_fp16_gradients_do_not_vanish(monkeypatch):
    """Upstream gradients of 1e-7: unscaled, the gradient of a logit would be below fp16's smallest number."""
    use(monkeypatch, "small tiles")
    compare(40, 40, 300, dtype=torch.float16)
    hidden, weight, _, target = make(40, 40, 300, dtype=torch.float16)
    main_grad = torch.zeros(300, 40)
    linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), target, main_grad=main_grad, backend="triton")[0].sum().mul(1e-7).backward()
    want = run(plain(target, entropy=False, dtype=torch.float64), (hidden.detach().double(), weight.detach().double()), torch.ones(1, 40))[2]
    torch.testing.assert_close(main_grad.double(), want * 1e-7, rtol=2e-3, atol=2e-10)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(T=st.integers(1, 70), H=st.integers(1, 50), V=st.integers(2, 400), seed=st.integers(0, 999), padding=st.integers(0, 9), entropy=st.booleans(),
       bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), tiled=st.booleans(), spread=st.sampled_from([0.1, 1.0, 8.0]))
def test_any_shape(T, H, V, seed, padding, entropy, bias, dtype, tiled, spread, monkeypatch):
    use(monkeypatch, "tiled, cublas" if tiled else "small tiles")
    compare(T, H, V, dtype=dtype, seed=seed, padding=padding, entropy=entropy, bias=bias, spread=spread, temperature=1.3)


@pytest.mark.parametrize("name", ["small tiles", "tiled, cublas"])
def test_all_equal_and_extreme_logits(name, monkeypatch):
    use(monkeypatch, name)
    hidden, weight = torch.ones(3, 4), torch.zeros(300, 4)
    bias = torch.stack([torch.full((300,), v) for v in (0.0, 1e4, -1e4)])
    for row in bias:
        logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0, 150, 299]), bias=row, entropy=True, backend="triton")
        torch.testing.assert_close(logprob, torch.full((3,), 300.0).log().neg(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy, torch.full((3,), 300.0).log(), rtol=1e-6, atol=1e-6)
    target = torch.tensor([299, 0, 298])
    upstream = torch.randn(2, 3)
    for steep in (torch.linspace(-1e4, 1e4, 300), torch.linspace(-1e4 - 1, -1e4, 300)):
        # logits far below 0: of columns outside the vocabulary, whose product is 0, exp(0 - top) would overflow
        got = run(op(target, entropy=True), (hidden, weight, steep), upstream)
        exact = run(plain(target, dtype=torch.float64), (hidden, weight, steep), upstream)
        assert_close(got, exact, [x.float() for x in exact], eps=1e-6)


def test_statistics_of_more_tiles_than_are_merged_at_once(monkeypatch):
    """2,500 columns are 40 product tiles; logits rise and fall, so that maxima change on the way."""
    use(monkeypatch, "small tiles")
    hidden, weight, _, target = make(5, 8, 2500)
    for bias in (torch.linspace(-6, 6, 2500), torch.linspace(6, -6, 2500)):
        got = linear_logprob(hidden, weight, target, bias=bias, entropy=True, backend="triton")
        exact, naive = (plain(target, dtype=d)(hidden, weight, bias) for d in (torch.float64, None))
        assert_close(list(got), list(exact), list(naive))


@pytest.mark.parametrize("name", ["small tiles", "tiled, cublas"])
def test_banned_tokens_and_whole_banned_tiles_never_enter(name, monkeypatch):
    """Columns 0 to 255, a whole vocabulary tile and all its product tiles, are banned."""
    use(monkeypatch, name)
    hidden, weight, bias, _ = make(20, 16, 400, seed=4)
    bias[:256] = -torch.inf
    bias[300] = -torch.inf
    target = torch.arange(301, 321)
    upstream = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    got = run(op(target, entropy=True), (hidden, weight, bias), upstream)
    kept = torch.tensor([i for i in range(400) if bias[i] > -torch.inf])
    small = (hidden, weight[kept], bias[kept])
    spot = torch.searchsorted(kept, target)
    exact, naive = (run(plain(spot, dtype=d), small, upstream) for d in (torch.float64, None))
    assert not got[3][:256].any() and not got[4][:256].any() and not got[3][300].any()
    assert_close([*got[:3], got[3][kept], got[4][kept]], exact, naive)


def test_confident_tokens_lose_no_digits(monkeypatch):
    """x - logsumexp(x) gives 0 from a gap of 17 on; here log-probs and gradients keep a relative accuracy of 1e-5."""
    use(monkeypatch, "small tiles")
    bias = torch.full((300,), -25.0)
    bias[7], bias[290] = 0.0, -30.0
    hidden, weight = torch.zeros(2, 4), torch.zeros(300, 4)
    got = run(op(torch.tensor([7, 7])), (hidden, weight, bias), torch.ones(2, 2))
    others = bias.double()[torch.arange(300) != 7].exp().sum()
    torch.testing.assert_close(got[0].double(), -others.log1p().expand(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(got[3][7].double(), 2 * others / (1 + others), rtol=1e-5, atol=0)


@pytest.mark.parametrize("active", [None, torch.arange(40)], ids=["counted", "all active"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_ignored_rows_never_leak(poison, active, monkeypatch):
    use(monkeypatch, "tiled, cublas" if poison == torch.inf else "small tiles")
    hidden, weight, bias, target = make(40, 16, 300, seed=2)
    dead = target == -100
    upstream = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    clean = run(op(target, entropy=True, active=active), (hidden, weight, bias), upstream.masked_fill(dead, 0))
    hidden[dead] = poison
    got = run(op(target, entropy=True, active=active), (hidden, weight, bias), upstream.masked_fill(dead, torch.nan))
    assert not got[0][dead].any() and not got[1][dead].any() and not got[2][dead].any()
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)


def test_nan_in_a_counted_row_is_loud(monkeypatch):
    hidden, weight, _, target = make(40, 16, 300)
    hidden[3] = torch.nan
    for name in ("small tiles", "tiled, cublas"):
        use(monkeypatch, name)
        logprob, _ = linear_logprob(hidden, weight, target, backend="triton")
        assert logprob[3].isnan() and logprob.isnan().sum() == 1


@pytest.mark.parametrize("name", ["small tiles", "tiled, cublas"])
def test_active_rows_alone_get_a_gradient(name, monkeypatch):
    use(monkeypatch, name)
    hidden, weight, bias, target = make(150, 24, 300, dtype=torch.bfloat16)
    active = torch.tensor([2, 3, 17, 29, 101, 149])
    upstream = torch.randn(2, 150, generator=torch.Generator().manual_seed(3))
    got = run(op(target, entropy=True, active=active), (hidden, weight, bias), upstream)
    alone = torch.zeros(2, 150)
    alone[:, active] = upstream[:, active]
    exact, naive = (run(plain(target, dtype=d), (hidden, weight, bias), alone) for d in (torch.float64, None))
    assert_close(got, exact, naive)
    assert not got[2][torch.isin(torch.arange(150), active, invert=True)].any()


def test_no_active_rows_at_all(monkeypatch):
    use(monkeypatch, "small tiles")
    hidden, weight, bias, target = make(20, 8, 300)
    for options, upstream in (({"active": torch.tensor([], dtype=torch.int64)}, torch.ones(2, 20)), ({}, torch.zeros(2, 20))):
        got = run(op(target, entropy=True, **options), (hidden, weight, bias), upstream)
        assert not any(x.any() for x in got[2:])


@pytest.mark.parametrize("needed", [0, 1, 100, 128, 129])
def test_rows_without_upstream_gradient_are_counted_out(needed, monkeypatch):
    """130 rows of which `needed` have an upstream gradient: as many are packed, and the products of later row tiles are not computed."""
    use(monkeypatch, "small tiles")
    hidden, weight, _, target = make(130, 16, 300, bias=False)
    target = target.abs().clamp(max=299)
    upstream = torch.zeros(2, 130)
    upstream[0, torch.randperm(130, generator=torch.Generator().manual_seed(5))[:needed]] = 0.5
    seen = []
    inner = triton_logprob.Packed.__init__
    monkeypatch.setattr(triton_logprob.Packed, "__init__", lambda self, *a, **k: (inner(self, *a, **k), seen.append(self))[0])
    got = run(op(target), (hidden, weight), upstream)
    (packed,) = seen
    assert packed.count.tolist() == [needed]
    assert packed.rows[:needed].tolist() == upstream[0].nonzero()[:, 0].tolist()
    exact, naive = (run(plain(target, entropy=False, dtype=d), (hidden, weight), upstream) for d in (torch.float64, None))
    assert_close(got, exact, naive)


@pytest.mark.parametrize("name", ["small tiles", "tiled, cublas"])
@pytest.mark.parametrize("active", [None, torch.arange(1, 60, 2)], ids=["counted", "known"])
def test_main_grad_takes_the_weight_gradient(name, active, monkeypatch):
    """In fp32: no bf16 rounding anywhere on its way but the operands'. Rows of padding stay as they were."""
    use(monkeypatch, name)
    hidden, weight, _, target = make(60, 24, 700, dtype=torch.bfloat16, bias=False)
    start = torch.randn(705, 24)
    main_grad = start.clone()
    wide = torch.cat([weight, weight.new_full((5, 24), torch.nan)]).requires_grad_()
    logprob, _ = linear_logprob(hidden, wide, target, vocab_size=700, main_grad=main_grad, active=active, backend="triton")
    logprob.sum().backward()
    mask = torch.ones(60) if active is None else torch.zeros(60).index_fill(0, active, 1)
    exact = run(plain(target, entropy=False, dtype=torch.float64), (hidden.double(), weight.double()), mask[None])[2]
    assert wide.grad is None and torch.equal(main_grad[700:], start[700:])
    torch.testing.assert_close((main_grad - start)[:700].double(), exact, rtol=2 ** -7, atol=2e-3)


def test_every_result_is_the_same_bits_each_time(monkeypatch):
    for name in ("small tiles", "tiled, cublas"):
        use(monkeypatch, name)
        hidden, weight, bias, target = make(70, 24, 300, dtype=torch.bfloat16)
        a, b = (run(op(target, entropy=True), (hidden, weight, bias), torch.ones(2, 70)) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("V", [1, 2, 300])
def test_zero_and_one_token(T, V, monkeypatch):
    use(monkeypatch, "small tiles")
    compare(T, 8, V, dtype=torch.float32)


def test_rows_and_columns_in_any_layout(monkeypatch):
    """A transposed hidden, a weight cut out of a wider matrix, an odd hidden size."""
    use(monkeypatch, "small tiles")
    hidden, weight, _, target = make(30, 19, 300, bias=False)
    stored, cut = torch.empty(19, 30).T, torch.empty(300, 31)[:, :19]
    stored.copy_(hidden)
    cut.copy_(weight)
    a = linear_logprob(stored.requires_grad_(), cut.requires_grad_(), target, backend="triton")[0]
    exact = run(plain(target, entropy=False, dtype=torch.float64), (hidden, weight), torch.ones(1, 30))
    got = torch.autograd.grad(a.sum(), (stored, cut))
    for x, y in zip((a, *got), exact, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["small tiles", "tiled, cublas"])
def test_a_bias_and_active_rows_in_any_layout(monkeypatch, name):
    """A column of a table, one number for all, every second number."""
    use(monkeypatch, name)
    hidden, weight, _, target = make(30, 19, 300, bias=False)
    active = torch.arange(30)[::2]
    for bias in (torch.randn(300, 2)[:, 1], torch.tensor(0.5).expand(300), torch.randn(600)[::2]):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        a = linear_logprob(*leaves, target, bias=bias, active=active, backend="triton")[0]
        got = torch.autograd.grad(a.sum(), leaves)
        wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        exact = plain(target, entropy=False, dtype=torch.float64)(*wide, bias.double())[0]
        kept = torch.zeros(30, dtype=torch.float64).index_fill(0, active, 1.0)
        for x, y in zip((a, *got), (exact, *torch.autograd.grad((exact * kept).sum(), wide)), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_peak_memory_is_what_the_arithmetic_says(monkeypatch):
    """gradient_bytes, against what PyTorch allocates in a backward pass."""
    use(monkeypatch, "as shipped")
    T, H, V = 300, 512, 2000
    hidden, weight, _, target = make(T, H, V, dtype=torch.bfloat16, bias=False)
    main_grad = torch.zeros(V, H)
    loss = linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), target, main_grad=main_grad, backend="triton")[0].sum()
    with torch.profiler.profile(profile_memory=True) as seen:
        loss.backward()
    live = peak = 0
    for event in sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    outputs, said = T * H * 2, triton_logprob_plans.gradient_bytes(T, H, V, 2)
    assert 0.9 * said < peak - outputs < 1.02 * said + 64 * T
