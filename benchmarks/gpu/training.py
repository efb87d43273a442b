"""A real optimizer step of the policy, one megatron rank, random weights; tokens a second, MFU, memory.

Every layer has Qwen2.5-VL-3B's shapes, but there are 12 of its 36 layers and 8 of its 32 vision blocks: the whole model with fp32 sums, weights and
moments is 67 GB before activations. So tokens a second are not the 3B model's, and the log-prob head's share is about three times what it is there;
MFU counts what is done.
"""
from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.attention import _pairs
from benchmarks.gpu.clock import Bench

# Enough that a layer's cost dominates, few enough to be built and stepped in a minute.
LAYERS, VISION_DEPTH = 12, 8
IMAGE, VISION_START, VISION_END = 151655, 151652, 151653


def run(bench: Bench) -> dict[str, Any]:
    """Median time of an update (log-probs, entropy, GRPO loss, backward, AdamW) with the shared prompt and with plain packing."""
    from sophiavl_fast import config as tree
    from sophiavl_fast.algorithms import losses
    from sophiavl_fast.policy import Policy

    made, model = build(bench)
    with tempfile.TemporaryDirectory(dir=room(sum(p.numel() * p.element_size() for p in made.parameters()))) as folder:
        save(made, Path(folder))
        del made
        bench.clear()
        config = tree.build({"device": bench.device.type, "model": {"path": folder, "dtype": "float32" if bench.dry else "bfloat16"},
                             "optim": {"lr": 1e-6}, "algorithm": {"kl_coef": 0.0}, "policy": {"tokens_per_row": bench.size(32768, 400)}}, "benchmark")
        policy = Policy.create(config, reference=False, total_steps=1000)
        try:
            shape = {"prompts": bench.size(4, 2), "n": bench.size(8, 3), "text": bench.size(200, 6), "grid": bench.size(64, 4), "response": bench.size(400, 5)}
            groups = [_group(bench, i, model, shape) for i in range(shape["prompts"])]
            out: dict[str, Any] = {"model": model, "shape": shape}
            for shared in (True, False):
                config.policy.share_prompt = shared
                out["shared_prompt" if shared else "plain"] = _step(bench, policy, config, losses, groups, model)
            return out
        finally:
            policy.close()


def room(size: int, places: tuple[str, ...] = ("/dev/shm", tempfile.gettempdir())) -> str:
    """The first of the places with this many bytes free, and a tenth more. Raises OSError that says how much each has."""
    free = {place: shutil.disk_usage(place).free for place in places if Path(place).is_dir()}
    for place, there in free.items():
        if there > 1.1 * size:
            return place
    raise OSError(f"a model of {size / 1e9:.1f} GB fits nowhere: " + ", ".join(f"{place} has {there / 1e9:.1f} GB free" for place, there in free.items()))


def build(bench: Bench) -> tuple[Any, dict[str, Any]]:
    """A model with random weights, made on the device, and its sizes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden, heads, keys, layers = (64, 4, 2, 2) if bench.dry else (2048, 16, 2, LAYERS)
    inner, vocab, depth = (96, 131, 2) if bench.dry else (11008, 151936, VISION_DEPTH)
    vision = {"depth": depth, "hidden_size": bench.size(1280, 32), "intermediate_size": bench.size(3420, 48), "num_heads": bench.size(16, 4),
              "out_hidden_size": hidden, "patch_size": 14, "window_size": bench.size(112, 56), "spatial_merge_size": 2, "temporal_patch_size": 2,
              "fullatt_block_indexes": [depth - 1]}
    special = (120, 122, 123) if bench.dry else (IMAGE, VISION_START, VISION_END)
    half = hidden // heads // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]}
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
                     "num_key_value_heads": keys, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
                     "pad_token_id": 0, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config=vision, image_token_id=special[0], video_token_id=special[0] + 1, vision_start_token_id=special[1], vision_end_token_id=special[2],
        tie_word_embeddings=True)
    with torch.device(bench.device):
        made = Qwen2_5_VLForConditionalGeneration(config).to(bench.dtype)
    count = lambda m: sum(p.numel() for p in m.parameters() if p.dim() > 1)
    language = made.model.language_model
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "head_width": hidden // heads, "vocab": vocab, "vision_depth": depth, "special": list(special),
             "trunk": count(language.layers), "vision": count(made.model.visual), "of": "Qwen2.5-VL-3B: 36 layers, 32 vision blocks"}
    return made, sizes


def save(made: Any, folder: Path) -> None:
    """As a model folder that a policy loads."""
    made.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def _group(bench: Bench, index: int, model: dict[str, Any], shape: dict[str, int]) -> Any:
    """An image of grid x grid patches, some text, n random responses."""
    from sophiavl_fast.types import Group, Prompt, Response

    g, (image, start, end), side = torch.Generator().manual_seed(index), model["special"], shape["grid"]
    draw = lambda n: torch.randint(3, 110, (n,), generator=g).tolist()
    ids = [*draw(shape["text"]), start, *[image] * (side * side // 4), end, *draw(5)]
    prompt = Prompt(id=f"bench:{index}", dataset="bench", problem_type="numerical", question="", gold="", expanded_ids=ids,
                    pixel_values=torch.randn(side * side, 3 * 2 * 14 * 14, generator=g), image_grid_thw=torch.tensor([[1, side, side]]))
    answers = [draw(shape["response"]) for _ in range(shape["n"])]
    return Group(prompt=prompt, responses=[Response(token_ids=t, logprobs=[-1.0] * len(t), text="", finish_reason="length", seed=0,
                                                    weight_versions=[0] * len(t)) for t in answers])


def _step(bench: Bench, policy: Any, config: Any, losses: Any, groups: list[Any], model: dict[str, Any]) -> dict[str, Any]:
    advantages = torch.randn(sum(len(g.responses) for g in groups), generator=torch.Generator().manual_seed(0))
    batches = policy.pack(groups, advantages)
    loss = losses.make_grpo_loss(config, losses.denominator(batches, config))
    bench.clear()
    if not bench.dry:
        torch.cuda.reset_peak_memory_stats()
    found = bench.eager(lambda i: policy.update(batches, loss, entropy=True), 1)
    tokens, targets = sum(len(b.tokens) for b in batches), sum(len(b.target) for b in batches)
    patches = sum(len(b.pixel_values) for b in batches)
    pairs = sum(_pairs(b) for b in batches)
    attention = 4 * pairs * model["heads"] * model["head_width"] * model["layers"]
    flops = 3 * (2 * model["trunk"] * tokens + 2 * model["vision"] * patches + 2 * model["vocab"] * model["hidden"] * targets + attention)
    seconds = found["median_ms"] / 1e3
    peak = float("nan") if bench.dry else torch.cuda.max_memory_allocated() / 2 ** 30
    return found | {"packed_tokens": tokens, "response_tokens": targets, "patches": patches, "packed_tokens_per_s": tokens / seconds,
                    "response_tokens_per_s": targets / seconds, "model_tflops": flops / seconds / 1e12,
                    "mfu_of_measured_product": flops / seconds / bench.flops, "peak_gib": peak}
