"""What the report's sample browser holds: chosen groups with their pictures, texts and every number of a response."""
from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from sophiavl_fast.monitor import jsonl
from sophiavl_fast.monitor.groups import NUMBERS, GroupIndex

SIDE = 512             # pixels of an embedded picture's longer side
SMALL = 256            # a picture up to this side is kept as it is, lossless
PICTURES_LIMIT = 9 << 20   # bytes of all embedded pictures, base64 included
TEXT_LIMIT = 12_000    # characters of a text
THINK, THINK_END, ANSWER, ANSWER_END = "<think>", "</think>", "<answer>", "</answer>"


class Pictures:
    """Pictures as data URIs, each file once; what does not fit or cannot be read is a note instead."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._bytes = 0

    def add(self, path: str) -> str:
        """Embed the file and return its key."""
        if path not in self.found:
            self.found[path] = self._embed(path)
        return path

    def _embed(self, path: str) -> dict[str, Any]:
        if not path:
            return {"note": "the record holds this picture as bytes"}
        if self._bytes > PICTURES_LIMIT:
            return {"note": f"left out, for the report's size: {path}"}
        try:
            uri, size = data_uri(Path(path))
        except OSError as error:  # gone, or no picture
            return {"note": f"cannot be read: {path} ({error.__class__.__name__})"}
        self._bytes += len(uri)
        return {"uri": uri, "width": size[0], "height": size[1]}


def data_uri(path: Path) -> tuple[str, tuple[int, int]]:
    """The picture, no side longer than SIDE, and its original (width, height). Raises OSError."""
    with Image.open(path) as file:
        size, image = file.size, file.convert("RGB")
    out = io.BytesIO()
    if max(size) <= SMALL:
        kind = "png"
        image.save(out, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((SIDE, SIDE))
        image.save(out, "JPEG", quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", size


def groups_of(path: Path, chosen: list[GroupIndex], pictures: Pictures, threshold: float) -> list[dict[str, Any]]:
    """The chosen groups as the page shows them: what is common to a group once, then its responses."""
    out = []
    for group in chosen:
        records = list(jsonl.at(path, group.starts))
        first = records[0]
        out.append({
            "step": first["step"], "id": str(first["id"]), "type": first.get("problem_type") or "", "prompt": _clip(first.get("prompt")),
            "gold": _clip(first.get("gold")), "images": [pictures.add(p) for p in first.get("images") or []], "mixed": group.mixed(threshold),
            "uniform": first.get("uniform"), "responses": [_response(r, threshold) for r in records],
        })
    return out


def _response(record: dict[str, Any], threshold: float) -> dict[str, Any]:
    text, outcome = record.get("response") or "", record.get("outcome")
    parts = _split(text)
    told = {"thinking_text": _clip(parts[0].strip()), "answer": _clip(parts[1].strip())} if parts else {"raw": _clip(text)}
    return told | {key: record.get(key) for key in NUMBERS} | {
        "correct": None if outcome is None else outcome >= threshold, "sound": record.get("sound"), "format_ok": record.get("format_ok"),
        "truncated": record.get("finish_reason") == "length", "because": record.get("unscored_because"),
    }


def _split(text: str) -> tuple[str, str] | None:
    """(thinking, answer) of a response in the format, None of another. Plain search: a regular expression with open gaps takes minutes on a response of
    nothing but tags."""
    body = text.lstrip()
    thinking, closed, rest = body.removeprefix(THINK).partition(THINK_END)
    _, opened, rest = rest.partition(ANSWER)
    answer, ended, _ = rest.partition(ANSWER_END)
    return (thinking, answer) if body.startswith(THINK) and closed and opened and ended else None


def _clip(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]} … ({len(text) - TEXT_LIMIT:,} more characters in samples.jsonl)"
