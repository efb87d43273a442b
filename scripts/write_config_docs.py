"""Write docs/config.md from the docstrings in sophiavl_fast/config.py; `tests/test_docs.py` keeps it current."""
from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from sophiavl_fast.config import Config

HEADER = """# Configuration

Written from `sophiavl_fast/config.py` by `python scripts/write_config_docs.py`. A file may name a `base:` file whose values it
changes; on the command line `a.b=value` overrides follow the file (`a.b=null` for none; `a.b=` is an empty text). Unknown keys are
refused with the nearest valid one.
"""


def kind(annotation: Any) -> str:
    """A type as people write it: `a | b` for choices, `int or null` for optional ones."""
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    if getattr(get_origin(annotation), "__name__", "") in ("list", "dict"):
        return str(annotation).replace(" | ", " or ")
    return (" \\| " if "Literal" in str(get_origin(annotation)) else " or ").join(kind(a) if not isinstance(a, str) else a for a in get_args(annotation))


def text() -> str:
    """The whole page."""
    parts = [HEADER, "## top level\n", *_table(Config, "", sections=False)]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts += [f"\n## {name}\n", *_table(field.annotation, f"{name}.")]
    return "\n".join(parts) + "\n"


def _table(node: type[BaseModel], prefix: str, sections: bool = True) -> list[str]:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in node.model_fields.items():
        if not sections and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = "null" if field.default is None else str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = default if default != "" else '""'
        what = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {kind(field.annotation)} | `{default}` | {what} |")
    return rows


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "docs" / "config.md"
    path.write_text(text())
    print(path)
