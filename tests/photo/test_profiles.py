"""Colour profiles: one that is embedded counts in every mode and at every depth."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_unitune.photo.reading import load_photo

WHITE = (0.9642, 1.0, 0.8249)  # D50
SRGB = {"rXYZ": (0.4361, 0.2225, 0.0139), "gXYZ": (0.3851, 0.7169, 0.0971), "bXYZ": (0.1431, 0.0606, 0.7141)}


def fixed(numbers: tuple[float, ...]) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def linear_profile(space: str) -> bytes:
    """Returns an ICC profile without gamma: "GRAY", or "RGB " with the primaries of sRGB."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256) + bytes(2)
    tags = {
        "wtpt": b"XYZ " + bytes(4) + fixed(WHITE),
        "desc": b"desc" + bytes(4) + struct.pack(">I", 1) + bytes(80),
    }
    tags |= {name: b"XYZ " + bytes(4) + fixed(xyz) for name, xyz in SRGB.items() if space == "RGB "}
    tags |= dict.fromkeys(["kTRC"] if space == "GRAY" else ["rTRC", "gTRC", "bTRC"], curve)
    place, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += name.encode() + struct.pack(">II", place + len(data), len(content))
        data += padded
    size = struct.pack(">I", place + len(data))
    header = size + bytes(4) + b"\2\x40\0\0mntr" + space.encode() + b"XYZ " + bytes(12) + b"acsp"
    return header + bytes(28) + fixed(WHITE) + bytes(48) + table + data


def linear(image: Image.Image, most: int = 255) -> np.ndarray:
    """Returns an sRGB image's linear values, 0 to `most`, rounded."""
    values = np.asarray(image) / 255
    values = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return (values * most).round().astype(np.uint8 if most == 255 else np.uint16)


@pytest.fixture
def blocks() -> Image.Image:
    """An sRGB image of 64 colours, none of them too dark for 8 linear bits."""
    colors = np.random.default_rng(0).integers(60, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((64, 64), Image.Resampling.NEAREST)


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "RGB.png": lambda image: Image.fromarray(linear(image)),
    "RGB.tif": lambda image: Image.fromarray(linear(image)),
    "RGBA.png": lambda image: Image.fromarray(linear(image)).convert("RGBA"),
    "P.png": lambda image: Image.fromarray(linear(image)).quantize(64),
    "L.png": lambda image: Image.fromarray(linear(image.convert("L"))),
    "L.tif": lambda image: Image.fromarray(linear(image.convert("L"))),
    "LA.png": lambda image: Image.fromarray(linear(image.convert("L"))).convert("LA"),
    "I;16.png": lambda image: Image.fromarray(linear(image.convert("L"), 65535)),
    "I;16.tif": lambda image: Image.fromarray(linear(image.convert("L"), 65535)),
    "F.tif": lambda image: Image.fromarray((linear(image.convert("L"), 65535) / 65535).astype(np.float32)),
}


@pytest.mark.parametrize("space", ["GRAY", "RGB "])
@pytest.mark.parametrize("name", MODES)
def test_the_profile_counts_in_every_mode(tmp_path: Path, blocks: Image.Image, name: str, space: str) -> None:
    image = MODES[name](blocks)
    is_gray = image.mode not in ("RGB", "RGBA", "P")
    image.save(tmp_path / name, icc_profile=linear_profile(space))
    read = np.asarray(load_photo(tmp_path / name).image).astype(int)
    if space == "GRAY" and not is_gray:  # it describes no such picture: what other programs show
        assert np.array_equal(read, np.asarray(image.convert("RGB")))
    else:
        true = np.asarray((blocks.convert("L") if is_gray else blocks).convert("RGB")).astype(int)
        assert np.abs(read - true).max() <= 3


def test_the_dark_of_a_deep_linear_gray_keeps_its_steps(tmp_path: Path) -> None:
    greys = Image.fromarray(np.arange(64, dtype=np.uint8).repeat(64).reshape(64, 64))
    Image.fromarray(linear(greys, 65535)).save(tmp_path / "deep.tif", icc_profile=linear_profile("GRAY"))
    read = np.asarray(load_photo(tmp_path / "deep.tif").image)[..., 0].astype(int)
    assert len(np.unique(read)) > 50 and np.abs(read - np.asarray(greys)).max() <= 4


def test_lab_is_read(tmp_path: Path) -> None:
    Image.new("LAB", (32, 32), (255, 128, 128)).save(tmp_path / "lab.tif")
    assert min(load_photo(tmp_path / "lab.tif").image.getpixel((4, 4))) >= 253
