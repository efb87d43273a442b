"""Log-probs and gradients against plain transformers, one row a response, fp32."""
import math

import pytest
import tiny
import torch

from sophiavl_fast.errors import UserError

LOGPROB, GRADIENT = 1e-5, 1e-5


def weighted_sum(batches, weights):
    """A loss that needs every target's gradient: sum of w_t * logprob_t, with w in the groups' order."""
    by_row = iter(weights.split([len(b.target) for b in batches]))

    def loss(batch, logprob, entropy):
        value = (logprob * next(by_row)).sum()
        return value, value.detach()[None]

    return loss


def reference(folder, groups, weights, **options):
    """HF's log-probs [T] and gradients by published name."""
    model = tiny.hf(folder)
    logprob = torch.cat([x for g in groups for x in tiny.hf_logprobs(model, g, **options)])
    (logprob * weights).sum().backward()
    name = lambda n: n.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    return logprob.detach(), {name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


def draw(groups):
    return torch.randn(sum(len(r.token_ids) for g in groups for r in g.responses), generator=torch.Generator().manual_seed(9))


def worst(found, expected):
    """Largest relative gradient difference over all parameters; the two must name the same ones."""
    assert set(found) == set(expected)
    return max(((found[n] - g).norm() / g.norm().clamp_min(1e-8)).item() for n, g in expected.items())


def gradients(policy, batches, weights):
    policy.update(batches, weighted_sum(batches, weights))
    return {n: g.clone() for n, g in policy.gradients()}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_matches_hf(folder, tied_folder, create, share, tied):
    path, groups = tied_folder if tied else folder, tiny.groups()
    weights = draw(groups)
    logprob, expected = reference(path, groups, weights)
    policy = create(path, policy={"share_prompt": share}, optim={"clip_grad": 0.0})
    batches = policy.pack(groups, None)
    assert (torch.cat(policy.logprobs(batches)) - logprob).abs().max() < LOGPROB
    assert worst(gradients(policy, batches, weights), expected) < GRADIENT


def test_shared_prompt_packs_fewer_tokens(folder, create):
    groups = tiny.groups()
    size = {share: sum(len(b.tokens) for b in create(folder, policy={"share_prompt": share}).pack(groups, None)) for share in (True, False)}
    prompts = [len(g.prompt.expanded_ids) for g in groups]
    assert size[False] - size[True] == sum(p * (len(g.responses) - 1) for p, g in zip(prompts, groups))


def test_temperature_and_bans_are_the_samplers(folder, create):
    groups, banned = tiny.groups(), [1, 111, 115, tiny.IMAGE, 130]
    logprob, _ = reference(folder, groups, draw(groups), temperature=0.7, banned=banned)
    policy = create(folder, banned_ids=banned, temperature=0.7)
    assert (torch.cat(policy.logprobs(policy.pack(groups, None))) - logprob).abs().max() < LOGPROB


@pytest.mark.parametrize("budget", [1, 75, 100, 10_000])
def test_micro_batches_do_not_change_gradients(folder, create, budget):
    groups = tiny.groups()
    weights = draw(groups)
    expected = gradients(policy := create(folder, optim={"clip_grad": 0.0}), policy.pack(groups, None), weights)
    policy = create(folder, optim={"clip_grad": 0.0}, policy={"tokens_per_row": budget})
    batches = policy.pack(groups, None)
    assert len(batches) == {1: 4, 75: 3, 100: 2, 10_000: 1}[budget]
    assert worst(gradients(policy, batches, weights), expected) < GRADIENT


def test_order_neighbours_and_padding_change_nothing(folder, create):
    """Groups in another order, responses in another order, a neighbour's image exchanged, padding appended."""
    policy, groups = create(folder), tiny.groups()
    (plain,) = policy.logprobs(policy.pack(groups, None))
    by_group = dict(zip("abcd", plain.split([sum(len(r.token_ids) for r in g.responses) for g in groups])))
    (moved,) = policy.logprobs(policy.pack([groups[i] for i in (2, 0, 3, 1)], None))
    assert (moved - torch.cat([by_group[k] for k in "cadb"])).abs().max() < LOGPROB

    group = groups[2]
    (alone,) = policy.logprobs(policy.pack([group], None))
    group.responses.reverse()
    (turned,) = policy.logprobs(policy.pack([group], None))
    sizes = [len(r.token_ids) for r in group.responses]
    assert (torch.cat(list(reversed(turned.split(sizes)))) - alone).abs().max() < LOGPROB
    group.responses.reverse()

    groups[1].prompt.pixel_values = groups[1].prompt.pixel_values + 1
    (exchanged,) = policy.logprobs(policy.pack(groups, None))
    parts = dict(zip("abcd", exchanged.split([len(by_group[k]) for k in "abcd"])))
    assert max((parts[k] - by_group[k]).abs().max() for k in "acd") < LOGPROB
    assert (parts["b"] - by_group["b"]).abs().max() > 1e-3

    (batch,) = policy.pack(groups, None)
    batch.tokens = torch.cat([batch.tokens, torch.zeros(13, dtype=torch.int64)])
    batch.position_ids = torch.cat([batch.position_ids, torch.zeros(3, 13, dtype=torch.int64)], 1)
    assert (policy.logprobs([batch])[0] - exchanged).abs().max() < LOGPROB


def test_text_only_micro_batches_leave_the_tower_alone(folder, create):
    policy, groups = create(folder), [tiny.groups()[2]]
    found = gradients(policy, policy.pack(groups, None), draw(groups))
    assert all(not g.any() for n, g in found.items() if n.startswith("visual."))
    assert all(g.any() for n, g in found.items() if n.startswith("model.layers."))


def test_frozen_vision_moves_nothing_else_differently(folder, create):
    groups = tiny.groups()
    weights = draw(groups)
    _, expected = reference(folder, groups, weights)
    policy = create(folder, model={"freeze_vision": True}, optim={"clip_grad": 0.0})
    before = {n: t.clone() for n, t in policy.weights()}
    found = gradients(policy, policy.pack(groups, None), weights)
    assert worst(found, {n: g for n, g in expected.items() if not n.startswith("visual.")}) < GRADIENT
    moved = {n for n, t in policy.weights() if not torch.equal(t, before[n])}
    assert moved == set(found)


def test_recompute_gives_the_same_gradients(folder, create):
    groups = tiny.groups()
    weights = draw(groups)
    _, expected = reference(folder, groups, weights)
    policy = create(folder, policy={"recompute": True, "tokens_per_row": 100}, optim={"clip_grad": 0.0})
    assert worst(gradients(policy, policy.pack(groups, None), weights), expected) < GRADIENT


def test_bf16_stays_near_fp32(folder, create):
    """bf16 weights and activations, fp32 log-probs, main weights and gradients."""
    groups = tiny.groups()
    (exact,) = (policy := create(folder)).logprobs(policy.pack(groups, None))
    policy = create(folder, model={"dtype": "bfloat16"})
    batches = policy.pack(groups, None)
    (rough,) = policy.logprobs(batches)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.1
    found = gradients(policy, batches, draw(groups))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert all(t.dtype == torch.bfloat16 for _, t in policy.weights())


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
def test_compare_hf_sees_the_live_weights(tied_folder, create, share):
    policy = create(tied_folder, policy={"share_prompt": share, "tokens_per_row": 100}, banned_ids=[1, 115], temperature=0.8)
    batches, groups = policy.pack(tiny.groups(), None), tiny.groups()
    before = policy.logprobs(batches)
    assert policy.compare_hf(batches, before) < LOGPROB
    policy.update(batches, weighted_sum(batches, draw(groups)))
    after = policy.logprobs(batches)
    assert policy.compare_hf(batches, after) < LOGPROB
    assert policy.compare_hf(batches, before) > 1e-4
    for spoilt in range(len(after)):
        assert math.isinf(policy.compare_hf(batches, [x * math.nan if i == spoilt else x for i, x in enumerate(after)])), "NaN is no agreement"


def test_inactive_rows_cost_no_backward_pass_and_change_nothing(folder, create):
    """Targets without a gradient may be left out by name; what is left out has none, whatever the loss says."""
    groups = tiny.groups()
    weights = draw(groups)
    weights[::3] = 0
    expected = gradients(policy := create(folder, optim={"clip_grad": 0.0}), policy.pack(groups, None), weights)

    def named(rows):
        policy = create(folder, optim={"clip_grad": 0.0}, policy={"tokens_per_row": 75})
        batches = policy.pack(groups, None)
        parts = {id(b): w for b, w in zip(batches, weights.split([len(b.target) for b in batches]), strict=True)}
        policy.update(batches, weighted_sum(batches, weights), active=lambda batch: rows(parts[id(batch)].nonzero()[:, 0]))
        return {n: g.clone() for n, g in policy.gradients()}

    assert worst(named(lambda rows: rows), expected) < GRADIENT
    assert all(not g.any() for g in named(lambda rows: rows[:0]).values())


def test_a_kernel_that_this_device_lacks_is_refused_by_name(folder, create):
    with pytest.raises(UserError, match=r"policy\.kernels: backend = 'triton': it needs a CUDA device"):
        create(folder, policy={"kernels": "triton"})
    create(folder, policy={"kernels": "reference"})
