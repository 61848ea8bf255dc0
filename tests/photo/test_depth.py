"""Photos of more than 8 bits: the file's type and tags say what is white, or a guess is noted."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from lora_unitune.errors import PhotoError
from lora_unitune.photo.reading import load_photo


def ramp(channels: int = 1) -> np.ndarray:
    """Returns a picture (64, 64) or (64, 64, channels) with values from 0 to 1."""
    values = np.linspace(0, 1, 64 * 64 * channels).reshape(64, 64, channels)
    return values[..., 0] if channels == 1 else values


def off_by(photo: Any, true: np.ndarray) -> float:
    """Returns the largest difference of a photo from values in [0, 1], in levels of 255."""
    read = np.asarray(load_photo(photo).image).astype(float)
    return float(np.abs(read - 255 * (true[..., None] if true.ndim == 2 else true[..., :3])).max())


def guesses(photo: Any) -> bool:
    notes = load_photo(photo).notes
    assert all("rounded to 16 bits" in note for note in notes) and len(notes) <= 1
    return any("is taken as black and" in note for note in notes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "white"), [("uint16", 65535), ("int16", 32767), ("float16", 1), ("float32", 1), ("float64", 1)]
)
def test_the_type_says_what_is_white(tmp_path: Path, dtype: str, white: int, channels: int) -> None:
    values = (ramp(channels) * 0.3 * white).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack" if channels == 1 else "rgb")
    assert off_by(tmp_path / "a.tif", values / white) <= 1
    assert not guesses(tmp_path / "a.tif")
    assert bool(load_photo(tmp_path / "a.tif").notes) == (dtype not in ("uint16", "int16")), (
        "more than 16 bits"
    )


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32"])
def test_tags_say_what_is_white(tmp_path: Path, dtype: str) -> None:
    kind = {"i": 9, "u": 4, "f": 11}[np.dtype(dtype).kind]
    tags = [(340, kind, 1, 1000, True), (341, kind, 1, 5000, True)]  # SMinSampleValue, SMaxSampleValue
    values = (1000 + 4000 * ramp() * 0.4).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=tags)
    assert off_by(tmp_path / "a.tif", 0.4 * ramp()) <= 1 and not guesses(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_tag_says_that_the_lowest_value_is_white(tmp_path: Path, dtype: str) -> None:
    white = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    tifffile.imwrite(tmp_path / "a.tif", (ramp() * white).astype(dtype), photometric="miniswhite")
    assert off_by(tmp_path / "a.tif", 1 - ramp()) <= 1


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("float32", 0, 1000),
        ("float32", 0, 255),
        ("float32", 0, 65535),
        ("float64", -1, 1),
        ("int32", 0, 255),
        ("int32", 0, 4095),
        ("int32", 0, 65535),
        ("int32", 0, 2**31 - 1),
        ("uint32", 0, 2**32 - 1),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_guess_is_noted(tmp_path: Path, dtype: str, low: float, high: float, channels: int) -> None:
    values = (low + (high - low) * ramp(channels)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack" if channels == 1 else "rgb")
    assert off_by(tmp_path / "a.tif", ramp(channels)) <= 2 and guesses(tmp_path / "a.tif")


def test_single_pixels_dont_change_the_range(tmp_path: Path) -> None:
    for odd in (1.004, -0.01, 40.0):
        values = ramp().astype(np.float32)
        values[10, 10] = odd
        Image.fromarray(values).save(tmp_path / "a.tif")
        assert guesses(tmp_path / "a.tif")
        values[10, 10] = min(max(odd, 0), 1)
        assert off_by(tmp_path / "a.tif", values) <= 1


def test_deep_photos_are_turned_and_layered(tmp_path: Path) -> None:
    values = ramp(4).astype(np.float32)
    values[..., 3] = 1
    tifffile.imwrite(
        tmp_path / "a.tif",
        values,
        photometric="rgb",
        extrasamples=["unassalpha"],
        extratags=[(274, 3, 1, 3, True)],
    )
    assert off_by(tmp_path / "a.tif", values[::-1, ::-1]) <= 1
    tifffile.imwrite(tmp_path / "b.tif", (ramp() * 65535).astype(np.uint16), extratags=[(274, 3, 1, 3, True)])
    assert off_by(tmp_path / "b.tif", ramp()[::-1, ::-1]) <= 1
    planar = np.moveaxis(ramp(3).astype(np.float32), -1, 0)
    tifffile.imwrite(tmp_path / "c.tif", planar, photometric="rgb", planarconfig="separate")
    assert off_by(tmp_path / "c.tif", ramp(3)) <= 1


def test_values_that_arent_numbers_and_odd_tiffs_are_one_line(tmp_path: Path) -> None:
    values = ramp(3).astype(np.float32)
    values[3, 3, 1] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", ramp(4).astype(np.float32), photometric="separated")
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "c.tif").write_bytes(content[:2000])
    (tmp_path / "d.tif").write_bytes(content[:100])
    for name in "abcd":
        with pytest.raises(PhotoError, match=rf"{name}\.tif is damaged or") as caught:
            load_photo(tmp_path / f"{name}.tif")
        assert "\n" not in str(caught.value) and "8 or 16 bits" in str(caught.value)


def noise(channels: int) -> np.ndarray:
    """Returns a picture (48, 64) or (48, 64, channels) of every kind of 16-bit value; its alpha is opaque."""
    values = np.random.default_rng(0).integers(0, 65_536, (48, 64, channels), dtype=np.uint16)
    values[..., 3:] = 65_535
    return values[..., 0] if channels == 1 else values


def png_of(values: np.ndarray) -> bytes:
    """Returns a PNG of 16 bits without filters."""
    height, width, channels = np.atleast_3d(values).shape
    lines = values.astype(">u2").reshape(height, -1).view(np.uint8)
    packed = zlib.compress(np.hstack([np.zeros((height, 1), np.uint8), lines]).tobytes())
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tif", "big-endian", "deflate", "tiles", "planes"])
def test_sixteen_bits_are_read_as_they_are(tmp_path: Path, kind: str, channels: int) -> None:
    values, path = noise(channels), tmp_path / "a.tif"
    options: dict[str, Any] = {
        "big-endian": {"byteorder": ">"},
        "tiles": {"tile": (32, 32)},
        "planes": {"planarconfig": "separate"},
    }.get(kind, {})
    if kind == "planes" and channels == 1:
        return
    if kind == "png":
        path.write_bytes(png_of(values))
    elif kind == "deflate":
        deflated(path, values)
    else:
        stored = np.ascontiguousarray(np.moveaxis(values, -1, 0)) if kind == "planes" else values
        if channels == 4:
            options["extrasamples"] = ["unassalpha"]
        tifffile.imwrite(path, stored, photometric="minisblack" if channels == 1 else "rgb", **options)
    for source in (path, path.read_bytes()):
        photo = load_photo(source)
        assert photo.deep is not None and photo.notes == ()
        assert np.array_equal(photo.deep, values[..., :3] if channels > 1 else np.stack([values] * 3, -1))
        assert np.array_equal(np.asarray(photo.image), (photo.deep / 257).round())


def deflated(path: Path, values: np.ndarray) -> None:
    """Writes a TIFF of 16 bits that is compressed by zlib, which Pillow leaves to libtiff."""
    height, width, channels = np.atleast_3d(values).shape
    entries = {256: width, 257: height, 258: (16,) * channels, 259: 8, 262: 1 if channels == 1 else 2}
    entries |= {277: channels, 278: height, 338: 2} if channels == 4 else {277: channels, 278: height}
    packed = zlib.compress(values.astype(">u2").tobytes())
    exif = Image.Exif()
    exif.update({**entries, 273: 0, 279: len(packed)})
    path.write_bytes(exif.tobytes()[6:] + packed)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bits_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    values = noise(3)
    tifffile.imwrite(
        tmp_path / "deep.tif", values, photometric="rgb", extratags=[(274, 3, 1, orientation, True)]
    )
    small = Image.fromarray((values >> 8).astype(np.uint8))
    small.save(tmp_path / "shallow.tif", tiffinfo={274: orientation})
    deep = load_photo(tmp_path / "deep.tif").deep
    assert deep is not None
    assert np.array_equal(deep >> 8, np.asarray(load_photo(tmp_path / "shallow.tif").image))


def test_transparent_parts_of_sixteen_bits_become_white(tmp_path: Path) -> None:
    values = noise(4)
    values[:24, :, 3], values[24:, :32, 3] = 0, 32_768
    (tmp_path / "clear.png").write_bytes(png_of(values))
    photo = load_photo(tmp_path / "clear.png")
    assert photo.deep is not None and photo.notes == ("its transparent parts become white",)
    assert (photo.deep[:24] == 65_535).all() and np.array_equal(photo.deep[24:, 32:], values[24:, 32:, :3])
    half = (values[24:, :32, :3].astype(float) + 65_535) / 2
    assert np.abs(photo.deep[24:, :32] - half).max() <= 2
