"""The config.json of published models, reduced to what decides sizes, and how many parameters their weights hold."""
from __future__ import annotations

from typing import Any


def qwen2_5(hidden: int, ffn: int, layers: int, heads: int, keys: int, vocab: int, tied: bool) -> dict[str, Any]:
    """Text fields at the top, as these folders have them."""
    return {"model_type": "qwen2_5_vl", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys, "vocab_size": vocab, "tie_word_embeddings": tied, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden, "patch_size": 14,
                              "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}}


def qwen3(hidden: int, ffn: int, layers: int, heads: int, keys: int, tied: bool, vision: tuple[int, int, int]) -> dict[str, Any]:
    depth, width, wide = vision
    text = {"model_type": "qwen3_vl_text", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": tied,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}}
    return {"model_type": "qwen3_vl", "tie_word_embeddings": tied, "text_config": text,
            "vision_config": {"depth": depth, "hidden_size": width, "intermediate_size": wide, "num_heads": 16, "out_hidden_size": hidden, "patch_size": 16,
                              "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}}


def internvl(hidden: int, ffn: int, layers: int, heads: int, keys: int, tied: bool, vision: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    depth, width, wide, vision_heads = vision
    text = {"model_type": "qwen2", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys, "vocab_size": 151674, "tie_word_embeddings": tied}
    return {"model_type": "internvl", "tie_word_embeddings": tied, "downsample_ratio": 0.5, "text_config": text,
            "vision_config": {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": wide, "num_attention_heads": vision_heads,
                              "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True, **more}}


SMALL_TOWER, TOWER, VIT = (24, 1024, 4096), (27, 1152, 4304), (24, 1024, 4096, 16)
# name of the shipped configuration -> config.json, billions of parameters, GPUs that it is written for: of 80 GB where there are several, else of 141
MODELS: dict[str, tuple[dict[str, Any], float, int]] = {
    "qwen2_5_vl_3b": (qwen2_5(2048, 11008, 36, 16, 2, 151936, True), 3.754622976, 1),
    "qwen2_5_vl_7b": (qwen2_5(3584, 18944, 28, 28, 4, 152064, False), 8.292166656, 8),
    "qwen3_vl_4b": (qwen3(2560, 9728, 36, 32, 8, True, SMALL_TOWER), 4.438, 8),
    "qwen3_vl_8b": (qwen3(4096, 12288, 36, 32, 8, False, TOWER), 8.767, 8),
    "qwen3_vl_32b": (qwen3(5120, 25600, 64, 64, 8, False, TOWER), 33.357, 16),
    "internvl3_2b": (internvl(1536, 8960, 28, 12, 2, False, VIT), 2.089, 8),
    "internvl3_8b": (internvl(3584, 18944, 28, 28, 4, False, VIT), 7.944, 8),
    "internvl3_38b": (internvl(5120, 27648, 64, 40, 8, False, (45, 3200, 12800, 25), attention_bias=False, norm_type="rms_norm", use_qk_norm=True), 38.388, 16),
}
