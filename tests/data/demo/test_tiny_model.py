"""The tiny model is an ordinary Hugging Face folder: plain `transformers` loads it and reads its pictures."""
import random
import string

import pytest
import torch

from sophiavl_fast.data.demo import digits, tiny_model
from tests.data.demo.conftest import rows


@pytest.fixture(scope="module")
def processor(tiny):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny)


def test_every_response_survives_the_tokenizer(demo, processor):
    tokenizer = processor.tokenizer
    for row in rows(demo, "warmup") + rows(demo, "judge_train"):
        for text in (row["problem"], row["process"] + row["solution"]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_printable_character_is_one_token(processor):
    text = "".join(c for c in string.printable if c not in "\t\r\x0b\x0c")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text) == len(set(ids)) and processor.tokenizer.decode(ids) == text
    assert processor.tokenizer("é€", add_special_tokens=False)["input_ids"] == [processor.tokenizer.convert_tokens_to_ids(tiny_model.UNKNOWN)] * 2


def test_tags_are_ordinary_single_tokens_and_specials_are_not_decoded(processor):
    tokenizer = processor.tokenizer
    text = "<think>8 5</think><answer>13</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 4 + 3 + 2
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.convert_tokens_to_ids(list(tiny_model.TAGS)) == [i for i in ids if i >= len(tiny_model.SPECIAL) and i < len(tiny_model.SPECIAL) + 4]


def test_plain_transformers_loads_it(tiny, processor):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny)
    pictures = [digits.row(d, "eval", random.Random(0))[0].convert("RGB") for d in ([8, 5, 4], [8, 5])]
    chat = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "sum?"}]}] for _ in pictures]
    texts = [processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chat]
    assert texts[0] == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>sum?<|im_end|>\n<|im_start|>assistant\n"
    batch = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [3, 2]  # one token a digit
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[-1] == tiny_model.VOCABULARY >= len(processor.tokenizer)
    assert torch.isfinite(logits).all()


def test_it_is_tiny_and_the_seed_decides_its_weights(tiny, tmp_path):
    from safetensors.torch import load_file

    assert 2.0e6 < tiny_model.build(tmp_path / "same", seed=0) < 2.4e6
    tiny_model.build(tmp_path / "other", seed=1)
    mine, same, other = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert not torch.equal(mine["lm_head.weight"], other["lm_head.weight"])
    assert {v.dtype for v in mine.values()} == {torch.float32}


def test_only_end_of_turn_stops_and_specials_are_banned(tiny):
    from sophiavl_fast.data.processor import Processor

    processor = Processor(tiny)
    ids = processor.tokenizer.convert_tokens_to_ids
    assert processor.stop_ids == [ids(tiny_model.TURN_END)]
    without_token = set(range(len(processor.tokenizer), tiny_model.VOCABULARY))
    assert set(processor.banned_ids) == ({*map(ids, tiny_model.SPECIAL)} | without_token) - set(processor.stop_ids)


def test_its_heads_split_over_two_tensor_ranks(tiny):
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(tiny).text_config
    assert text.num_attention_heads % 2 == text.num_key_value_heads % 2 == tiny_model.VOCABULARY % 2 == text.intermediate_size % 2 == 0
