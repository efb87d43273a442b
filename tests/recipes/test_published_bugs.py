"""Faults 12 to 14 of the public SophiaVL-R1 code: this project does not have them. 1 to 4 are in tests/algorithms/test_published_bugs.py, 1 to 11 in
tests/rewards/test_rewards.py; 15 is about tables of the paper."""
import pytest

from sophiavl_fast import config as tree
from sophiavl_fast.errors import UserError
from sophiavl_fast.recipes import setup
from sophiavl_fast.rollout.engine import Sampling
from sophiavl_fast.types import Prompt
from tests.recipes.test_preflight import ROOT
from tests.recipes.test_setup import checkpoint_of, conf, model  # noqa: F401 (a fixture)


def test_bug_12_samples_are_drawn_from_the_distribution_that_is_differentiated():
    prompt = Prompt(id="d:1", dataset="d", problem_type="text", question="", gold="")
    asked = Sampling(n=2, step=1, seed=0, temperature=0.7, max_new_tokens=4).arguments(prompt, [1])
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.7, 1.0, 0)
    assert not {"min_p", "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty"} & asked.keys()
    for key in ("top_p", "top_k", "min_p", "repetition_penalty"):
        with pytest.raises(UserError, match=f"unknown key 'rollout.{key}'"):
            tree.build({"rollout": {key: 0.9}})


def test_bug_13_the_papers_configuration_is_the_papers():
    """test_config.py holds its other values."""
    paper = tree.load(ROOT / "configs/trust_grpo_qwen2_5_vl_7b.yaml", world_size=8)
    assert (paper.optim.lr, paper.rollout.prompts_per_step, paper.data.shuffle, paper.trust.anneal_steps) == (5e-7, 8, True, None)
    assert {name.rpartition("-")[2] for name in paper.data.train.split(",")} == {"General", "Chart", "Knowledge", "Math", "OCR"}


@pytest.mark.parametrize("harm", ["lost", "cut short"])
def test_bug_14_no_part_of_a_checkpoint_is_lost_in_silence(model, tmp_path, harm):  # noqa: F811
    """That an export of any layout and dtype holds every weight bit by bit is seen to by tests/policy/test_layouts.py and test_weights.py."""
    part = checkpoint_of(model, tmp_path, 1) / "part-0-0.safetensors"
    point = lambda: setup.resume_point(conf(run={"dir": str(tmp_path), "seed": 3}, model={"path": str(model)}))
    assert point() == part.parent
    if harm == "lost":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"part-0-0.safetensors"):
        point()
