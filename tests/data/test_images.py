"""Where images may come from, and how they are decoded."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sophiavl_fast.data import images
from sophiavl_fast.errors import UserError
from tests.data.conftest import picture


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def of(data: bytes) -> images.ImageRef:
    return images.ImageRef("image 1", data=data)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    picture().save(folder / "a.png")
    picture().save(tmp_path / "secret.png")
    return folder


@pytest.mark.parametrize("value", ["a.png", "./a.png", ["a.png"], {"path": "a.png"}, [{"bytes": None, "path": "a.png"}]])
def test_one_path_in_any_form(base, value):
    (found,) = images.references(value, base)
    assert found.path == str(base / "a.png") and images.size(found) == (40, 60)


@pytest.mark.parametrize("value", ["", None, [], [""]])
def test_no_image(base, value):
    assert images.references(value, base) == []


def test_bytes_and_many(base):
    data = encoded(picture(1))
    found = images.references([{"bytes": data, "path": "elsewhere.png"}, data, "a.png"], base)
    assert [f.path for f in found] == ["", "", str(base / "a.png")]
    assert np.array_equal(np.asarray(images.decode(found[0])), np.asarray(picture(1)))


@pytest.mark.parametrize("value", ["../secret.png", "sub/../../secret.png", "link.png", "folder/secret.png"])
def test_paths_stay_under_their_base(base, value):
    (base / "link.png").symlink_to(base.parent / "secret.png")
    (base / "folder").symlink_to(base.parent)
    with pytest.raises(UserError, match="leaves its base folder"):
        images.references(value, base)


def test_absolute_paths(base):
    assert images.references(str(base / "a.png"), base)[0].path == str(base / "a.png")
    with pytest.raises(UserError, match="leaves its base folder"):
        images.references(str(base.parent / "secret.png"), base)


def test_a_neighbour_with_the_same_prefix_is_outside(base):
    (base.parent / "base2").mkdir()
    picture().save(base.parent / "base2" / "a.png")
    with pytest.raises(UserError, match="leaves its base folder"):
        images.references("../base2/a.png", base)


def test_a_base_that_is_a_symlink_is_followed(base):
    (base.parent / "alias").symlink_to(base)
    assert images.references("a.png", base.parent / "alias")[0].path == str(base / "a.png")


@pytest.mark.parametrize("value", ["http://x.org/a.png", "https://x.org/a.png", "file:///etc/passwd", "s3://b/a.png", "data:image/png;base64,AA"])
def test_urls_are_refused(base, value):
    with pytest.raises(UserError, match="is a URL; images are read from disk only"):
        images.references(value, base)


def test_missing_folder_and_odd_values(base):
    with pytest.raises(UserError, match=r"image '.*/b.png' does not exist"):
        images.references("b.png", base)
    with pytest.raises(UserError, match="is a folder"):
        images.references(".", base)
    with pytest.raises(UserError, match="image 2: expected a path"):
        images.references(["a.png", 7], base)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def scratched(data: bytes) -> bytes:
    return data[:60] + bytes(40) + data[100:]


@pytest.mark.parametrize("read", [images.decode, images.verify])
@pytest.mark.parametrize("data", [
    half(encoded(picture(0, 200, 200))), half(encoded(picture(0, 200, 200), "JPEG")), half(encoded(picture(0, 200, 200), "WEBP")),
    scratched(encoded(picture(0, 200, 200))),  # JPEG has no checksum: its scratches decode
    b"not an image", b"", encoded(picture())[:20],
])
def test_corrupt_images(data, read):
    with pytest.raises(UserError, match="image 1 is corrupt") as error:
        read(of(data))
    assert "\n" not in str(error.value)


def test_transparency_goes_on_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    out = images.decode(of(encoded(clear)))
    assert out.mode == "RGB" and out.getpixel((0, 0)) == (0, 0, 255) and out.getpixel((7, 0)) == (255, 255, 255)
    keyed = Image.new("P", (4, 4), 0)
    keyed.putpalette([9, 9, 9] + [0] * 765)
    assert images.decode(of(encoded(keyed, transparency=0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    flat = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3) // 2)
    ref = of(encoded(flat, form, exif=exif, **({"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {})))
    out = images.decode(ref)
    assert images.size(ref) == (out.height, out.width) == ((40, 20) if orientation >= 5 else (20, 40))
    if form != "JPEG":
        stored = Image.open(io.BytesIO(encoded(flat)))
        stored.getexif()[0x0112] = orientation
        assert np.array_equal(np.asarray(out), np.asarray(ImageOps.exif_transpose(stored)))


def test_a_broken_exif_block_says_nothing():
    assert images.decode(of(encoded(picture(), "JPEG", exif=b"Exif\x00\x00garbage"))).size == (60, 40)


def with_orientation(kind: int, value: bytes) -> bytes:
    """A JPEG of 60 x 40 whose EXIF orientation has this TIFF type: 1 BYTE, 2 ASCII, 3 SHORT, 7 UNDEFINED."""
    count = len(value) // 2 if kind == 3 else len(value)
    block = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + struct.pack(">HHHI", 1, 0x0112, kind, count) + value.ljust(4, b"\x00") + bytes(4)
    return encoded(picture(), "JPEG", exif=block)


@pytest.mark.parametrize("kind,value,turned", [(3, b"\x00\x06", True), (2, b"6\x00", False), (7, b"\x06", False), (7, b"\x00\x06", False),
                                              (1, b"\x06\x06", False)])
def test_an_orientation_that_is_no_number_is_none(kind, value, turned):
    ref = of(with_orientation(kind, value))
    assert images.decode(ref).size == images.size(ref)[::-1] == ((40, 60) if turned else (60, 40))
    images.verify(ref)


@pytest.mark.parametrize("height,width", [(6, 100), (100, 6), (1, 1), (7, 7), (8, 8)])
def test_thin_pictures(height, width):
    ref = of(encoded(picture(0, height, width), "JPEG"))
    images.verify(ref)
    assert images.size(ref) == (height, width) and images.decode(ref).size == (width, height)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), OverflowError("too large"), struct.error("short"), IndexError("index out of range")])
@pytest.mark.parametrize("read", [images.decode, images.verify, images.size])
def test_what_a_decoder_raises_at_bad_bytes_is_one_line(monkeypatch, read, error):
    def bad(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", bad) if read is images.size else monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", bad)
    with pytest.raises(UserError, match=f"image 1 is corrupt: {error}"):
        read(of(encoded(picture())))


def test_a_path_with_half_a_surrogate_pair(base):
    with pytest.raises(UserError, match=r"image 1: a path holds no half of a surrogate pair \('a\\ud83d.png'\)"):
        images.references("a\ud83d.png", base)


def test_size_reads_the_header_alone():
    """A picture whose pixels are gone still has a size: 130,000 of them are measured without decoding one."""
    assert images.size(of(encoded(picture(0, 200, 300))[:200])) == (200, 300)


def test_grey_palette_and_deep_images():
    assert images.decode(of(encoded(Image.new("L", (4, 4), 77)))).getpixel((0, 0)) == (77, 77, 77)
    assert images.decode(of(encoded(Image.new("1", (4, 4), 1)))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    assert images.decode(of(encoded(deep))).getpixel((0, 0)) == (128, 128, 128)
    assert images.decode(of(encoded(Image.new("CMYK", (4, 4)), "JPEG"))).mode == "RGB"


def test_bombs_are_refused_from_the_header():
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + encoded(Image.new("1", (8, 8)))[33:]
    for read in (images.size, images.decode, images.verify):
        with pytest.raises(UserError, match="more than 134217728 pixels"):
            read(of(bomb))


def test_formats_that_run_programs_are_refused():
    with pytest.raises(UserError, match="no image"):
        images.decode(of(encoded(picture(), "EPS")))


def test_open_image(base):
    assert images.open_image(base / "a.png").size == (60, 40)
    with pytest.raises(UserError, match="does not exist"):
        images.open_image(base / "b.png")
