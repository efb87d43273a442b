"""Dynamic sampling: groups without signal give way to fresh prompts, against a plain walk over the same stream; and a real run."""
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sophiavl_fast.config import build
from sophiavl_fast.config_checks import check
from sophiavl_fast.errors import UserError
from sophiavl_fast.recipes import sampling
from sophiavl_fast.types import Group, Prompt, Response, Scores
from tests.recipes.conftest import run

N = 3


def group(number: int, turn: int = 0) -> Group:
    responses = [Response(token_ids=[turn], logprobs=[-1.0], text="", finish_reason="stop", seed=0, weight_versions=[0]) for _ in range(N)]
    return Group(prompt=Prompt(id=str(number), dataset="d", problem_type="numerical", question="", gold=""), responses=responses)


def outcome(number: int) -> list[float]:
    """Two prompts of three say nothing: all right or all wrong. A response in the middle of its group has advantage 0 in a group that says something."""
    return [[1.0] * N, [0.0] * N, [1.0, 0.0, 0.5 if number % 2 else 1.0]][(number * 7 + number // 3) % 3]


def scored(groups: list[Group]) -> Scores:
    rows = [x for g in groups for x in outcome(int(g.prompt.id))]
    return Scores(outcome=torch.tensor(rows), format_ok=torch.ones(len(rows), dtype=torch.bool), thinking=torch.arange(len(rows)).float() * 0,
                  reasons={i: f"why {g.prompt.id}" for i, g in ((j * N, g) for j, g in enumerate(groups))}, killed=len(groups))


class Stream:
    """The loader's promise: counts over replicas are the next positions, in their order."""

    skipped = 0

    def __init__(self, first: int) -> None:
        self.cursor = first

    def fresh(self, counts, replica=0):
        first = self.cursor + sum(counts[:replica])
        self.cursor += sum(counts)
        return list(range(first, first + counts[replica]))


def rooms(config, stream, gather=lambda value: [value], replica=0, replicas=1):
    """What resampled asks of the rooms, with scores that are a function of the prompt."""
    @contextmanager
    def phase(name):
        yield SimpleNamespace(seconds=1.0)

    return SimpleNamespace(
        config=config, loader=stream, policy=SimpleNamespace(gather_replicas=gather, replica=replica, replicas=replicas), progress=SimpleNamespace(phase=phase),
        rewards=SimpleNamespace(score=scored, start=None), generate=lambda prompts, step, on_group, turn: [group(p, turn) for p in prompts],
        drawn=lambda step: {"skipped": stream.skipped})


def by_hand(first: int, prompts: int, rounds: int) -> tuple[list[int], int, list[int]]:
    """(prompts in their places, replaced, all that were sampled), from the definition."""
    silent = lambda p: len(set(outcome(p))) == 1
    places, position, replaced, seen = list(range(prompts)), first, 0, list(range(prompts))
    for _ in range(rounds):
        dead = [i for i, p in enumerate(places) if silent(p)]
        for i in dead:
            places[i] = position
            seen.append(position)
            position += 1
        replaced += len(dead)
    return places, replaced, seen


@pytest.mark.parametrize("rounds", [1, 2, 5, 40])
def test_silent_groups_are_replaced_in_their_places(rounds):
    config = build({"rollout": {"resample": rounds, "n": N, "prompts_per_step": 8}, "trust": {"mode": "off"}, "run": {"steps": 4}})
    stream = Stream(8)
    r = rooms(config, stream)
    start = [group(i) for i in range(8)]
    seen, sampled, _ = sampling.resampled(r, sampling.judged(r, start, scored(start), 1), 1)
    places, replaced, everything = by_hand(8, 8, rounds)
    assert [int(g.prompt.id) for g in seen.groups] == places
    assert seen.scores.outcome.tolist() == [x for p in places for x in outcome(p)]
    assert seen.scores.reasons == {i * N: f"why {p}" for i, p in enumerate(places)}
    assert seen.metrics["rollout/resampled"] == replaced and stream.cursor == 8 + replaced
    assert seen.metrics["rollout/silent"] == sum(len(set(outcome(p))) == 1 for p in places)
    assert seen.metrics["rollout/outcome"] == pytest.approx(sum(sum(outcome(p)) for p in everything) / (N * len(everything)))
    assert seen.scores.killed == len(everything)    # counted over all that was graded
    assert 1 <= sampled <= rounds and (rounds < 40 or seen.metrics["rollout/silent"] == 0)
    for g, part in zip(seen.groups, seen.weighted.advantage.split(N), strict=True):
        assert bool(part.any()) == (len(set(outcome(int(g.prompt.id)))) > 1)


def test_replicas_make_the_same_step_as_one_process():
    """Two leads, in threads, that meet where they gather."""
    from threading import Barrier, Thread

    config = build({"rollout": {"resample": 3, "n": N, "prompts_per_step": 8}, "trust": {"mode": "off"}, "run": {"steps": 4}})
    barrier, box, found = Barrier(2, timeout=60), {}, {}

    def lead(replica):
        def gather(value):
            box[replica] = value
            barrier.wait()
            both = [box[0], box[1]]
            barrier.wait()
            return both

        r = rooms(config, Stream(8), gather, replica, 2)
        start = [group(i) for i in range(4 * replica, 4 * replica + 4)]
        found[replica] = sampling.resampled(r, sampling.judged(r, start, scored(start), 1), 1)[0], r.loader.cursor

    threads = [Thread(target=lead, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places, replaced, _ = by_hand(8, 8, 3)
    assert [int(g.prompt.id) for i in (0, 1) for g in found[i][0].groups] == places
    assert {found[i][1] for i in (0, 1)} == {8 + replaced}
    assert found[0][0].metrics == found[1][0].metrics


@pytest.mark.parametrize("sections,message", [
    ({"rollout": {"resample": -1}}, "rollout.resample = -1"),
    ({"rollout": {"resample": 2, "staleness": 1}}, "rollout.staleness: 0"),
    ({"rollout": {"resample": 2}, "algorithm": {"normalize": "batch"}}, "algorithm.normalize: std or mean"),
    ({"rollout": {"resample": 2}, "debug": {"record": "x"}}, "debug.record"),
])
def test_what_it_cannot_go_with(sections, message):
    with pytest.raises(UserError, match=message):
        check(build({"model": {"path": "m"}, "data": {"train": "d"}, **sections}))


@pytest.mark.engine
def test_a_real_run_resamples_and_resumes_exactly(demo, rl, tmp_path):
    """Plain GRPO on the barely warmed model: many groups are all wrong. The same run, cut after its second step and resumed, is the same."""
    options = ["thinking.backend=off", "trust.mode=off", "eval.every=0", "rollout.resample=2", "rewards.overlong_cache=8", "rewards.overlong_max=32",
               "algorithm.kl_coef=0.0"]
    lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*rl(whole, *options))
    rows, metrics = lines(whole / "samples.jsonl"), lines(whole / "metrics.jsonl")
    assert sum(m["rollout/resampled"] for m in metrics) > 0
    for line in metrics:
        step = [r for r in rows if r["step"] == line["step"]]
        assert len(step) == 30
        silent = sum(not any(r["advantage"] for r in step if r["group"] == g) for g in range(6))
        assert line["rollout/silent"] == silent and (silent == 0 or line["rollout/resampled"] > 0)
    for r in rows:
        late = max(-1.0, min(0.0, (32 - 8 - r["response_tokens"]) / 8))
        assert r["overlong"] == pytest.approx(late, abs=1e-6) and r["total"] == pytest.approx(r["outcome"] + late, abs=1e-5)
    assert any(r["overlong"] < 0 for r in rows) and any(r["overlong"] == 0 for r in rows)
    run(*rl(cut, *options, "run.steps=2", "trust.anneal_steps=3"))
    run(*rl(cut, *options, "trust.anneal_steps=3"))
    same = lambda r: {k: v for k, v in r.items() if k not in ("trust_weight",)}
    assert [same(r) for r in lines(cut / "samples.jsonl")] == [same(r) for r in rows]
