"""A tiny random Qwen2.5-VL as a Hugging Face folder: 2.2 M parameters, one token a character, a real processor."""
from __future__ import annotations

import json
import string
from pathlib import Path

TAGS = ("<think>", "</think>", "<answer>", "</answer>")   # one ordinary token each: sampled, trained and decoded like any other
ROLES = ("system", "user", "assistant")                   # one token each, so that the chat template costs little
END, TURN_END = "<|endoftext|>", "<|im_end|>"
IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
UNKNOWN = "<|unknown|>"                                   # every character that is not printable ASCII
SPECIAL = (END, "<|im_start|>", TURN_END, VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO, UNKNOWN)
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
VOCABULARY = 128    # rows of the embedding: a few more than there are tokens, as in real models
PATCH = 14
SIDE = 2 * PATCH    # pixels a side of one image token

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}
"""


def build(folder: Path, seed: int) -> int:
    """Write weights (fp32 safetensors), config, tokenizer and processor files; returns the number of parameters."""
    from transformers import Qwen2_5_VLForConditionalGeneration, set_seed

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    _write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "patch_size": PATCH, "temporal_patch_size": 2,
        "merge_size": 2, "min_pixels": SIDE * SIDE, "max_pixels": 64 * SIDE * SIDE, "image_mean": [0.3] * 3, "image_std": [0.35] * 3})
    set_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer)).float()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(TURN_END)
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(END)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def character_tokenizer():
    """Special tokens, the four tags, the roles, then one token a printable ASCII character."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *TAGS, *ROLES, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (*TAGS, *ROLES)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END, unk_token=UNKNOWN, additional_special_tokens=list(SPECIAL),
        model_max_length=512, chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def _config(tokenizer):
    """Four heads of 48 with two key-value heads: small, and still divisible by a tensor-parallel size of two."""
    from transformers import Qwen2_5_VLConfig

    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": token(END),
        "eos_token_id": token(TURN_END), "pad_token_id": token(END),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 8, 8]}}
    vision = {
        "depth": 2, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 192, "patch_size": PATCH,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [0, 1]}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=token(IMAGE), video_token_id=token(VIDEO), tie_word_embeddings=False,
        vision_start_token_id=token(VISION_START), vision_end_token_id=token(VISION_END))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
