"""Photos of more than 8 bits: the file's type and tags say what is white, or a guess is noted."""

from __future__ import annotations

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
    assert bool(load_photo(tmp_path / "a.tif").notes) == (dtype not in ("uint16", "int16")), "more than 16 bits"


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
