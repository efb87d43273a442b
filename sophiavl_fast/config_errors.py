"""What of a configuration is of the wrong kind, in words: pydantic's findings by the user's own keys, and booleans that it would take for numbers."""
from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from sophiavl_fast.errors import UserError


def told(error: ValidationError, tree: dict[str, Any]) -> str:
    """`key = value: what is wrong` of the finding that went deepest: where a value may be of several kinds, that is of the kind that was meant."""
    found = max(error.errors(), key=lambda e: len(e["loc"]))
    loc, value, message = found["loc"], found.get("input"), found["msg"].lower()
    if loc[-1] == "[key]":
        return f"{_key(loc[:-2], tree)}: key {value!r}: {message}"
    return f"{_key(loc, tree)} = {value!r}: {message}"


def _key(loc: tuple[int | str, ...], tree: Any) -> str:
    """The steps of the location that lead through the tree; the others are pydantic's names of kinds."""
    steps, node = [], tree
    for step in loc:
        if step in node if isinstance(node, dict) else isinstance(node, list) and isinstance(step, int):
            steps.append(str(step))
            node = node[step]
    return ".".join(steps)


def refuse_booleans(value: Any, key: str, where: str) -> None:
    """UserError for a boolean within a mapping or list of numbers, as name or value: pydantic reads a 1, YAML an unquoted on, off, yes or no."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(name, bool):
            raise UserError(f"{where}: {key}: key {str(name).lower()}: quote it where a name is meant (YAML reads on, off, yes and no as true and false)")
        if isinstance(inner, bool):
            raise UserError(f"{where}: {key}.{name} = {str(inner).lower()}: expected a number")
        refuse_booleans(inner, f"{key}.{name}", where)
