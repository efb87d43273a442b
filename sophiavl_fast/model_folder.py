"""A model folder's config.json: what is wrong with it in one line, before transformers fills in by defaults what is missing."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sophiavl_fast.errors import UserError


def read(path: str | Path) -> dict[str, Any]:
    """config.json as it lies there. Raises UserError where it is missing, cannot be read or is no JSON object."""
    folder = Path(path)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path = '{folder}': no config.json there; name a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path = '{folder}': config.json cannot be read: {error}; download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"model.path = '{folder}': config.json holds {'null' if found is None else f'a {type(found).__name__}'} instead of an object; "
                        "download it again")
    return found


def refuse_partial(path: str | Path) -> None:
    """UserError where config.json does not describe both the language model and the vision tower: defaults would be of another size."""
    found = read(path)
    text = isinstance(found.get("text_config"), dict) or "hidden_size" in found  # older folders hold the text model's fields at the top
    missing = [name for name, there in (("text_config", text), ("vision_config", isinstance(found.get("vision_config"), dict))) if not there]
    if missing:
        raise UserError(f"model.path = '{path}': config.json lacks {' and '.join(missing)}; download the whole Hugging Face folder")


def open_config(path: str | Path) -> Any:
    """transformers' config of the folder; no code of the folder is run. Raises UserError, whatever it is that transformers refuses."""
    from transformers import AutoConfig

    read(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # validators raise classes of their own
        raise UserError(f"model.path = '{path}': config.json cannot be used: {' '.join(str(error).split())[:300]}") from None
