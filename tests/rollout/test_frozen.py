"""Weights that never change travel once to each engine; what else is left out is still missed."""
from __future__ import annotations

import pytest
import torch

from sophiavl_fast.errors import EngineError
from tests.rollout import tiny
from tests.rollout.host import Host
from tests.rollout.test_inline import HOT, T, generate, reopen

pytestmark = pytest.mark.engine


class Frozen(tiny.Weights):
    """A source whose vision tower never changes; trained: what of the rest the second pass leaves out."""

    def __init__(self, model, forgotten: str = "") -> None:
        super().__init__(model)
        self.frozen, self.forgotten = frozenset(n for n, _ in self.named if ".visual." in n), forgotten

    def weights(self, *, trained_only: bool = False):
        yield from (pair for pair in self.named if not trained_only or (pair[0] not in self.frozen and pair[0] != self.forgotten))


def trained(folder, seed: int):
    """The model with noise on all but the vision tower."""
    model, noise = tiny.load(folder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".visual." not in name:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model


def sleep(state):
    state["engine"].sleep()
    return state["engine"]._engine.is_sleeping()


def names_sent(state, model, version):
    """Names that go out, and whether the engine sleeps afterwards."""
    source, sent = Frozen(model), []
    plain = source.weights
    source.weights = lambda **kind: ((sent.append(name), (name, tensor))[1] for name, tensor in plain(**kind))
    times = state["engine"].send(source, version)
    return sent, "wake_s" in times, state["engine"]._engine.is_sleeping()


def send(state, model, version, forgotten=""):
    return state["engine"].send(Frozen(model, forgotten), version)


def claim(state, nonce):
    """Another run takes the engine, after a transfer that broke off."""
    state["engine"]._transfer.broken = ""
    state["engine"]._lane.control.rpc("sophia_claim", nonce, tiny.BANNED)
    state["engine"]._transfer.nonce = nonce


@pytest.fixture(scope="module")
def host(folder, tmp_path_factory):
    host = Host(folder, tmp_path_factory.mktemp("run"))
    host.call(reopen, {"sleep": True})
    yield host
    host.close()


def test_the_tower_travels_once_and_answers_stay_exact(host, prompts, folder, model):
    every = sum(p.numel() * 4 for p in model.parameters())
    tower = sum(p.numel() * 4 for n, p in model.named_parameters() if ".visual." in n)
    other = tiny.perturbed(folder, 3)                       # the tower that stays is not the folder's own
    assert host.call(send, other, 1)["bytes"] == every
    new = trained(folder, 1)
    new.model.visual.load_state_dict(other.model.visual.state_dict())
    assert host.call(send, new, 2)["bytes"] == every - tower > 0
    groups = host.call(generate, prompts, HOT)
    assert tiny.worst_difference(new, groups, T) < 1e-4 < 1e-2 < tiny.worst_difference(trained(folder, 1), groups, T)
    assert {v for g in groups for r in g.responses for v in r.weight_versions} == {2}


def test_what_sleeps_keeps_its_tower(host, prompts, folder):
    """Its weights lie in host memory meanwhile, so that the frozen ones need not come again; and it answers as before without any."""
    old, newer = tiny.perturbed(folder, 3), trained(folder, 4)
    newer.model.visual.load_state_dict(old.model.visual.state_dict())
    host.call(send, old, 21)
    before = host.call(generate, prompts, HOT)
    assert host.call(sleep)
    assert [g.responses for g in host.call(generate, prompts, HOT)] == [g.responses for g in before]
    assert host.call(sleep)
    names, woken, sleeps = host.call(names_sent, newer, 22)
    assert sorted(names) == sorted(n for n, _ in newer.named_parameters() if ".visual." not in n)
    assert woken and not sleeps
    assert tiny.worst_difference(newer, host.call(generate, prompts, HOT), T) < 1e-4


def test_a_trained_tensor_that_is_left_out_is_missed(host, model):
    host.call(send, model, 4)
    with pytest.raises(EngineError, match=r"1 tensors were never sent: model\.layers\.1\.mlp\.up_proj\.weight"):
        host.call(send, model, 5, "model.language_model.layers.1.mlp.up_proj.weight")


def test_an_engine_that_was_never_sent_them_refuses_to_keep_them(host, model):
    """As after another run has used it, or where the trainer is wrong about what an engine has."""
    host.call(claim, "another-run")
    with pytest.raises(EngineError, match=r"weights were to be kept that this run never sent, such as visual\."):
        host.call(send, model, 6)
