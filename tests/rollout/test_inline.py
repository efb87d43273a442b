"""The inline engine against Hugging Face: distribution, seeds, ends, weight transfer. One engine, reopened where a test breaks it."""
from __future__ import annotations

import dataclasses

import pytest
import torch

from sophiavl_fast.errors import EngineError, UserError
from tests.rollout import tiny
from tests.rollout.host import Host, open_engine

pytestmark = pytest.mark.engine
T = 1.3
HOT = {"n": 4, "step": 3, "seed": 7, "temperature": T, "max_new_tokens": 20}


def start(state, **rollout):
    """(Re)open the engine beside the default group that a policy would have made; returns what changed in the process."""
    import torch.distributed as dist

    if "engine" in state:
        state["engine"].close()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(11)
    before = (torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype())
    state["engine"] = open_engine(state["folder"], state["run_dir"], **rollout)
    after = (torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype())
    return [bool(torch.equal(a, b) if torch.is_tensor(a) else a is b or a == b) for a, b in zip(before, after)]


def reopen(state, rollout):
    start(state, **rollout)


def generate(state, prompts, settings):
    return state["engine"].generate(prompts, **settings)


def send(state, weights, version):
    return state["engine"].send(weights, version)


@pytest.fixture(scope="module")
def host(folder, tmp_path_factory):
    host = Host(folder, tmp_path_factory.mktemp("run"))
    assert all(host.call(start)), "opening the engine changed torch's random state, threads or default dtype"
    yield host
    host.close()


@pytest.fixture(scope="module")
def groups(host, prompts):
    return host.call(generate, prompts, HOT)


def test_prompts_beyond_one_engine_step(host, folder, model):
    """11,000 tokens where a step reads 8,192: a seeded request whose prompt is read in parts answers as it does with room."""
    prompts = [tiny.prompt(folder, f"part{i}", f"{i} " + "what is this? " * 18) for i in range(40)]
    assert sum(len(p.expanded_ids) for p in prompts) > 10_000
    once = HOT | {"n": 1}
    together = host.call(generate, prompts, once)
    apart = [group for first in range(0, 40, 10) for group in host.call(generate, prompts[first:first + 10], once)]
    assert [g.responses[0].token_ids for g in together] == [g.responses[0].token_ids for g in apart]
    assert tiny.worst_difference(model, together[28:34], T) < 1e-4


def test_logprobs_equal_hugging_face(groups, model):
    """Image, images of different sizes, text, long; temperature and bans applied; the folder's generation_config ignored."""
    assert tiny.worst_difference(model, groups, T) < 1e-4
    assert tiny.worst_difference(model, groups, 1.0) > 0.01, "the comparison cannot see a wrong temperature"


def test_samples_follow_the_distribution(host, prompts, model):
    from scipy.stats import chisquare

    runs = [host.call(generate, prompts[:1], HOT | {"n": 64, "max_new_tokens": 1, "step": s}) for s in range(40)]
    drawn = torch.tensor([r.token_ids[0] for [group] in runs for r in group.responses])
    counts = torch.bincount(drawn, minlength=tiny.VOCAB).double()

    def p_value(temperature):
        expected = tiny.distribution(model, prompts[0], [], temperature)[0].double().softmax(0) * len(drawn)
        rare = (expected < 5) & (expected > 0)
        expected, kept, rare = expected[expected > 0], counts[expected > 0], rare[expected > 0]
        pool = lambda x: torch.cat([x[~rare], x[rare].sum()[None]])[:None if rare.any() else -1].numpy()
        return chisquare(pool(kept), pool(expected)).pvalue

    assert p_value(T) > 1e-3
    assert p_value(1.0) < 1e-6, "the test has no power"


def test_banned_tokens_are_never_sampled(host, groups, prompts, model, folder):
    assert not {t for g in groups for r in g.responses for t in r.token_ids} & set(tiny.BANNED)
    more = [tiny.prompt(folder, f"ban{i}", f"{i}?") for i in range(12)]
    greedy = host.call(generate, more, HOT | {"temperature": 0.0, "n": 1, "max_new_tokens": 1})
    with torch.no_grad():
        free = [model(input_ids=torch.tensor([p.expanded_ids])).logits[0, -1].argmax().item() for p in more]
    assert set(free) & set(tiny.BANNED), "no prompt's best token is banned: the test is empty"
    assert [g.responses[0].token_ids[0] for g in greedy] == [tiny.distribution(model, p, [], 1.0)[0].argmax().item() for p in more]


def test_end_of_text_is_kept_when_sampled_and_absent_when_truncated(groups):
    responses = [r for g in groups for r in g.responses]
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for r in responses:
        ends = [t in tiny.STOP for t in r.token_ids]
        assert not any(ends[:-1]) and ends[-1] == (r.finish_reason == "stop")
        assert len(r.token_ids) == len(r.logprobs) == len(r.weight_versions) and (r.finish_reason == "stop" or len(r.token_ids) == 20)
        assert "<|im_end|>" not in r.text


def test_order_and_batch_size_change_nothing(host, groups, prompts):
    backwards = host.call(generate, prompts[::-1], HOT)[::-1]
    alone = [host.call(generate, [p], HOT)[0] for p in prompts]
    ids = lambda gs: [[r.token_ids for r in g.responses] for g in gs]
    assert ids(groups) == ids(backwards) == ids(alone)
    assert [[r.seed for r in g.responses] for g in groups] == [[r.seed for r in g.responses] for g in alone]
    other = host.call(generate, prompts, HOT | {"step": 4})
    assert all(a != b for a, b in zip(ids(groups), ids(other)))
    assert len({tuple(r.token_ids) for r in groups[0].responses}) == HOT["n"], "the samples of a group are copies"


def after_transfer(host, prompts, new, version, skip=None):
    """Sample, send other weights, sample again: the second samples."""
    host.call(generate, prompts, HOT)
    host.call(_skip_reset, skip)
    host.call(send, tiny.Weights(new), version)
    host.call(_skip_reset, None)
    return host.call(generate, prompts, HOT)


def _skip_reset(state, name):
    """Make one of the three cache resets do nothing (None: all work)."""
    engine = state["engine"]._engine
    for reset in ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):
        engine.__dict__.pop(reset, None)
    if name:
        setattr(engine, name, lambda: True)


def test_new_weights_are_sampled_from_after_a_transfer(host, prompts, folder, model):
    new = tiny.perturbed(folder, 1)
    groups = after_transfer(host, prompts, new, 5)
    assert tiny.worst_difference(new, groups, T) < 1e-4
    assert tiny.worst_difference(model, groups, T) > 0.01
    assert {v for g in groups for r in g.responses for v in r.weight_versions} == {5}


@pytest.mark.parametrize("reset", ["reset_prefix_cache", "reset_encoder_cache"])
def test_a_skipped_reset_would_show(host, prompts, folder, reset):
    new = tiny.perturbed(folder, 2 + len(reset))
    assert tiny.worst_difference(new, after_transfer(host, prompts, new, 6, skip=reset), T) > 1e-3
    assert tiny.worst_difference(new, after_transfer(host, prompts, new, 7), T) < 1e-4


def test_transfer_reports_its_phases(host, folder, model):
    times = host.call(send, tiny.Weights(model), 8)
    assert times["bytes"] == sum(p.numel() * 4 for p in model.parameters())
    assert set(times) == {"gather_s", "convert_s", "send_s", "load_s", "reset_s", "bytes"}


def test_another_prompt_than_the_trainers_is_refused(host, prompts):
    wrong = dataclasses.replace(prompts[0], expanded_ids=[*prompts[0].expanded_ids, 9])
    with pytest.raises(EngineError, match="another prompt 'tiny:one' than the trainer"):
        host.call(generate, [prompts[1], wrong], HOT)
    twice = dataclasses.replace(prompts[0], token_ids=prompts[0].expanded_ids)
    with pytest.raises(EngineError, match="tiny:one"):
        host.call(generate, [twice], HOT)
    assert len(host.call(generate, prompts[1:2], HOT)) == 1, "the engine is left usable"


def test_what_does_not_fit_is_refused(host, prompts, folder):
    with pytest.raises(UserError, match=r"'tiny:long'.*exceed the engine's 424"):
        host.call(generate, prompts[3:], HOT | {"max_new_tokens": 300})
    many = tiny.prompt(folder, "many", "?", [tiny.picture(i, 28, 28) for i in range(17)])
    with pytest.raises(UserError, match="'tiny:many' has 17 images; the engine takes at most 16"):
        host.call(generate, [many], HOT)


def _failing(state, prompts, settings):
    def fail(group):
        raise ValueError("from a callback")

    try:
        state["engine"].generate(prompts, on_group=fail, **settings)
    except ValueError:
        return state["engine"]._engine.has_unfinished_requests()


def test_a_failed_call_leaves_no_requests_behind(host, prompts, groups):
    assert host.call(_failing, prompts, HOT) is False


def _compiles(state):
    import torch._dynamo as dynamo

    counter = dynamo.testing.CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.ones(2))
    return counter.frame_count


def test_torch_compile_still_works_beside_the_engine(host):
    assert host.call(_compiles) == 1


def _corrupt(state, name):
    """One bit of one tensor changes on its way."""
    channel = state["engine"]._lane.channel
    honest = channel.send

    def send(bucket):
        changed = [(n, t.clone()) for n, t in bucket]
        dict(changed)[name].view(torch.int32).flatten()[3] ^= 1
        honest(changed)

    channel.send = send


@pytest.mark.parametrize("case, message", [
    ({"without": "model.language_model.layers.1.self_attn.k_proj.bias"}, "1 tensors were never sent: model.layers.1.self_attn.k_proj.bias"),
    ({"without": "model.visual.blocks.0.norm1.weight"}, "visual.blocks.0.norm1.weight"),
    ({"extra": "model.language_model.layers.7.mlp.up_proj.weight"}, "1 names it does not have: model.language_model.layers.7.mlp.up_proj.weight"),
])
def test_a_wrong_set_of_names_fails_loudly(host, prompts, model, case, message):
    host.call(reopen, {})
    with pytest.raises(EngineError, match=message):
        host.call(send, tiny.Weights(model, **case), 9)
    with pytest.raises(EngineError, match="unusable since weight transfer of version 9 failed"):
        host.call(generate, prompts, HOT)


def test_checksums_catch_one_changed_bit(host, model, prompts):
    host.call(reopen, {"checksum": True})
    host.call(send, tiny.Weights(model), 1)
    assert tiny.worst_difference(model, host.call(generate, prompts, HOT), T) < 1e-4
    host.call(_corrupt, "model.language_model.norm.weight")
    with pytest.raises(EngineError, match=r"1 tensors arrived changed: model\.language_model\.norm\.weight"):
        host.call(send, tiny.Weights(model), 2)
