"""The C++ CPU backend of linear_logprob: its statistics and gradients against float64, through the op against the reference, on every instruction set."""
from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sophiavl_fast.kernels import cpu_logprob, linear_logprob, reference_logprob, vocabulary
from torch import Tensor

ABSENT = cpu_logprob.load_library()
ISAS = [] if ABSENT else cpu_logprob.isas()
built = pytest.mark.skipif(ABSENT is not None, reason=f"C++ CPU kernels: {ABSENT}")
every_isa = pytest.mark.parametrize("isa", ISAS or ["scalar"])
CSRC = Path(__file__).resolve().parents[2] / "kernels" / "csrc"
# what a rounding of logits of size ~10, and of bf16 gradients of logits, may cost relative to the largest entry
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0 ** -7, torch.float16: 2.0 ** -10}


@pytest.fixture
def on_isa(monkeypatch):
    return lambda isa: monkeypatch.setenv("SOPHIAVL_CPU_ISA", isa)


def make(T, H, V, *, dtype=torch.float32, seed=0, ignore=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * (2 / H ** 0.5)).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).requires_grad_()
    target = torch.randint(0, V, (T,), generator=g)
    if ignore:
        target[2::5] = -100
    return hidden, weight, bias, target


def oracle(hidden, weight, bias, target, temperature=1.0, valid=None) -> tuple[Tensor, Tensor]:
    """log-prob and entropy by log_softmax in float64."""
    logits = hidden.double() @ weight[:valid].double().T + (0 if bias is None else bias[:valid].double())
    logp, live = (logits / temperature).log_softmax(1), target != -100
    picked = logp.gather(1, target.clamp(min=0)[:, None])[:, 0].where(live, 0)
    return picked, -(logp.exp() * logp.masked_fill(logits.isinf(), 0)).sum(1).where(live, 0)


def pull(outputs, inputs, zeros: slice | None = None):
    """Gradients of a fixed weighted sum of log-prob and entropy; the weights of rows `zeros` are 0."""
    loss = 0
    for i, out in enumerate(outputs):
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        if zeros is not None:
            weights[zeros] = 0
        loss = loss + (out.double() * weights).sum()
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_near(got, want, bound, least=1e-3):
    """Equal up to `bound` times the largest wanted entry, or times `least` where terms of that size may cancel."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound * max(b.abs().max().item() if b.numel() else 0, least))


@built
@every_isa
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 9), (1, 1, 2), (13, 7, 37), (130, 33, 700), (70, 64, 1100)])
@pytest.mark.parametrize("temperature", [1.0, torch.tensor(0.7)])
def test_equals_float64(isa, dtype, shape, temperature, on_isa):
    on_isa(isa)
    hidden, weight, bias, target = make(*shape, dtype=dtype)
    got = linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, entropy=True, backend="cpu")
    want = oracle(hidden, weight, bias, target, float(temperature))
    assert_near(got, want, 2e-6)
    assert_near(pull(got, (hidden, weight, bias)), pull(want, (hidden, weight, bias)), TOLERANCE[dtype])
    plain = linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, backend="cpu")
    assert plain[1] is None
    assert_near(pull(plain[:1], (hidden, weight)), pull(want[:1], (hidden, weight)), TOLERANCE[dtype])


@built
@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 150), H=st.integers(1, 70), V=st.integers(2, 1300), padding=st.integers(0, 70), seed=st.integers(0, 99),
       dtype=st.sampled_from(list(TOLERANCE)), with_bias=st.booleans(), skip=st.sampled_from([None, slice(0, None, 2), slice(3, None)]))
def test_any_shape_against_the_reference(T, H, V, padding, seed, dtype, with_bias, skip):
    hidden, weight, bias, target = make(T, H, V + padding, dtype=dtype, seed=seed)
    with torch.no_grad():
        weight[V:] = 3e4  # padding rows that would win every softmax
    bias, target = bias if with_bias else None, torch.where(target < 0, target, target % V)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    got, want = (linear_logprob(hidden, weight, target, bias=bias, entropy=True, vocab_size=V, backend=name) for name in ("cpu", "reference"))
    assert_near(got, want, 4e-6)
    d_got, d_want = pull(got, inputs, skip), pull(want, inputs, skip)
    # a weight's gradient sums T products of rounded gradients of logits: what cancels in the sum does not cancel in its rounding
    assert_near(d_got, d_want, TOLERANCE[dtype], least=1e-3 if dtype == torch.float32 else 0.25 * T ** 0.5)
    assert not any(d[V:].any() for d in d_got[1:])


def raw(T, H, V, isa, dtype=torch.float32, main_grad=None, seed=3):
    """Raw statistics and gradients of the backend, as numbers that the choice of loops must not change."""
    hidden, weight, bias, target = (x.detach() for x in make(T, H, V, dtype=dtype, seed=seed))
    column, here = vocabulary.Shard(0, V, V, None).locate(target)
    found = torch.ops.sophiavl_cpu.statistics(hidden, weight, bias, column, here, V, 0.9, True, False, isa)
    whole = vocabulary.combine(found, None)
    g, h = torch.linspace(-1, 1, T).where(here, 0), torch.linspace(1, 0, T).where(here, 0)
    rest = (column, here, here, whole.top, whole.total, whole.logprob.where(here, 0), whole.entropy.where(here, 0), g, h, V, 0.9, None, True, True, True)
    return found, torch.ops.sophiavl_cpu.gradients(hidden, weight, bias, *rest, main_grad, isa)


@built
@pytest.mark.skipif(len(ISAS) < 2, reason="this processor has one set of loops")
@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("shape", [(65, 31, 1090), (200, 128, 64)])
def test_every_instruction_set_gives_the_same_numbers(isa, shape):
    (found, grads), (plain, plain_grads) = raw(*shape, isa), raw(*shape, "scalar")
    torch.testing.assert_close(found, plain, rtol=3e-6, atol=3e-6)
    assert_near(grads, plain_grads, 3e-6)


@built
@every_isa
def test_confident_tokens_lose_no_digits(isa, on_isa):
    on_isa(isa)
    hidden = torch.eye(3).requires_grad_()
    weight = torch.tensor([[50.0, 0.0, 7.0], [30.0, -40.0, -60.0], [28.5, -41.0, -80.0]])  # logits[t] = weight[:, t]
    got, _ = linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.long), backend="cpu")
    others = (weight[1:] - weight[:1]).double().exp().sum(0)
    torch.testing.assert_close(got.double(), -others.log1p(), rtol=1e-6, atol=0)
    identity = torch.eye(3).requires_grad_()
    moved = torch.autograd.grad(linear_logprob(identity, weight.T.contiguous().T, torch.zeros(3, dtype=torch.long), backend="cpu")[0].sum(), identity)[0]
    share = (weight - weight[:1]).double().exp() / (1 + others)  # [V, T]
    share[0] = -others / (1 + others)
    torch.testing.assert_close(moved.double(), -(share.T @ weight.double()), rtol=1e-5, atol=0)  # each row by itself: the third is 1e-24


@built
@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_banned_tokens_never_enter(isa, dtype, on_isa):
    on_isa(isa)
    hidden, weight, bias, target = make(40, 12, 200, dtype=dtype)
    banned = torch.arange(1, 200, 3)
    bias = bias.detach().index_fill(0, banned, -torch.inf).requires_grad_()
    target = torch.where(target < 0, target, target // 3 * 3)
    got, want = linear_logprob(hidden, weight, target, bias=bias, entropy=True, backend="cpu"), oracle(hidden, weight, bias, target)
    assert_near(got, want, 2e-6)
    d_hidden, d_weight, d_bias = pull(got, (hidden, weight, bias))
    assert not d_weight[banned].any() and not d_bias[banned].any() and d_hidden.isfinite().all()
    kept = [i for i in range(200) if i % 3 != 1]
    small = oracle(hidden, weight[kept], bias[kept], torch.tensor([kept.index(t) if t >= 0 else -100 for t in target]))
    assert_near((d_hidden, d_weight), pull(small, (hidden, weight)), TOLERANCE[dtype])


@built
@every_isa
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("active", [None, torch.arange(50)])
def test_ignored_rows_never_leak(isa, poison, active, on_isa):
    on_isa(isa)
    hidden, weight, bias, target = make(50, 8, 90)
    dead = (target == -100).nonzero()[:, 0]
    clean = linear_logprob(hidden, weight, target, bias=bias, entropy=True, backend="cpu")
    d_clean = pull(clean, (hidden, weight, bias))
    with torch.no_grad():
        hidden[dead] = poison
    got = linear_logprob(hidden, weight, target, bias=bias, entropy=True, active=active, backend="cpu")
    assert_near(got, clean, 1e-6)
    upstream = torch.randn(50).index_fill(0, dead, torch.nan)
    assert all(d.isfinite().all() for d in torch.autograd.grad(got[0], (hidden, weight, bias), upstream, retain_graph=True))
    assert_near(pull(got, (hidden, weight, bias)), d_clean, 1e-5)


@built
def test_nan_in_a_counted_row_is_loud():
    hidden, weight, _, target = make(20, 8, 90, ignore=False)
    with torch.no_grad():
        hidden[3] = torch.nan
    logprob, _ = linear_logprob(hidden, weight, target, backend="cpu")
    assert logprob[3].isnan() and logprob.isnan().sum() == 1


@built
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_main_grad_is_added_to(dtype):
    hidden, weight, _, target = make(80, 20, 300, dtype=dtype)
    start = torch.randn(300, 20)
    main_grad = start.clone()
    linear_logprob(hidden, weight, target, main_grad=main_grad, backend="cpu")[0].sum().backward()
    (want,) = torch.autograd.grad(oracle(hidden, wide := weight.detach().double().requires_grad_(), None, target)[0].sum(), wide)
    assert weight.grad is None
    assert_near((main_grad - start,), (want,), 2.0 ** -8 if dtype == torch.bfloat16 else 1e-5)


@built
def test_sums_over_tokens_are_not_rounded_to_bf16():
    """4,096 equal tokens: a bf16 running sum of d_weight would stop growing at 256 of them."""
    hidden, weight = torch.ones(4096, 2, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(4096, dtype=torch.long), backend="cpu")[0].sum().backward()
    assert weight.grad.tolist() == [[3072.0] * 2] + [[-1024.0] * 2] * 3


@built
def test_active_rows_alone_get_a_gradient_in_any_order():
    hidden, weight, bias, target = make(60, 9, 110, ignore=False)
    active = torch.tensor([57, 3, 2, 31])
    got = linear_logprob(hidden, weight, target, bias=bias, active=active, backend="cpu")[0]
    want = oracle(hidden, weight, bias, target)[0][active].sum()
    assert_near(torch.autograd.grad(got.sum(), (hidden, weight, bias)), torch.autograd.grad(want, (hidden, weight, bias)), 1e-5)


@built
def test_many_chunks_of_tokens_add_up():
    """Wide enough that the workspace holds 1,024 tokens at a time."""
    hidden, weight, _, target = make(2100, 5632, 70)
    got, want = ({name: linear_logprob(hidden, weight, target, backend=name)[0] for name in ("cpu", "reference")}[n] for n in ("cpu", "reference"))
    assert_near(torch.autograd.grad(got.sum(), (hidden, weight)), torch.autograd.grad(want.sum(), (hidden, weight)), 1e-5)


@built
def test_shards_add_up():
    hidden, weight, bias, target = make(90, 16, 256)
    parts, plain = [], {"temperature": 1.0, "entropy": True, "chunk": 1}
    for first in (0, 64, 128, 192):
        column, here = vocabulary.Shard(first, 64, 256, None).locate(target)
        rows = slice(first, first + 64)
        parts.append(cpu_logprob.statistics(hidden.detach(), weight.detach()[rows], bias.detach()[rows], column, here, valid=64, **plain))
    tops, sums, weighted, picked = torch.stack(parts).unbind(1)
    top = tops.amax(0)
    scale = (tops - top).exp()
    others, shifted = (scale * sums).sum(0), picked.amax(0) - top
    spread = (scale * (weighted + (tops - top) * sums)).sum(0) + shifted.exp() * shifted
    total = others + shifted.exp()
    live = target != -100
    assert_near(((shifted - total.log())[live], (total.log() - spread / total)[live]), [x[live] for x in oracle(hidden, weight, bias, target)], 1e-5)
    nothing = (hidden.detach(), weight.detach(), None, column, torch.zeros_like(here))
    assert torch.equal(cpu_logprob.statistics(*nothing, valid=0, **plain), reference_logprob.statistics(*nothing, valid=0, **plain))


@built
def test_threads_change_nothing_but_the_order_of_sums():
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(raw(300, 48, 2000, "auto", dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert_near(found[0][1], found[1][1], 2.0 ** -8)


@built
def test_active_rows_that_nobody_has_looked_at_are_checked_at_last(monkeypatch):
    """Under torch.compile contents are not read; a row that is not there must not be either."""
    monkeypatch.setattr(sys.modules["sophiavl_fast.kernels.linear_logprob"], "reads_contents", lambda *_: False)
    hidden, weight, _, target = make(4, 3, 5)
    for wrong in (4, -1):
        loss = linear_logprob(hidden, weight, target, active=torch.tensor([wrong]), backend="cpu")[0].sum()
        with pytest.raises(RuntimeError, match=rf"active = {wrong}: expected rows in \[0, 4\)"):
            loss.backward()


@built
def test_a_wish_that_cannot_be_met_says_why(on_isa):
    hidden, weight, _, target = make(4, 3, 5)
    with pytest.raises(ValueError, match=r"backend = 'cpu': it has no torch.float64"):
        linear_logprob(hidden.double(), weight.double(), target, backend="cpu")
    on_isa("sse9")
    with pytest.raises(ValueError, match=r"SOPHIAVL_CPU_ISA = 'sse9': expected auto \| scalar"):
        linear_logprob(hidden, weight, target, backend="cpu")


@pytest.fixture
def builder():
    spec = importlib.util.spec_from_file_location("build_cpu", CSRC / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, why", [
    (None, "not built"), ("libsophiavl_cpu-torch0.0.1-00000000.so", "built for another torch"),
    ("libsophiavl_cpu-torch{torch}-00000000.so", "older than its sources")])
def test_a_library_that_does_not_fit_is_never_loaded(name, why, tmp_path, monkeypatch):
    """Files that are no libraries at all: loading one would fail otherwise."""
    if name:
        (tmp_path / name.format(torch=torch.__version__)).write_text("no library")
    monkeypatch.setattr(cpu_logprob, "FOLDER", tmp_path)
    assert why in cpu_logprob.load_library.__wrapped__()


def test_no_compiler_is_one_line_and_no_failure_where_optional(tmp_path):
    env = {**os.environ, "CXX": "no-such-compiler"}
    for arguments, code in (["--optional"], 0), ([], 1):
        done = subprocess.run([sys.executable, str(CSRC / "build.py"), str(tmp_path), *arguments], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1 and "no C++ compiler (no-such-compiler)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_builds_from_source(builder, tmp_path):
    """A fresh build, loaded by a fresh process."""
    subprocess.run([sys.executable, str(CSRC / "build.py"), str(tmp_path)], check=True, timeout=600)
    library = tmp_path / builder.library_name(torch.__version__)
    script = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.sophiavl_cpu.isas())"
    assert "scalar" in subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120).stdout
