"""The local judge and plain transformers' answers on a CUDA device that is not there (tests/pretend_cuda.py): the CPU's."""
import pytest
import torch

from sophiavl_fast.config import Thinking
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.evaluate import transformers_engine
from sophiavl_fast.rewards.thinking import template
from sophiavl_fast.rewards.thinking.local import LocalJudge
from sophiavl_fast.types import Prompt
from tests.pretend_cuda import pretended_cuda
from tests.rewards.test_local import CASES, picture


@pytest.mark.parametrize("options", [{}, {"samples": 2}, {"score": "parse"}], ids=["expected", "drawn", "parsed"])
def test_the_judge(tiny_judge, options):
    def verdicts(device):
        thinking = Thinking(backend="local", path=str(tiny_judge), template="demo_judge", **options)
        return LocalJudge(thinking, template.load("demo_judge"), torch.device(device), least_mass=0.0).collect(CASES)

    expected = verdicts("cpu")
    with pretended_cuda():
        found = verdicts("cuda")
    for a, b in zip((v for case in expected for v in case), (v for case in found for v in case), strict=True):
        assert b.values == pytest.approx(a.values, abs=1e-6, nan_ok=True) and a.reason == b.reason


def test_answers_by_transformers(tiny_judge):
    processor, prompts = Processor(str(tiny_judge)), []
    for i, images in enumerate(([picture(1)], [], [picture(2), picture(3)])):
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "1+2?"}]
        _, _, expanded, _, pixels, grid = processor.prepare([{"role": "user", "content": content}], images)
        prompts.append(Prompt(id=str(i), dataset="d", problem_type="numerical", question="", gold="", expanded_ids=expanded,
                              pixel_values=pixels, image_grid_thw=grid))

    def answers():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return transformers_engine.generate(transformers_engine.load(str(tiny_judge), torch.float32, device), processor, prompts, 6)

    expected = answers()
    with pretended_cuda():
        assert answers() == expected
