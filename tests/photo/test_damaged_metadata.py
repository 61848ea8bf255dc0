"""A photo whose EXIF block, color profile or XMP is damaged is read, with a note, and its edits are written."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from lora_unitune.photo.reading import load_photo
from lora_unitune.photo.writing import read_settings, save_edit

SIZE, SETTINGS = (60, 40), {"prompt": "a fox"}


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))


def exif_block() -> bytes:
    """What a camera writes: texts, fractions, a maker note, blocks in the block, a thumbnail's entries."""
    exif = Image.Exif()
    exif.update({0x010F: "Camera", 0x0112: 6, 0x011A: 72.0, 0x0128: 2, 0x8298: "(c)", 0x9C9B: b"T\0"})
    more = {0x829A: 0.004, 0x9000: b"0230", 0x9003: "2026:01:02 03:04:05", 0x927C: bytes(range(256))}
    exif.get_ifd(0x8769).update({**more, 0xA432: (24.0, 70.0, 2.8, 4.0), 0xA005: {1: "R98", 2: b"0100"}})
    exif.get_ifd(0x8825).update({0: b"\2\3\0\0", 1: "N", 2: (1.0, 2.0, 3.0), 6: 100.0})
    exif.get_ifd(1)[0x0103] = 6
    return exif.tobytes()


BLOCKS = {
    "exif": exif_block(),
    "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "xmp": b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF>'
    b"</x:xmpmeta>",
}


def damaged(block: bytes, rng: np.random.Generator) -> bytes:
    """Returns a block with some bytes changed, cut off, taken out, put in, or numbers made extreme."""
    content, way, place = bytearray(block), rng.integers(5), int(rng.integers(len(block)))
    if way == 0:
        content[place] = rng.integers(256)
    elif way == 1:
        del content[place:]
    elif way == 2:
        del content[place : place + int(rng.integers(1, 20))]
    elif way == 3:
        content[place:place] = rng.bytes(int(rng.integers(1, 20)))
    else:
        content[place : place + 4] = int(rng.choice([0, 1, 8, 2**16, 2**31 - 1, 2**32 - 1])).to_bytes(
            4, "big"
        )
    return bytes(content)


def file_of(kind: str, name: str, block: bytes) -> bytes:
    stream, options = io.BytesIO(), {name: block} if block else {}
    if kind == "PNG" and name == "xmp":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", block.decode("latin1"))
        options: dict[str, Any] = {"pnginfo": text}
    picture().save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_photo_is_lost_by_what_its_file_says_of_it(tmp_path: Path, kind: str, name: str) -> None:
    rng = np.random.default_rng(len(kind) + len(name))
    noted = 0
    for number in range(30):
        content = file_of(kind, name, damaged(BLOCKS[name], rng))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            photo = load_photo(content)
            assert sorted(photo.image.size) == sorted(SIZE)
            assert all("damaged" in note for note in photo.notes)
            noted += bool(photo.notes)
            ending = (".jpg", ".png", ".tif")[number % 3]
            path = tmp_path / f"out{number}{ending}"
            save_edit(photo.image, path, SETTINGS, photo, keep_gps=True)
            assert read_settings(path) == SETTINGS
            again = load_photo(path)
        assert again.notes == () and again.image.size == photo.image.size, "what is written is whole"
    assert noted or name == "xmp", "damage is noted"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_whole_blocks_are_kept_without_a_note(tmp_path: Path, kind: str) -> None:
    for name, block in BLOCKS.items():
        photo = load_photo(file_of(kind, name, block))
        assert photo.notes == ()
        if name == "exif":
            assert photo.image.size == SIZE[::-1]
            save_edit(photo.image, tmp_path / "out.jpg", SETTINGS, photo, overwrite=True)
            with Image.open(tmp_path / "out.jpg") as saved:
                assert saved.getexif()[0x8298] == "(c)"
                assert saved.getexif().get_ifd(0x8769)[0xA432] == (24.0, 70.0, 2.8, 4.0)
        assert name != "icc_profile" or photo.profile == block


@pytest.mark.parametrize("name", BLOCKS)
def test_a_wrong_checksum_of_a_block_costs_the_block_alone(tmp_path: Path, name: str) -> None:
    content = bytearray(file_of("PNG", name, BLOCKS[name]))
    place = content.index({"exif": b"eXIf", "icc_profile": b"iCCP", "xmp": b"iTXt"}[name])
    content[place + 20] ^= 255
    (tmp_path / "photo.png").write_bytes(content)
    for source in (tmp_path / "photo.png", bytes(content)):
        photo = load_photo(source)
        assert photo.notes == ("some of what it says beside its pixels is damaged, and dropped",)
        assert np.array_equal(np.asarray(photo.image), np.asarray(picture()))
        assert photo.exif == b"" and photo.profile is None
