"""Files of edits: what they keep of the photo's file, and what they say about the edit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_unitune.errors import OutputError
from lora_unitune.output import PICTURES
from lora_unitune.photo.reading import load_photo
from lora_unitune.photo.writing import read_settings, save_edit

SETTINGS = {"prompt": "a fox, café", "seed": 3, "guidance": 2.5}
EXACT = (".png", ".tif", ".tiff")
MAKE, ORIENTATION, EXIF, GPS, TAKEN = 0x010F, 0x0112, 0x8769, 0x8825, 0x9003


def picture(width: int = 60, height: int = 40) -> Image.Image:
    x, y = np.meshgrid(np.linspace(20, 230, width), np.linspace(20, 230, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))


def phone_photo(path: Path, **more: Any) -> Path:
    """A JPEG as a phone writes it: turned, with a thumbnail, the camera's name and the position."""
    exif = Image.Exif()
    exif[MAKE], exif[ORIENTATION] = "Camera", 6
    exif.get_ifd(EXIF)[TAKEN] = "2026:01:02 03:04:05"
    exif.get_ifd(GPS)[1] = "N"
    exif.get_ifd(1).update({0x0103: 6})
    picture().rotate(90, expand=True).save(path, exif=exif, quality=95, **more)
    return path


@pytest.mark.parametrize("ending", PICTURES)
def test_each_type_keeps_the_photos_entries_and_has_the_settings(tmp_path: Path, ending: str) -> None:
    photo = load_photo(phone_photo(tmp_path / "phone.jpg"))
    for keep_gps in (False, True):
        path = tmp_path / f"out{keep_gps}{ending}"
        save_edit(photo.image, path, SETTINGS, photo, keep_gps)
        assert read_settings(path) == SETTINGS
        with Image.open(path) as saved:
            exif = saved.getexif()
            assert saved.size == (60, 40) and saved.format == PICTURES[ending]
            assert exif[MAKE] == "Camera" and exif.get(ORIENTATION, 1) == 1
            assert exif.get_ifd(EXIF)[TAKEN] == "2026:01:02 03:04:05"
            assert dict(exif.get_ifd(GPS)) == ({1: "N"} if keep_gps else {})
            assert not exif.get_ifd(1), "no thumbnail"
            difference = np.asarray(saved.convert("RGB")).astype(int) - np.asarray(photo.image)
            assert np.abs(difference).mean() < (3 if ending not in EXACT else 1e-9)
    assert load_photo(path).image.size == (60, 40), "not turned again"


@pytest.mark.parametrize("ending", PICTURES)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_what_a_tiff_says_of_its_own_pixels_is_not_kept(tmp_path: Path, ending: str, mode: str) -> None:
    """Its strips, depth and compression aren't those of the edit; who made it is."""
    exif = Image.Exif()
    exif[MAKE] = "Scanner"
    compression = "group4" if mode == "1" else "tiff_lzw"
    gray = (
        picture().convert("L").point(lambda value: value * 256, "I").convert("I;16")
        if mode == "I;16"
        else None
    )
    (gray or picture().convert(mode)).save(tmp_path / "photo.tif", compression=compression, exif=exif)
    photo = load_photo(tmp_path / "photo.tif")
    save_edit(photo.image, tmp_path / f"out{ending}", SETTINGS, photo)
    assert read_settings(tmp_path / f"out{ending}") == SETTINGS
    again = load_photo(tmp_path / f"out{ending}")
    assert again.image.size == photo.image.size and again.profile is None
    assert ending not in EXACT or np.array_equal(np.asarray(again.image), np.asarray(photo.image))
    with Image.open(tmp_path / f"out{ending}") as saved:
        entries = saved.getexif()
        assert entries[MAKE] == "Scanner" and saved.mode == "RGB"
        assert ending.startswith(".tif") or not {258, 259, 262, 273, 279, 320, 338} & set(entries)


@pytest.mark.parametrize("ending", PICTURES)
@pytest.mark.parametrize("of_photo", [True, False])
def test_each_type_says_that_it_is_edited(tmp_path: Path, ending: str, of_photo: bool) -> None:
    photo = load_photo(picture()) if of_photo else None
    save_edit(picture(), tmp_path / f"out{ending}", SETTINGS, photo)
    word = "compositeWithTrainedAlgorithmicMedia" if of_photo else "/trainedAlgorithmicMedia"
    with Image.open(tmp_path / f"out{ending}") as saved:
        packets = [saved.info.get(name, "") for name in ("xmp", "XML:com.adobe.xmp")]
        assert any(word in (each.decode() if isinstance(each, bytes) else each) for each in packets)


@pytest.mark.parametrize("ending", PICTURES)
def test_a_color_profile_is_kept_and_the_colors_look_the_same(tmp_path: Path, ending: str) -> None:
    photo_file, profile = tmp_path / "wide.png", wide_profile()
    picture().save(photo_file, icc_profile=profile)
    photo = load_photo(photo_file)
    assert np.abs(np.asarray(photo.image).astype(int) - np.asarray(picture())).mean() > 1, "it isn't sRGB"
    save_edit(photo.image, tmp_path / f"out{ending}", SETTINGS, photo)
    with Image.open(tmp_path / f"out{ending}") as saved:
        assert saved.info["icc_profile"] == profile
    again = load_photo(tmp_path / f"out{ending}").image
    assert np.abs(np.asarray(again).astype(int) - np.asarray(photo.image)).mean() < 3


def wide_profile() -> bytes:
    """An RGB color profile that isn't sRGB's: sRGB with red and blue exchanged."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(content[128:132], "big")
    entries = {bytes(content[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    content[red : red + 4], content[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(content)


def test_a_damaged_exif_block_or_profile_is_dropped(tmp_path: Path) -> None:
    exif, path = b"Exif\0\0II*\0\xff\xff\xff\x7f broken", tmp_path / "broken.jpg"
    picture().save(path, exif=exif, icc_profile=b"no profile")
    photo = load_photo(path)
    assert photo.image.size == (60, 40)
    save_edit(photo.image, tmp_path / "out.jpg", SETTINGS, photo)
    assert read_settings(tmp_path / "out.jpg") == SETTINGS
    assert "icc_profile" not in Image.open(tmp_path / "out.jpg").info


def test_a_photo_without_entries_gets_none(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    photo = load_photo(stream.getvalue())
    assert photo.exif == b"" and photo.profile is None


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for name, settings in (("out.bmp", SETTINGS), ("out.jpg", {"prompt": "x" * 70_000})):
        with pytest.raises(OutputError, match=r"let it end in \.png|write a PNG instead"):
            save_edit(picture(), tmp_path / name, settings)
    assert not list(tmp_path.iterdir())
