"""What a person's phone and programs give: HEIC, very large photos, bytes, open files."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_unitune.errors import PhotoError
from lora_unitune.photo.reading import load_photo


@pytest.fixture
def picture() -> Image.Image:
    """A 64 x 48 picture of two gradients."""
    rows, columns = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([rows * 5, columns * 4, rows + columns], -1).astype(np.uint8))


def difference(photo: Any, true: Image.Image) -> float:
    """Returns the mean difference of a photo from a picture, in levels of 255."""
    return float(np.abs(np.asarray(load_photo(photo).image).astype(int) - np.asarray(true)).mean())


def test_heic_is_read_upright(tmp_path: Path, picture: Image.Image) -> None:
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(picture).save(tmp_path / "a.heic", quality=95)
    pillow_heif.from_pillow(picture.rotate(90, expand=True)).save(
        tmp_path / "b.heic", quality=95, exif=exif.tobytes()
    )
    for source in (tmp_path / "a.heic", (tmp_path / "a.heic").read_bytes(), tmp_path / "b.heic"):
        assert difference(source, picture) < 4
        assert load_photo(source).notes == ()


@pytest.mark.parametrize(
    ("missing", "name", "message"),
    [
        ("pillow_heif", "a.heic", r"HEIC photo; save it as a JPEG, or pip install 'lora-unitune\[photos\]'"),
        (
            "tifffile",
            "a.tif",
            r"unusual depth or damaged; save it .*, or pip install 'lora-unitune\[photos\]'",
        ),
    ],
)
def test_without_its_library_a_file_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, name: str, message: str
) -> None:
    starts = {"a.heic": b"\0\0\0\x18ftypheic" + bytes(12), "a.tif": b"II*\0" + bytes(40)}
    (tmp_path / name).write_bytes(starts[name])
    monkeypatch.setitem(sys.modules, missing, None)  # as if it weren't installed
    with pytest.raises(PhotoError, match=message):
        load_photo(tmp_path / name)


@pytest.mark.parametrize(("mode", "factor"), [("RGB", 2), ("L", 2), ("CMYK", 2), ("RGB", 1.2)])
def test_a_jpeg_with_too_many_pixels_is_read_at_a_reduced_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Image.Image, mode: str, factor: float
) -> None:
    large = picture.resize((640, 480)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 3
    large.save(tmp_path / "large.jpg", quality=95, exif=exif)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(640 * 480 / factor / 1.01 / 1.4))
    for source in (tmp_path / "large.jpg", (tmp_path / "large.jpg").read_bytes()):
        photo = load_photo(source)
        assert photo.image.size == (320, 240)
        assert photo.notes == ("it is read at 320 x 240 of its 640 x 480 pixels",)
        small = picture.resize((320, 240)).convert(mode).convert("RGB").rotate(180)
        assert difference(source, small) < 5


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
def test_other_files_with_too_many_pixels_are_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Image.Image, name: str
) -> None:
    picture.save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 7)
    with pytest.raises(PhotoError, match="million pixels; make it smaller first, or save it as a JPEG"):
        load_photo(tmp_path / name)


def test_a_photo_is_taken_as_a_path_bytes_or_an_open_file(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    content = path.read_bytes()
    with path.open("rb") as file:
        for source in (str(path), path, content, bytearray(content), io.BytesIO(content), file, picture):
            assert load_photo(source).digest == load_photo(path).digest
    with path.open("rb") as file:
        assert load_photo(file).source == str(path)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], np.zeros((64, 64, 3)), io.StringIO("text"), b"x", ""])
def test_what_is_no_photo_is_one_line(source: Any) -> None:
    with pytest.raises(PhotoError) as caught:
        load_photo(source)
    assert "\n" not in str(caught.value)
