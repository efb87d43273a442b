"""The in-process judge against plain Hugging Face forward passes, one response and one candidate at a time."""
import math
import random
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from sophiavl_fast.config import Thinking
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.thinking import Case, local, template
from sophiavl_fast.rewards.thinking.local import LocalJudge
from sophiavl_fast.rewards.thinking.parse import parse_score
from sophiavl_fast.rewards.thinking.trie import TEXTS, VALUES, ScoreTrie, draw, expectation

CPU = torch.device("cpu")


def picture(seed: int, digits: int = 3) -> Image.Image:
    pixels = torch.randint(0, 255, (28, 28 * digits, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def case(seed: int, images: int, reasonings: list[str], question: str = "sum?") -> Case:
    seeds = [[seed + i, 99 - i] for i in range(len(reasonings))]
    return Case(question, [picture(seed + i, 2 + i) for i in range(images)], reasonings, ["7"] * len(reasonings), seeds)


CASES = [case(0, 1, ["1 2 3\n1+2=3", "9", "", "a much longer line of reasoning, with several words"]), case(10, 2, ["4 5", "4 6"], "max-min?"),
         case(20, 0, ["3+4=7"], "3+4?"), case(30, 1, []), case(40, 1, ["same", "same"])]


@pytest.fixture(scope="module")
def oracle(tiny_judge):
    return AutoProcessor.from_pretrained(tiny_judge), AutoModelForImageTextToText.from_pretrained(tiny_judge, dtype=torch.float32).eval()


def judge(path, name="demo_judge", **options) -> LocalJudge:
    return LocalJudge(Thinking(backend="local", path=str(path), template=name, **options), template.load(name), CPU, least_mass=0.0)


@torch.no_grad()
def brute_force(oracle, found: Case, place: int, name: str) -> float:
    """Eleven full forward passes of prompt and reply, no cache, no shared prefix, no padding."""
    processor, model = oracle
    loaded = template.load(name)
    text = loaded.user(found.question, found.reasonings[place])
    messages = [{"role": "user", "content": [{"type": "image"}] * len(found.images) + [{"type": "text", "text": text}]}]
    if loaded.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": loaded.system}]})
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    totals = []
    for text in TEXTS:
        inputs = processor(text=[prompt + loaded.before + text], images=list(found.images) or None, return_tensors="pt")
        ids = inputs["input_ids"][0]
        logprobs = model(**inputs).logits[0].log_softmax(-1)
        totals.append(sum(logprobs[t - 1, ids[t]] for t in range(len(ids) - len(text), len(ids))))  # one token a character
    return float(torch.stack(totals).softmax(0) @ torch.tensor(VALUES))


@pytest.mark.parametrize("name,cases", [("demo_judge", CASES), ("thinking_reward", CASES[1:3])])
def test_expectations_equal_brute_force(tiny_judge, oracle, name, cases):
    verdicts = judge(tiny_judge, name).collect(cases)
    assert [len(v) for v in verdicts] == [len(c.reasonings) for c in cases]
    for found, mine in zip(cases, verdicts, strict=True):
        for place, verdict in enumerate(mine):
            assert verdict.values[0] == pytest.approx(brute_force(oracle, found, place, name), abs=2e-5)


def test_batches_order_and_neighbours_change_nothing(tiny_judge, monkeypatch):
    whole = judge(tiny_judge).collect(CASES)
    monkeypatch.setattr(local, "TOKENS", 150)
    small = judge(tiny_judge).collect(CASES[::-1])[::-1]
    for a, b in zip(whole, small, strict=True):
        assert [v.values[0] for v in a] == pytest.approx([v.values[0] for v in b], abs=2e-5)


def test_images_and_reasoning_matter(tiny_judge):
    other = [case(77, 1, CASES[0].reasonings), CASES[0]]
    a, b = judge(tiny_judge).collect(other)
    assert all(x.values != y.values for x, y in zip(a, b, strict=True)) and len({x.values for x in a}) == 4


def test_samples_follow_the_distribution_and_their_seeds(tiny_judge):
    one, two = (judge(tiny_judge, samples=2).collect(CASES) for _ in range(2))
    assert one == two and all(value in VALUES for case_ in one for v in case_ for value in v.values)
    weights = torch.tensor([0.05] * 10 + [0.5])
    drawn = draw(weights, range(4000))
    assert sum(drawn) / 4000 == pytest.approx(float(expectation(weights[None])), abs=0.03)


@torch.no_grad()
def test_greedy_replies_equal_hugging_face(tiny_judge, oracle, monkeypatch):
    processor, model = oracle
    read: list[str] = []
    monkeypatch.setattr(local, "parse_score", lambda text, *around: read.append(text) or parse_score(text, *around))
    verdicts = judge(tiny_judge, score="parse").collect(CASES)
    assert all(math.isnan(v.values[0]) and "judge's reply" in v.reason for found in verdicts for v in found)  # a random model does not score
    expected = []
    for found in CASES:
        for reasoning in found.reasonings:
            text = template.load("demo_judge").user(found.question, reasoning)
            messages = [{"role": "user", "content": [{"type": "image"}] * len(found.images) + [{"type": "text", "text": text}]}]
            prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=[prompt], images=list(found.images) or None, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=local.REPLY_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1]:]
            expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    assert sorted(read) == sorted(expected)


def test_a_model_that_gives_no_scores_is_nan(tiny_judge):
    strict = LocalJudge(Thinking(backend="local", path=str(tiny_judge), template="demo_judge"), template.load("demo_judge"), CPU)
    (verdicts,) = strict.collect(CASES[:1])
    assert all(math.isnan(v.values[0]) and "probability" in v.reason for v in verdicts)


def test_a_response_full_of_image_tokens_is_scored(tiny_judge):
    (verdicts,) = judge(tiny_judge).collect([case(1, 1, ["<|image_pad|>" * 5 + "<|vision_start|>", "fine"])])
    assert all(0 < v.values[0] < 1 for v in verdicts)


@pytest.mark.parametrize("words,paths", [
    ({}, [("0", "."), ("1", ".")]),                                        # a token a character
    ({f"{i / 10:.1f}" for i in range(11)}, []),                            # a token a score
    ({"0.", "1.0"}, [("0.",)]),                                            # a token for the beginning
])
def test_the_trie_under_other_tokenizers(words, paths):
    """Random conditional distributions over token strings: the trie's distribution equals the sum over whole strings."""
    vocabulary = ["<a>", "</a>", *"0123456789.", *sorted(words)]

    def encode(text):
        out = []
        while text:
            token = max((v for v in vocabulary if text.startswith(v)), key=len)
            out.append(vocabulary.index(token))
            text = text[len(token):]
        return out

    trie = ScoreTrie(encode, "<a>{score}</a>")
    assert [tuple(vocabulary[t] for t in p) for p in trie.paths] == paths and trie.lead == [0]
    rng = random.Random(0)
    table: dict[tuple, torch.Tensor] = {}

    def logits(prefix):
        return table.setdefault(tuple(prefix), torch.tensor([rng.gauss(0, 2) for _ in vocabulary]))

    width = max((len(p) for p in trie.paths), default=0)
    rows = [[logits(p[:d + 1]) if d < len(p) else torch.zeros(len(vocabulary)) for d in range(width)] for p in trie.paths]
    after = torch.stack([torch.stack(r) for r in rows])[None] if rows else None
    probabilities, mass = trie.distribution(logits(())[None], after)
    direct = torch.stack([sum(logits(s[:d]).log_softmax(-1)[t] for d, t in enumerate(s)) for s in trie.scores]).exp()
    assert torch.allclose(probabilities[0], direct / direct.sum(), atol=1e-6) and mass[0].item() == pytest.approx(direct.sum().item(), rel=1e-5)


def test_wrong_folders_and_options(tiny_judge, tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        judge(tmp_path / "nothing")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        judge(tmp_path / "broken")
    with pytest.raises(UserError, match=r"samples > 1"):
        judge(tiny_judge, score="parse", samples=3)


def test_a_judge_without_all_its_weights_is_refused(tiny_judge, tmp_path):
    """transformers would draw them at random: other scores at every start."""
    path = shutil.copytree(tiny_judge, tmp_path / "judge")
    save_file({name: value for name, value in load_file(path / "model.safetensors").items() if "layers.1." not in name}, str(path / "model.safetensors"))
    with pytest.raises(UserError, match=rf"thinking.path = '{path}': tensor '.*layers.1.*' of the model of config.json is in no weight file"):
        judge(path)
