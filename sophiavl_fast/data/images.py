"""Images of records: where they may come from, their size from the header alone, and safe decoding to RGB."""
from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from sophiavl_fast.errors import UserError

MAX_PIXELS = 128 * 1024 * 1024
"""Largest image that is decoded (400 MB as RGB); a file that unpacks to more is a decompression bomb or a mistake."""

# Formats whose decoders are plain pixels: no PostScript, no fonts, no external programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()  # PIL looks formats up by name only once their plugins are loaded
_TURNS = {  # EXIF orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}

_CORRUPT = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, EOFError, struct.error)  # what PIL's decoders raise at bad bytes


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image of a record: an absolute path, or its encoded bytes. `label` names it in messages."""

    label: str
    path: str = ""
    data: bytes | None = None

    def open(self) -> IO[bytes]:
        """A stream of the encoded bytes. Raises UserError for a file that may not be read."""
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self.label} cannot be read: {error.strerror}") from None


def references(value: Any, base: Path) -> list[ImageRef]:
    """The images that a record names: nothing, a path, {bytes | path}, bytes, or a list of these.

    Raises UserError: a URL, a path that leaves `base` once symlinks are followed, a file that is not there.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    return [_reference(item, base, f"image {i + 1}") for i, item in enumerate(items) if item not in (None, "")]


def _reference(item: Any, base: Path, label: str) -> ImageRef:
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, (bytes, bytearray)):
        return ImageRef(f"{label} ({len(item)} bytes)", data=bytes(item))
    if not isinstance(item, str) or not item:
        raise UserError(f"{label}: expected a path or {{bytes | path}}, not {type(item).__name__}")
    if "\0" in item:
        raise UserError(f"{label}: a path holds no null character ({item[:80]!r})")
    try:
        item.encode()
    except UnicodeEncodeError:
        raise UserError(f"{label}: a path holds no half of a surrogate pair ({item[:80]!r})") from None
    if "://" in item or item.startswith("data:"):
        raise UserError(f"image '{item[:80]}' is a URL; images are read from disk only: download it and name the file")
    root, path = os.path.realpath(base), os.path.realpath(os.path.join(base, item))
    if os.path.commonpath([root, path]) != root:
        raise UserError(f"image '{item}' leaves its base folder '{root}' (it is '{path}'); move it or widen image_base_path")
    if not os.path.isfile(path):
        raise UserError(f"image '{path}' " + ("is a folder" if os.path.isdir(path) else "does not exist"))
    return ImageRef(f"image '{path}'", path=path)


def size(ref: ImageRef) -> tuple[int, int]:
    """(height, width) as decoded, EXIF rotation included, from the header alone. Raises UserError for what is no image."""
    with ref.open() as stream, _opened(ref, stream) as image:
        return (image.width, image.height) if _orientation(image) >= 5 else (image.height, image.width)


def decode(ref: ImageRef) -> Image.Image:
    """The image as RGB: upright by its EXIF tag, first frame, transparency on white. Raises UserError where it cannot be decoded."""
    with ref.open() as stream, _opened(ref, stream) as image:
        turn = _TURNS.get(_orientation(image))
        try:
            image.load()
            return _rgb(image if turn is None else image.transpose(turn))
        except _CORRUPT as error:
            raise UserError(f"{ref.label} is corrupt: {error}") from None


def verify(ref: ImageRef) -> None:
    """Read the whole stream and throw the pixels away; JPEG at an eighth of its size, which still meets every byte. Raises UserError."""
    with ref.open() as stream, _opened(ref, stream) as image:
        try:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
        except _CORRUPT as error:
            raise UserError(f"{ref.label} is corrupt: {error}") from None


def open_image(path: str | Path) -> Image.Image:
    """Decode one file named by a user (no base folder). Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"image '{path}' does not exist")
    return decode(ImageRef(f"image '{path}'", path=str(path)))


def _opened(ref: ImageRef, stream: IO[bytes]) -> Image.Image:
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"{ref.label} is corrupt or no image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise UserError(f"{ref.label} unpacks to more than {MAX_PIXELS} pixels") from None
    except _CORRUPT as error:
        raise UserError(f"{ref.label} is corrupt: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{ref.label} is {image.width} x {image.height}: more than {MAX_PIXELS} pixels")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8, from what the header holds; PNG's own getexif would decode the picture to look behind it.

    1 for TIFF, which PIL turns by itself, for a block that cannot be parsed, and for a value that is no whole number.
    """
    if image.format == "TIFF":
        return 1
    try:
        found = Image.Image.getexif(image).get(0x0112, 1)
    except _CORRUPT:
        return 1
    return found if isinstance(found, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: scale, where convert() would clip
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
