"""Colour profiles: one that is embedded counts in every mode and at every depth."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from lora_unitune.photo.profiles import DeepProfile
from lora_unitune.photo.reading import load_photo

WHITE = (0.9642, 1.0, 0.8249)  # D50
SRGB = {"rXYZ": (0.4361, 0.2225, 0.0139), "gXYZ": (0.3851, 0.7169, 0.0971), "bXYZ": (0.1431, 0.0606, 0.7141)}


def fixed(numbers: tuple[float, ...]) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def linear_profile(space: str, more: Mapping[str, bytes] | None = None) -> bytes:
    """Returns an ICC profile without gamma: "GRAY", or "RGB " with the primaries of sRGB; and more tags."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256) + bytes(2)
    tags = {
        "wtpt": b"XYZ " + bytes(4) + fixed(WHITE),
        "desc": b"desc" + bytes(4) + struct.pack(">I", 1) + bytes(80),
    }
    tags |= {name: b"XYZ " + bytes(4) + fixed(xyz) for name, xyz in SRGB.items() if space == "RGB "}
    tags |= dict.fromkeys(["kTRC"] if space == "GRAY" else ["rTRC", "gTRC", "bTRC"], curve)
    tags |= more or {}
    place, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += name.encode() + struct.pack(">II", place + len(data), len(content))
        data += padded
    size = struct.pack(">I", place + len(data))
    header = size + bytes(4) + b"\2\x40\0\0mntr" + space.encode() + b"XYZ " + bytes(12) + b"acsp"
    return header + bytes(28) + fixed(WHITE) + bytes(48) + table + data


def table_profile() -> bytes:
    """Returns an ICC profile of RGB that has tables instead of curves: red is lightness, green and blue a and b."""
    ramp, corners = bytes(range(256)), bytes(255 * (n >> shift & 1) for n in range(8) for shift in (2, 1, 0))
    matrix = b"".join(fixed(tuple(float(i == j) for j in range(3))) for i in range(3))
    table = b"mft1" + bytes(4) + bytes([3, 3, 2, 0]) + matrix + 3 * ramp + corners + 3 * ramp
    profile = bytearray(linear_profile("RGB ", dict.fromkeys(["A2B0", "B2A0"], table)))
    profile[20:24] = b"Lab "
    return bytes(profile)


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


def curved(curve: bytes) -> bytes:
    """Returns an RGB profile with a curve of another kind."""
    return linear_profile("RGB ", dict.fromkeys(["rTRC", "gTRC", "bTRC"], curve + bytes(-len(curve) % 4)))


def parametric(kind: int, *numbers: float) -> bytes:
    return b"para" + bytes(4) + struct.pack(">HH", kind, 0) + fixed(numbers)


CURVES = {
    "identity": b"curv" + bytes(4) + struct.pack(">I", 0),
    "gamma": b"curv" + bytes(4) + struct.pack(">IH", 1, 563),
    "table": b"curv" + bytes(4) + struct.pack(">I257H", 257, *(n * n * 65535 // 65536 for n in range(257))),
    "power": parametric(0, 1.8),
    "CIE 122": parametric(1, 2.4, 1.1, -0.1),
    "IEC 61966-3": parametric(2, 2.4, 1.1, -0.1, 0.0),
    "sRGB": parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
    "with offsets": parametric(4, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045, 0.0, 0.0),
}


@pytest.mark.parametrize("name", CURVES)
def test_sixteen_bits_are_converted_as_eight_are(name: str) -> None:
    """The true answer is Little CMS's at 8 bits, without its shortcuts, within its rounding."""
    profile = curved(CURVES[name])
    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    eight = np.random.default_rng(0).integers(50, 256, (64, 64, 3), dtype=np.uint8)  # darker ones are steep
    deep, sixteen = DeepProfile(profile), eight.astype(np.uint16) * 257
    for start, end, convert in ((own, srgb, deep.to_srgb), (srgb, own, deep.from_srgb)):
        exact = ImageCms.profileToProfile(Image.fromarray(eight), start, end, flags=ImageCms.Flags.NOOPTIMIZE)
        assert np.abs(convert(sixteen) / 257 - np.asarray(exact)).max() < 0.6
    inside = deep.from_srgb(sixteen)
    assert np.abs(deep.to_srgb(inside).astype(int) - sixteen).max() <= 150, "and back, in 65,535 levels"


def test_a_profile_of_tables_is_used_at_eight_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (48, 64, 3), dtype=np.uint16)
    tags = [(34675, 7, None, table_profile(), True)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=tags)
    photo = load_photo(tmp_path / "a.tif")
    assert photo.deep is None and photo.profile == table_profile()
    (note,) = photo.notes
    assert "rounded to 8 bits" in note and "it has tables" in note
