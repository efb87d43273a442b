"""Model families: what the policy must know about an architecture beyond megatron's GPT.

A further family is one file here with a subclass of `Family`, one entry in FAMILIES, and one in tests/policy/zoo.py.
"""
from __future__ import annotations

from pathlib import Path

from sophiavl_fast import model_folder
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy.families.base import Family
from sophiavl_fast.policy.families.internvl import InternVL
from sophiavl_fast.policy.families.qwen2_5_vl import Qwen2_5_VL
from sophiavl_fast.policy.families.qwen3_vl import Qwen3_VL

__all__ = ["FAMILIES", "Family", "InternVL", "Qwen2_5_VL", "Qwen3_VL", "open_family"]
FAMILIES: dict[str, type[Family]] = {family.name: family for family in (Qwen2_5_VL, Qwen3_VL, InternVL)}


def open_family(path: str | Path) -> Family:
    """The adapter of the model folder's `model_type`. Raises UserError for a config.json that cannot be used, an unknown family, quantised weights."""
    folder = Path(path)
    kind = model_folder.read(folder).get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = " ('internvl_chat' is the older format: take the folder's -hf twin)" if kind == "internvl_chat" else ""
        raise UserError(f"model.path = '{folder}': model_type '{kind}' is not supported{hint}; supported: {', '.join(FAMILIES)}")
    model_folder.refuse_partial(folder)
    model_folder.refuse_quantised(folder)
    return FAMILIES[kind](folder, model_folder.open_config(folder))
