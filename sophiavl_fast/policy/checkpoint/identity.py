"""What must agree for a checkpoint to fit a policy."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy.families import Family


def identity(config: Config, family: Family) -> dict[str, Any]:
    """Family, sizes, dtype, what is trained; `fields`: all else that decides what the model computes."""
    fields = family.transformer()
    sizes = {k: fields[k] for k in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    return {
        "model_type": family.name, **sizes, "vocab_size": family.vocab_size, "tie_word_embeddings": family.tied,
        "vision_depth": family.vision_depth, "vision_hidden_size": family.vision_hidden_size, "model.dtype": config.model.dtype,
        "model.freeze_vision": config.model.freeze_vision, "fields": family.described,
    }


def refuse_another(folder: Path, manifest: dict[str, Any], here: dict[str, Any]) -> None:
    """UserError for a checkpoint whose manifest's identity is not the policy's own, `here`.

    Fields are compared where both name them: other versions of transformers know others, and earlier checkpoints have none.
    """
    stored, own = manifest["identity"], here["fields"]
    there = stored["fields"] if isinstance(stored.get("fields"), dict) else {}
    pairs = [(key, stored.get(key), value) for key, value in here.items() if key != "fields"]
    for key, old, new in pairs + [(key, there[key], value) for key, value in own.items() if key in there]:
        if old != new:
            cure = f"set {key}={str(old).lower()}" if key.startswith("model.") else f"resume with the run's own model.path{_model_path(manifest)}"
            raise UserError(f"checkpoint '{folder}' is of another model: {key} is {old!r} there, {new!r} here; {cure}")


def _model_path(manifest: dict[str, Any]) -> str:
    """` = 'PATH'` of the run that wrote the checkpoint, where its state tells."""
    try:
        return f" = '{manifest['state']['config']['model']['path']}'"
    except (KeyError, TypeError):
        return ""
