"""A checkpoint as a folder: how it gets its name whole, which one is the newest, which are dropped or set aside, and its manifest.

    RUN/checkpoints/step_N/manifest.json   format, identity of the model, update count, the recipe's JSON state, index of tensors, size and CRC-32 of files
                           ...             the tensors, see whole.py and sharded.py

It is written under another name, flushed to disk and renamed: what bears the final name is complete.
"""
from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sophiavl_fast.errors import UserError

MANIFEST = {"step": int, "updates": int, "identity": dict, "state": dict, "tensors": dict}
COMPLETE = re.compile(r"step_(\d+)|\.step_(\d+)\.replaced")  # the latter for the instant in which a step is saved anew


def names(run_dir: str | Path, step: int) -> tuple[Path, Path]:
    """RUN/checkpoints/step_N, and where it is written until it is whole."""
    target = Path(run_dir) / "checkpoints" / f"step_{step}"
    return target, target.with_name(f".{target.name}.writing")


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, None where there is none."""
    found = complete(Path(run_dir) / "checkpoints", "*step_*")
    return found[-1][1] if found else None


def complete(folder: Path, pattern: str = "step_*") -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint there, in order."""
    return sorted((step, path) for path in folder.glob(pattern) if (step := _step(path)) is not None)


def _step(path: Path) -> int | None:
    match = COMPLETE.fullmatch(path.name)
    return int(match[1] or match[2]) if match and (path / "manifest.json").is_file() else None


def another(folder: Path) -> str:
    """What to do about a spoilt checkpoint: the newest one beside it that is complete, by its manifest."""
    others = [path for _, path in complete(folder.parent) if path != folder]
    return f"another one is '{others[-1]}'" if others else "no other checkpoint lies beside it"


def set_aside(run_dir: str | Path, step: int, found: Path) -> list[Path]:
    """Rename RUN/checkpoints/step_N of every N beyond `step`, and of `step` itself where it is not `found`, to abandoned_step_N, so that none of them is
    taken for the newest; returns their new places.

    For a run that was told to go on from the checkpoint `found`: they are of the course that it left. Nothing is deleted.
    """
    moved, kept = [], found.resolve()
    for at, path in complete(Path(run_dir) / "checkpoints", "*step_*"):
        if at < step or (at == step and path.resolve() == kept):
            continue
        places = (path.with_name(f"abandoned_step_{at}{suffix}") for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
        target = next(place for place in places if not place.exists())
        path.rename(target)
        moved.append(target)
    if moved:
        sync(moved[0].parent)
    return moved


def read_manifest(folder: Path) -> dict[str, Any]:
    """Its manifest.json. Raises UserError where `folder` is no checkpoint."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = newest(folder)
        raise UserError(f"'{folder}' is not a checkpoint: manifest.json: {error}" + (f"; did you mean '{inside}'?" if inside else "")) from None
    wrong = [key for key, kind in MANIFEST.items() if not isinstance(found, dict) or not isinstance(found.get(key), kind)]
    if not wrong and not all(isinstance(file, str) for file in found["tensors"].values()):
        wrong = ["the files of its tensors"]
    if not wrong and not _are_digests(found.get("files", {})):   # earlier checkpoints have none
        wrong = ["sizes and CRCs of its files"]
    if not wrong and (found["updates"] < 0 or found["step"] < 0):
        wrong = ["a count of updates and steps"]
    if wrong:
        raise UserError(f"'{folder}' is not a checkpoint: manifest.json lacks {', '.join(wrong)}; {another(folder)}")
    return found


def _are_digests(files: Any) -> bool:
    return isinstance(files, dict) and all(isinstance(d, list) and list(map(type, d)) == [int, int] and name == Path(name).name for name, d in files.items())


def digests(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """[bytes, CRC-32] of each of these files there."""
    return {name: [(folder / name).stat().st_size, _crc(folder / name)] for name in names}


def _crc(path: Path) -> int:
    found, buffer = 0, memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found = zlib.crc32(buffer[:size], found)
    return found


def refuse_incomplete(folder: Path, files: dict[str, list[int]]) -> None:
    """UserError where one of its files, by the manifest, is missing or of another size."""
    for name, (size, _) in sorted(files.items()):
        try:
            here = (folder / name).stat().st_size
        except OSError:
            raise UserError(f"checkpoint '{folder}': '{name}' is not there; {another(folder)}") from None
        if here != size:
            raise UserError(f"checkpoint '{folder}': '{name}' is {'cut short' if here < size else 'too long'} ({here} bytes of {size}); {another(folder)}")


def refuse_damaged(folder: Path, files: dict[str, list[int]]) -> None:
    """UserError where one of these files does not hold the bytes that were written."""
    for name, (_, crc) in sorted(files.items()):
        try:
            here = _crc(folder / name)
        except OSError as error:
            raise UserError(f"checkpoint '{folder}': '{name}' cannot be read ({error.strerror}); {another(folder)}") from None
        if here != crc:
            raise UserError(f"checkpoint '{folder}': '{name}' is damaged or another checkpoint's (CRC-32 {here:08x}, written {crc:08x}); {another(folder)}")


def write_json(path: Path, value: Any) -> None:
    """Write and flush to disk."""
    path.write_text(json.dumps(value))
    sync(path)


def empty(place: Path) -> None:
    """Make `place` for a draft, and drop drafts that a killed or failed save left beside it."""
    for stale in place.parent.glob(".step_*.writing"):
        shutil.rmtree(stale, ignore_errors=True)
    place.mkdir(parents=True)


def publish(draft: Path, target: Path, keep: int) -> None:
    """Give a complete draft its name, and drop all but the newest `keep` checkpoints (0: none) and this one."""
    sync(draft)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    for _, path in complete(target.parent)[:-keep] if keep > 0 else []:
        if path == target:   # later steps lie there: a run that went on from an earlier one in a folder of its own making
            continue
        (path / "manifest.json").unlink()   # first, so that a half-removed one is never taken for complete
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Force a file's contents, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
