"""Model families: what the policy must know about an architecture beyond megatron's GPT."""
from __future__ import annotations

from pathlib import Path

from sophiavl_fast.errors import UserError, nearest
from sophiavl_fast.policy.families.qwen2_5_vl import Qwen2_5_VL

FAMILIES = {"qwen2_5_vl": Qwen2_5_VL}


def open_family(path: str | Path) -> Qwen2_5_VL:
    """The adapter of the model folder's `model_type`. Raises UserError for a folder without config.json or an unknown family."""
    from transformers import AutoConfig

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path = '{folder}': no config.json there; name a Hugging Face model folder")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        raise UserError(f"model.path = '{folder}': model_type '{config.model_type}' is not supported{nearest(config.model_type, FAMILIES)}")
    return FAMILIES[config.model_type](folder, config)
