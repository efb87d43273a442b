"""Trust-GRPO's and the warm-up's loops on a CUDA device that is not there (tests/pretend_cuda.py), from written-down responses: the CPU's metrics."""
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import pytest

from sophiavl_fast import config as tree
from sophiavl_fast.data.demo import generate, tiny_model
from sophiavl_fast.data.loader import Loader
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import EngineError
from sophiavl_fast.recipes import probe, rl, sft
from sophiavl_fast.types import Response
from tests.pretend_cuda import pretended_cuda
from tests.recipes.test_rl import by_variance, lines
from tests.rewards.helpers import chat, judge_server

ROOT = Path(__file__).resolve().parent.parent.parent
TIMES = ("time/", "mem/", "_per_s", "rollout/probe")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Data, an untrained policy and judge, and made-up responses to the first two steps' prompts."""
    folder = tmp_path_factory.mktemp("demo")
    generate.write(folder / "data", 3, lambda rows, label, total: rows, scale=0.02)
    for name, seed in (("init", 3), ("judge", 4)):
        tiny_model.build(folder / name, seed)
    config = rl_config(folder, folder / "unused", "cpu")
    processor = Processor(config.model.path)
    loader = Loader.open(config, processor)
    (folder / "replay").mkdir()
    for step in (1, 2):
        lines = []
        for prompt in loader.next(config.rollout.prompts_per_step):
            responses = []
            for i, text in enumerate((f"<think>{prompt.process}</think><answer>{prompt.gold}</answer>", "<think>1</think><answer>1</answer>", "7")):
                ids = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], processor.stop_ids[0]]
                responses.append(Response(token_ids=ids, logprobs=[-3.0] * len(ids), text=text, finish_reason="stop", seed=i,
                                          weight_versions=[step - 1] * len(ids)))
            lines.append(json.dumps({"id": prompt.id, "responses": [asdict(r) for r in responses]}) + "\n")
        (folder / f"replay/step_{step}-0.jsonl").write_text("".join(lines))
    loader.close()
    return folder


def rl_config(folder, out, device, *more):
    return tree.load(ROOT / "configs/demo.yaml", [
        f"data.registry={folder}/data/dataset_info.json", f"run.dir={out}", f"model.path={folder}/init", f"thinking.path={folder}/judge", f"device={device}",
        "run.steps=2", "rollout.prompts_per_step=4", "rollout.n=3", "rollout.max_logprob_diff=null", "eval.every=0",
        "checkpoint.every=1", "algorithm.kl_coef=0.04",
        f"debug.replay={folder}/replay", "monitor.tensorboard=false", "policy.kernels=reference", "optim.eps=1e-2", *more])


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if isinstance(v, float) and not any(t in k for t in TIMES)} for row in rows]


@pytest.mark.parametrize("more", [["policy.offload_optimizer=true", "thinking.samples=3", "trust.mode=variance", "debug.compare_hf=true"],
                                  pytest.param(["algorithm.epochs=2", "algorithm.mini_batches=2", "thinking.score=parse"], marks=pytest.mark.slow)],
                         ids=["one update", "several"])
def test_trust_grpo(demo, tmp_path, more):
    rl.train(rl_config(demo, tmp_path / "cpu", "cpu", *more))
    with pretended_cuda():
        rl.train(rl_config(demo, tmp_path / "cuda", "cuda", *more))
    cpu, cuda = metrics(tmp_path / "cpu"), metrics(tmp_path / "cuda")
    assert len(cuda) == 2 and "policy/grad_norm" in cuda[0]
    for a, b in zip(cpu, cuda, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5, nan_ok=True)
    assert len((tmp_path / "cuda/samples.jsonl").read_text().splitlines()) == 24
    assert all((tmp_path / "cuda" / name).exists() for name in ("report.html", "hf/model.safetensors", "checkpoints/step_2/manifest.json"))


def test_a_replay_by_another_policy_says_so(demo, tmp_path):
    """Nothing of an engine, of which it has none. Here the responses are nobody's: their log-probs are made up."""
    with pytest.raises(EngineError) as told:
        rl.train(rl_config(demo, tmp_path / "run", "cpu", "rollout.max_logprob_diff=0.01"))
    line = str(told.value)
    assert line.startswith(f"step 1: the policy differs from the one that sampled the recording '{demo}/replay', in a token's log-prob by ")
    assert "optim.lr" in line and "rollout.max_logprob_diff=null goes on" in line and "engine" not in line
    with pytest.raises(EngineError, match=r"step 2: trainer and rollout engine disagree on a sampled token.s log-prob by 0\.5 "):
        probe.require_agreement(0.5, tree.build({"rollout": {"max_logprob_diff": 0.01}}), 2)


def test_where_nothing_is_trained_there_is_no_rate_of_it(demo, tmp_path):
    """debug.rollout_only, here on recorded responses, which `train` would refuse: no engine is at hand."""
    config = rl_config(demo, tmp_path / "run", "cpu")
    config.debug.rollout_only = True
    assert rl.train(config) == 0
    found = lines(tmp_path / "run/metrics.jsonl")
    assert len(found) == 2 and all(m["train/tokens_per_s"] is None and m["rollout/tokens_per_s"] > 0 and "loss" not in m for m in found)


def test_several_scores_a_response_are_in_the_samples(demo, tmp_path):
    """trust.mode: variance: gamma, reward, advantage and the metrics follow from samples.jsonl alone; a score that could not be had is null there."""
    reply = lambda handler, body, number: handler.reply(chat("?" if body["seed"] % 11 == 0 else f"0.{body['seed'] % 10}"))
    with judge_server(reply) as server:
        rl.train(rl_config(demo, tmp_path / "run", "cpu", "thinking.backend=endpoint", f"thinking.url={server.url}", "thinking.model=judge",
                           "thinking.samples=3", "trust.mode=variance", "thinking.quorum=0.5"))
    rows, found = lines(tmp_path / "run/samples.jsonl"), {m["step"]: m for m in lines(tmp_path / "run/metrics.jsonl")}
    assert all(len(row["thinking_scores"]) == 3 for row in rows)
    assert any(None in row["thinking_scores"] for row in rows) and any(len(set(row["thinking_scores"])) > 1 for row in rows)
    gammas, scored = defaultdict(list), defaultdict(list)
    groups = defaultdict(list)
    for row in rows:
        groups[row["step"], row["group"]].append(row)
    for (step, _), group in groups.items():
        gamma, total, advantage = by_variance([r["outcome"] for r in group], [r["thinking_scores"] for r in group], group[0]["trust_weight"], quorum=0.5)
        for row, g, t, a in zip(group, gamma, total, advantage, strict=True):
            assert row["gamma"] == (g if g is None else pytest.approx(g, rel=1e-5))
            assert (row["total"], row["advantage"]) == (pytest.approx(t, abs=1e-5), pytest.approx(a, abs=2e-4))
            own = row["thinking_scores"]
            assert row["thinking"] == (None if None in own else pytest.approx(mean(own), abs=1e-6))
            scored[step] += [] if None in own else [own]
        gammas[step] += [mean(g for g in gamma if g is not None)] if any(g is not None for g in gamma) else []
    for step in (1, 2):
        assert found[step]["trust/gamma"] == pytest.approx(mean(gammas[step]), rel=1e-5)
        assert found[step]["reward/thinking"] == pytest.approx(mean(x for own in scored[step] for x in own), rel=1e-5)
        assert found[step]["reward/total"] == pytest.approx(mean(r["total"] for r in rows if r["step"] == step), rel=1e-5)


def test_one_score_a_response_needs_no_list(demo, tmp_path):
    rl.train(rl_config(demo, tmp_path / "run", "cpu", "run.steps=1"))
    assert not any("thinking_scores" in row for row in lines(tmp_path / "run/samples.jsonl"))


def test_fine_tuning(demo, tmp_path):
    def config(device):
        return tree.load(ROOT / "configs/demo_warmup.yaml", [
            f"data.registry={demo}/data/dataset_info.json", f"run.dir={tmp_path / device}", f"run.export={tmp_path / device}/hf", f"model.path={demo}/init",
            "run.steps=2", "sft.batch_size=4", "monitor.tensorboard=false", "policy.kernels=reference", "optim.eps=1e-2", f"device={device}"])

    sft.train(config("cpu"))
    with pretended_cuda():
        sft.train(config("cuda"))
    for a, b in zip(metrics(tmp_path / "cpu"), metrics(tmp_path / "cuda"), strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5, nan_ok=True)
