"""linear_logprob and logits_logprob as citizens of PyTorch: torch.library, torch.compile, activation checkpointing, autocast."""
from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from sophiavl_fast.kernels import dispatch, grpo_loss, linear_logprob, logits_logprob
from sophiavl_fast.kernels import triton_logprob_plans as plans
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

OPS = torch.ops.sophiavl
T, H, V = 9, 6, 21


@pytest.fixture(autouse=True, scope="module")
def _reference():
    """Where the C++ kernel was built it would answer in the reference's place; it has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOPHIAVL_KERNELS", "reference")
        yield


def inputs(*, bias=True, grad=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    hidden, weight, offset = torch.randn(T, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype), torch.randn(V, generator=g)
    target = torch.randint(0, V - 2, (T,), generator=g)
    target[2] = -100
    tensors = [hidden, weight, offset if bias else None]
    return [None if x is None else x.requires_grad_(grad) for x in tensors], target


def whole(hidden, weight, bias, target):
    """The arguments between `here` and the options, as the public op makes them."""
    logits = (hidden @ weight.T + (0 if bias is None else bias))[:, : V - 2].detach()
    live, logp = target != -100, logits.log_softmax(1)
    column = target.where(live, 0)
    top = logits.amax(1)
    parts = (live, top.where(live, torch.inf), (logits - top[:, None]).exp().sum(1), logp.gather(1, column[:, None])[:, 0].where(live, 0),
             -(logp.exp() * logp).sum(1).where(live, 0))
    return column, live, parts


COMMON = [(None, 0.8, V - 2, 1024, "reference"), (torch.tensor(0.8), 1.0, V - 2, 4, "auto")]


@pytest.mark.parametrize("common", COMMON, ids=["number", "tensor"])
@pytest.mark.parametrize("projected", [True, False])
def test_opcheck(common, projected):
    (hidden, weight, bias), target = inputs(bias=projected)
    column, live, parts = whole(hidden, weight, bias, target)
    head = (hidden, weight, bias) if projected else ((hidden @ weight.T).detach().requires_grad_(), None, None)
    plain = tuple(x if x is None else x.detach() for x in head)
    torch.library.opcheck(OPS.logprob_statistics, (*plain, column, live, True, *common))
    g, h = torch.randn(T).where(live, 0), torch.randn(T).where(live, 0)
    active, main_grad = (torch.tensor([0, 4, 5]), torch.zeros(V, H)) if projected else (None, None)
    torch.library.opcheck(OPS.logprob_gradients, (*plain, column, live, *parts, g, h, active, main_grad, True, projected, projected, *common))
    torch.library.opcheck(OPS.logprob_gradients, (*plain, column, live, *parts, g, None, None, None, True, False, False, *common))
    torch.library.opcheck(OPS.logprob_attach, (*head, column, live, *parts, None, None, True, False, *common))
    if not projected:
        torch.library.opcheck(OPS.logits_gradients_, (plain[0].clone(), column, live, *parts, g, h, *common))


def run(hidden, weight, bias, target, **options):
    logprob, entropy = linear_logprob(hidden, weight, target, bias=bias, temperature=0.7, vocab_size=V - 2, entropy=True, **options)
    return (logprob * 1.5 + entropy * 0.3).sum()


def grads(loss, tensors):
    return torch.autograd.grad(loss, [x for x in tensors if x is not None])


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class Frames:
    """A torch.compile backend that counts the graphs it is given, and the ops of ours in them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example):
        def keep(module, _):
            # a mutating op stands among the arguments of auto_functionalized
            named = [f"{node.target} {node.args}" for node in module.graph.nodes]
            self.graphs.append([name for name in named if "sophiavl" in name])
            return module.forward

        return aot_autograd(fw_compiler=lambda m, x: make_boxed_func(keep(m, x)))(graph, example)


@pytest.mark.parametrize("main_grad", [False, True])
def test_compiles_in_one_graph(main_grad):
    """fullgraph: a graph break would raise. The forward graph holds the statistics, the backward graph the gradients."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tensors, target = inputs()
    frames = Frames()
    compiled = torch.compile(run, backend=frames, fullgraph=True)
    options = [{"main_grad": torch.ones(V, H)} if main_grad else {} for _ in range(2)]
    chosen = [tensors[0], tensors[2]] if main_grad else tensors
    want = grads(run(*tensors, target, **options[0]), chosen)
    for _ in range(2):
        got = grads(compiled(*tensors, target, **options[1]), chosen)
        assert_equal(got, want)
    assert [any("statistics" in t for t in g) for g in frames.graphs] == [True, False]
    assert [any("gradients" in t for t in g) for g in frames.graphs] == [False, True]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if main_grad:
        once = options[0]["main_grad"] - 1
        assert once.any()
        torch.testing.assert_close(options[1]["main_grad"], 1 + 2 * once)


def test_numbers_may_change_in_one_graph():
    """From the second value on torch.compile makes symbols of them; the argument checks must take those."""
    torch._dynamo.reset()
    (hidden, weight, _), target = inputs()
    f = lambda x, temperature, chunk, coefficient: grpo_loss(
        linear_logprob(x, weight, target, temperature=temperature, chunk=chunk)[0], torch.ones(1), torch.tensor([0, T]), kl_coef=coefficient,
        ref_logprob=torch.zeros(T), denominator=temperature, backend="reference")[0]
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    for numbers in ((0.7, 3, 0.1), (0.8, 4, 0.2), (0.9, 5, 0.3)):
        torch.testing.assert_close(compiled(hidden, *numbers), f(hidden, *numbers))


def test_logits_compile_in_one_graph():
    torch._dynamo.reset()
    target = inputs()[1]
    logits = torch.randn(T, V, requires_grad=True)
    f = lambda x: logits_logprob(x * 1.0, target, temperature=torch.tensor(0.9), vocab_size=V - 2, inplace=True)[0].sum()
    frames = Frames()
    got = torch.autograd.grad(torch.compile(f, backend=frames, fullgraph=True)(logits), logits)
    assert_equal(got, torch.autograd.grad(f(logits), logits))
    assert len(frames.graphs) == 2 and all(frames.graphs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    tensors, target = inputs()
    want = grads(run(*tensors, target), tensors)
    kept = [torch.ones(V, H), torch.ones(V, H)]
    assert_equal(grads(checkpoint(run, *tensors, target, use_reentrant=False), tensors), want)
    for main_grad, wrapped in zip(kept, (False, True)):
        loss = (lambda h: run(h, tensors[1], tensors[2], target, main_grad=main_grad))  # noqa: B023
        (checkpoint(loss, tensors[0], use_reentrant=reentrant) if wrapped else loss(tensors[0])).backward()
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)
    torch.testing.assert_close(kept[0] - 1, want[1], rtol=1e-5, atol=1e-5)


def test_autocast_rounds_nothing():
    tensors, target = inputs()
    want = grads(run(*tensors, target), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(*tensors, target)
        inside = grads(run(*tensors, target), tensors)
    assert torch.equal(loss, run(*tensors, target))
    for got in (grads(loss, tensors), inside):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_main_grad_of_micro_batches_in_any_order():
    """Two forward passes before the first backward pass: main_grad has changed meanwhile, which is no damage."""
    tensors, target = inputs()
    main_grad = torch.zeros(V, H)
    losses = [run(tensors[0] * s, tensors[1], tensors[2], target, main_grad=main_grad) for s in (1.0, 0.5)]
    for loss in losses:
        loss.backward()
    want = sum(grads(run(tensors[0] * s, tensors[1], tensors[2], target), [tensors[1]])[0] for s in (1.0, 0.5))
    torch.testing.assert_close(main_grad, want, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_an_error():
    tensors, target = inputs()
    (first,) = torch.autograd.grad(run(*tensors, target), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_without_gradients_nothing_is_kept():
    tensors, target = inputs()
    with torch.no_grad():
        assert not linear_logprob(*tensors[:2], target)[0].requires_grad
    detached = [x.detach() for x in tensors]
    assert not run(*detached, target).requires_grad


def test_wishes_that_cannot_be_met(monkeypatch):
    (hidden, weight, _), target = inputs()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend = 'triton': it needs a CUDA device \(or TRITON_INTERPRET=1"):
        linear_logprob(hidden, weight, target, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"backend = 'triton': it computes in float32; float64 needs backend='reference'"):
        linear_logprob(hidden.double(), weight.double(), target, backend="triton")
    with pytest.raises(ValueError, match="backend = 'triton': TRITON_INTERPRET=1 came after Triton was imported"):
        linear_logprob(hidden, weight, target, backend="triton")
    monkeypatch.setenv("SOPHIAVL_KERNELS", "cpu")
    # the variable speaks for all ops, of which one has a C++ kernel
    assert dispatch.resolve("logits_logprob", "auto", torch.device("cpu"), torch.float32) == "reference"
    with pytest.raises(ValueError, match="SOPHIAVL_KERNELS = 'cpu': grpo_loss has no such backend in this build; available: reference, triton"):
        dispatch.resolve("grpo_loss", "auto", torch.device("cuda"), torch.float32)
    with pytest.raises(ValueError, match="backend = 'cpu': logits_logprob has no such backend in this build; available: triton, reference"):
        logits_logprob(hidden, target.clamp(max=H - 1), backend="cpu")


def test_every_plan_is_sound():
    """What the kernels take for granted: row tiles end on packed rows' alignment, steps and columns divide a vocabulary tile."""
    for plan in (*plans.PLANS.values(), plans.UNALIGNED):
        for tile in (plan.logits, plan.gradient, plan.hidden, plan.weight):
            assert plans.ALIGN % tile.rows == 0 and plans.ALIGN % tile.depth == 0 and plans.SPAN_STEP % tile.columns == 0
            assert plans.SPAN_STEP % tile.rows == 0 and plans.SPAN_STEP % tile.depth == 0
    assert plans.LEAST_SPAN % plans.SPAN_STEP == 0
    assert {(arch, size, few) for arch in (80, 90) for size in (2, 4) for few in (True, False)} - plans.PLANS.keys() == {(90, 4, True), (90, 4, False)}


@pytest.mark.parametrize(("rows", "valid", "span"), [(16384, 152064, 5888), (16384, 300, 512), (65536, 152064, 4096), (128, 152064, 152064), (1, 1, 256)])
def test_vocabulary_tiles(rows, valid, span):
    """5,888 columns of 16,384 bf16 rows are 193 MB; never wider than the vocabulary, never narrower than 4,096 of a wide one."""
    assert plans.columns_at_once(rows, valid, 2, plans.GRADIENT_BYTES, plans.LEAST_SPAN) == span


def test_peak_memory_at_the_size_it_was_designed_for():
    """Packed rows 117.4 MB + fp32 sums 234.9 MB + gradient tile 192.9 MB + vectors and lists 0.5 MB."""
    assert round(plans.gradient_bytes(16384, 3584, 152064, 2) / 1e5) == round(1174.4 + 2348.8 + 1929.4 + 4.6) < 6000


class TestInPlace:
    def logits(self, scale=1.0):
        leaf = torch.randn(T, V, generator=torch.Generator().manual_seed(5), requires_grad=True)
        return leaf, leaf * scale

    def test_the_buffer_becomes_the_gradient(self):
        leaf, logits = self.logits()
        target = inputs()[1]
        want = torch.autograd.grad(logits_logprob(leaf, target, entropy=True, vocab_size=V - 2)[0].sum(), leaf)
        values, where = logits.detach().clone(), logits.data_ptr()
        seen = []
        logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
        loss = logits_logprob(logits, target, entropy=True, vocab_size=V - 2, inplace=True)[0].sum()
        assert torch.equal(logits, values)
        assert_equal(torch.autograd.grad(loss, leaf), want)
        assert seen == [where] and not torch.equal(logits, values)

    def test_a_second_backward_pass_is_an_error(self):
        _, logits = self.logits()
        loss = logits_logprob(logits, inputs()[1], inplace=True)[0].sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward pass"):
            loss.backward()

    def test_a_second_reader_is_an_error(self):
        _, logits = self.logits()
        a = logits_logprob(logits, inputs()[1], inplace=True)[0].sum()
        b = logits_logprob(logits, inputs()[1], inplace=True)[0].sum()
        a.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            b.backward()

    def test_leaves_and_strided_logits_are_refused(self):
        leaf, logits = self.logits()
        with pytest.raises(ValueError, match="inplace = True: expected False for a leaf"):
            logits_logprob(leaf, inputs()[1], inplace=True)
        with pytest.raises(ValueError, match="contiguous"):
            logits_logprob(logits[:, :-1], inputs()[1].clamp(max=V - 2), inplace=True)
