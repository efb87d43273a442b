"""The registry of datasets: a JSON file in the form of SophiaVL-R1's dataset_info.json, extended by users without touching code.

    {"my_set": {"file_path": "my/records.jsonl", "image_base_path": "my/images",
                "columns": {"question": "prompt", "label": "answer", "pictures": "images"}}}

Relative paths start at the registry file's own folder; those of an entry whose file is not there but below the working directory, as SophiaVL-R1's own
registry names its files, start at the working directory. The packaged entries name the published sets; their paths start
at $SOPHIAVL_DATA, or at ./data where that is unset. A user's registry adds to the packaged one and overrides it by name.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophiavl_fast.errors import UserError, nearest

PACKAGED = Path(__file__).with_name("dataset_info.json")

# role -> the column that plays it where the registry says nothing
ROLES = {
    "prompt": "problem", "answer": "solution", "images": "path", "problem_id": "problem_id", "problem_type": "problem_type",
    "options": "options", "process": "process", "data_type": "data_type", "data_source": "data_source",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One registered dataset, its paths absolute.

    `name` is as asked for, split included; `columns` maps each role to the column that plays it; `missing`: what else to say of
    a data file that does not exist. Beside the three keys of dataset_info.json an entry may hold `template` (prompt template of this set
    alone), `problem_type` (type of records that name none) and `reasoning_check` (name of the rule that judges reasoning in evaluation).
    """

    name: str
    file_path: Path
    image_base_path: Path
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=lambda: dict(ROLES))
    template: str = ""
    problem_type: str = ""
    reasoning_check: str = ""
    registry: Path = PACKAGED
    missing: str = ""


KEYS = {"file_path", "image_base_path", "columns", "template", "problem_type", "reasoning_check"}


def find(name: str, registry: str | Path = "") -> Entry:
    """The entry of `name` or `name@split`. Raises UserError: no such name (with the nearest), or an entry that is malformed."""
    base, _, split = name.partition("@")
    files = [Path(registry), PACKAGED] if registry else [PACKAGED]
    known: dict[str, tuple[dict[str, Any], Path]] = {}
    for file in reversed(files):
        known |= {key: (value, file) for key, value in _read(file).items()}
    if base not in known:
        raise UserError(f"dataset '{base}' is not in registry '{files[0]}'{nearest(base, known)}")
    return _entry(name, split, *known[base])


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"data.registry: '{path}' does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"data.registry: '{path}' cannot be read: {error}") from None
    if not isinstance(tree, dict) or not all(isinstance(v, dict) for v in tree.values()):
        raise UserError(f"data.registry: '{path}' must map each dataset's name to its entry")
    return tree


def _entry(name: str, split: str, raw: dict[str, Any], file: Path) -> Entry:
    where = f"registry '{file}', dataset '{name.partition('@')[0]}'"
    for key in raw:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key '{key}'{nearest(key, KEYS)}")
        if key != "columns" and not isinstance(raw[key], str):
            raise UserError(f"{where}: '{key}' must be a string, not {raw[key]!r}")
    if not raw.get("file_path"):
        raise UserError(f"{where}: no 'file_path'")
    template = raw.get("template", "")
    try:
        folder, missing = _start(raw["file_path"], file)
        data, base = _absolute(folder, raw["file_path"]), _absolute(folder, raw.get("image_base_path", ""))
        template = str(_absolute(folder, template)) if template.endswith((".yaml", ".yml")) else template
    except RuntimeError as error:  # ~nosuchuser
        raise UserError(f"{where}: a path begins with '~' and no home folder is known for it: {error}") from None
    return Entry(
        name=name, split=split, registry=file, columns=_columns(raw.get("columns", {}), where), file_path=data, image_base_path=base, template=template,
        problem_type=raw.get("problem_type", ""), reasoning_check=raw.get("reasoning_check", ""), missing=missing,
    )


def _start(file_path: str, file: Path) -> tuple[Path, str]:
    """Where an entry's relative paths start, and what to say if its file is not there."""
    if file == PACKAGED:
        folder = Path(os.environ.get("SOPHIAVL_DATA", "data"))
        return folder, f" (download the set into '{folder.absolute()}', or set SOPHIAVL_DATA to the folder that holds it)"
    here, there = _absolute(file.parent, file_path), _absolute(Path.cwd(), file_path)
    if here == there or os.path.exists(here):
        return file.parent, ""
    return (Path.cwd(), "") if os.path.exists(there) else (file.parent, f" (not at '{there}' either)")


def _absolute(folder: Path, path: str) -> Path:
    return (folder / Path(path).expanduser()).absolute()


def _columns(raw: Any, where: str) -> dict[str, str]:
    """Role -> column. dataset_info.json maps column -> role; the other direction is understood too, for the mapping as a whole."""
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        raise UserError(f"{where}: 'columns' must map column names to roles ({', '.join(ROLES)})")
    if all(role in ROLES for role in raw.values()):
        given = {role: column for column, role in raw.items()}
    elif all(role in ROLES for role in raw):
        given = dict(raw)
    else:
        bad = next(role for role in raw.values() if role not in ROLES)
        raise UserError(f"{where}: columns: unknown role '{bad}'{nearest(bad, ROLES)}")
    if len(given) < len(raw):
        raise UserError(f"{where}: columns: two columns play the same role")
    return ROLES | given
