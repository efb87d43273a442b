"""A tiny random Qwen2.5-VL with a character tokenizer, prompts for it, and Hugging Face as the oracle."""
from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sophiavl_fast.types import Group, Prompt

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHARS = list("0123456789+-=>. ,:?abcdefghijklmnopqrstuvwxyz()<>/\n")
VOCAB = 96
STOP = [2, 8]                                     # <|im_end|>, and "0" so that both ends are seen
BANNED = [0, 1, 3, 4, 5, 6, 7, 20, 30, 40, *range(len(SPECIAL) + len(CHARS), VOCAB)]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def build(folder: Path, seed: int = 0) -> Path:
    """Write model, tokenizer and processor as a Hugging Face folder; weights wide enough for a peaked distribution."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(SPECIAL + CHARS)}, unk_token=" "))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated"), decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[2], pad_token=SPECIAL[0], additional_special_tokens=SPECIAL)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "min_pixels": 784, "max_pixels": 50176, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}))
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
                       "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1]},
        image_token_id=6, video_token_id=7, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    # what a published model may ship, and what must never reach the sampler
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": True, "top_p": 0.5, "repetition_penalty": 1.5}))
    return folder


@cache
def processor(folder: Path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def picture(seed: int, width: int = 84, height: int = 28) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def prompt(folder: Path, name: str, text: str, images: list[Image.Image] = ()) -> Prompt:
    """`text` after one placeholder an image."""
    text = f"<|im_start|>user\n{IMAGE * len(images)}{text}<|im_end|>\n<|im_start|>assistant\n"
    tool = processor(folder)
    encoded = tool(text=[text], images=list(images) or None, return_tensors="pt")
    return Prompt(id=f"tiny:{name}", dataset="tiny", problem_type="text", question=text, gold="", text=text,
                  token_ids=tool.tokenizer(text)["input_ids"], expanded_ids=encoded["input_ids"][0].tolist(), images=list(images),
                  pixel_values=encoded.get("pixel_values"), image_grid_thw=encoded.get("image_grid_thw"))


def prompts(folder: Path) -> list[Prompt]:
    """One image, two images of different sizes, text only, and one long enough for the prefix cache (128-token blocks)."""
    return [prompt(folder, "one", "max-min?", [picture(1)]), prompt(folder, "two", "which?", [picture(2), picture(3, 56, 56)]),
            prompt(folder, "text", "1+2=?"), prompt(folder, "long", "what is this? " * 12, [picture(4)])]


def load(folder: Path):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def perturbed(folder: Path, seed: int):
    """The model with noise on every parameter."""
    model, noise = load(folder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model


@torch.no_grad()
def distribution(model, given: Prompt, answer: list[int], temperature: float) -> torch.Tensor:
    """[len(answer) + 1, V] log-probs after bans and temperature, by Hugging Face: row t is what token t was drawn from."""
    ids = torch.tensor([given.expanded_ids + answer])
    images = {} if given.pixel_values is None else {"pixel_values": given.pixel_values, "image_grid_thw": given.image_grid_thw}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 6).int(), **images).logits
    logits = logits[0, len(given.expanded_ids) - 1:].float()
    logits[:, BANNED] = -torch.inf
    return (logits / temperature).log_softmax(-1)


def worst_difference(model, groups: list[Group], temperature: float) -> float:
    """Largest |engine - Hugging Face| log-prob over all sampled tokens."""
    worst = 0.0
    for group in groups:
        for response in group.responses:
            rows = distribution(model, group.prompt, response.token_ids, temperature)[:-1]
            expected = rows.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            worst = max(worst, (expected - torch.tensor(response.logprobs)).abs().max().item())
    return worst


class Weights:
    """A WeightSource over a Hugging Face model; names as its checkpoint spells them, or `rename`d."""

    def __init__(self, model, *, without: str | None = None, extra: str | None = None) -> None:
        self.named = [(n, p.detach()) for n, p in model.named_parameters() if n != without]
        if extra:
            self.named.append((extra, torch.zeros(4)))

    def weights(self):
        yield from self.named
