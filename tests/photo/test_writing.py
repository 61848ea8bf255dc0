"""Files of edits: what they keep of the photo's file, and what they say about the edit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import room_for
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import get_sampling

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
    assert read_settings(tmp_path / f"out{ending}") == SETTINGS


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


def deep_picture() -> np.ndarray:
    """A picture with every kind of 16-bit value."""
    return np.random.default_rng(0).integers(0, 65_536, (40, 60, 3), dtype=np.uint16)


@pytest.mark.parametrize("profile", ["none", "wide"])
@pytest.mark.parametrize("ending", PICTURES)
def test_sixteen_bits_stay_where_the_file_holds_them(tmp_path: Path, ending: str, profile: str) -> None:
    tags = [(34675, 7, None, wide_profile(), True)] if profile == "wide" else []
    values = deep_picture()
    tifffile.imwrite(tmp_path / "photo.tif", values, photometric="rgb", extratags=tags)
    photo = load_photo(tmp_path / "photo.tif")
    path = tmp_path / f"out{ending}"
    notes = save_edit(photo.pixels, path, SETTINGS, photo)
    assert read_settings(path) == SETTINGS
    assert ("8 bits" in "".join(notes)) == (ending not in EXACT)
    with Image.open(path) as saved:
        assert saved.format == PICTURES[ending] and saved.getexif()[0x0131] == "lora_unitune"
        assert (saved.info.get("icc_profile") or None) == photo.profile
        assert (photo.profile is not None) == (profile == "wide")
        if ending in EXACT:
            text = saved.info.get("XML:com.adobe.xmp") or saved.info["xmp"].decode()
            assert "compositeWithTrainedAlgorithmicMedia" in text
    again = load_photo(path)
    if ending in EXACT:
        stored = again.deep if profile == "none" else again.own
        assert stored is not None and np.array_equal(stored, values), "its own values, in its own profile"
        if ending != ".png":
            assert np.array_equal(tifffile.imread(path), values), "as another reader has them"
    else:
        assert again.deep is None


@pytest.mark.parametrize("bits", [8, 16])
def test_in_a_profile_only_what_is_edited_is_converted(tmp_path: Path, bits: int) -> None:
    """Colors outside of sRGB are lost by a conversion there and back; the photo's own values have them."""
    values = deep_picture() if bits == 16 else deep_picture().astype(np.uint8)
    tags = [(34675, 7, None, wide_profile(), True)]
    tifffile.imwrite(tmp_path / "photo.tif", values, photometric="rgb", extratags=tags)
    photo = load_photo(tmp_path / "photo.tif")
    edit, white = photo.pixels.copy(), np.iinfo(photo.pixels.dtype).max
    edit[:10] = white - edit[:10]
    image = edit if bits == 16 else Image.fromarray(edit)
    save_edit(image, tmp_path / "out.tif", SETTINGS, photo)
    again = load_photo(tmp_path / "out.tif")
    assert again.own is not None and again.own.dtype == values.dtype
    assert np.array_equal(again.own[10:], values[10:])
    difference = np.abs(again.pixels[:10].astype(float) - edit[:10]) / white
    assert difference.mean() < 0.004


@pytest.mark.parametrize(("quality", "subsampling"), [(50, 2), (80, 1), (97, 0)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_has_the_quality_of_the_photos(
    tmp_path: Path, quality: int, subsampling: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture(64, 48).save(tmp_path / "photo.jpg", quality=quality, subsampling=subsampling, exif=exif)
    photo = load_photo(tmp_path / "photo.jpg")
    save_edit(photo.image, tmp_path / "out.jpg", SETTINGS, photo)
    before, after = Image.open(tmp_path / "photo.jpg"), Image.open(tmp_path / "out.jpg")
    turned = orientation == 6
    for number, table in before.quantization.items():
        square = np.reshape(table, (8, 8))
        assert np.array_equal(np.reshape(after.quantization[number], (8, 8)), square.T if turned else square)
    assert get_sampling(after) == (0 if turned and subsampling == 1 else subsampling)
    again = np.asarray(load_photo(tmp_path / "out.jpg").image).astype(int)
    assert np.abs(again - np.asarray(photo.image)).mean() < 1, "nearly what it was"


def test_other_photos_become_a_jpeg_of_high_quality(tmp_path: Path) -> None:
    save_edit(picture(), tmp_path / "out.jpg", SETTINGS, load_photo(picture()))
    assert max(Image.open(tmp_path / "out.jpg").quantization[0]) <= 16


def test_a_large_maker_note_is_dropped_rather_than_the_settings(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[MAKE], exif.get_ifd(EXIF)[0x927C] = "Camera", bytes(64_000)
    picture().save(tmp_path / "photo.png", exif=exif)
    photo = load_photo(tmp_path / "photo.png")
    (note,) = save_edit(photo.image, tmp_path / "out.jpg", {**SETTINGS, "negative_prompt": "x" * 3000}, photo)
    assert "camera's own EXIF entries" in note
    assert read_settings(tmp_path / "out.jpg")["negative_prompt"] == "x" * 3000


@pytest.mark.parametrize("ending", PICTURES)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_full_disk_leaves_nothing(tmp_path: Path, ending: str, bits: int) -> None:
    if bits == 16:
        tifffile.imwrite(tmp_path / "photo.tif", deep_picture(), photometric="rgb")
    else:
        phone_photo(tmp_path / "photo.jpg").rename(tmp_path / "photo.tif")
    photo, folder = load_photo(tmp_path / "photo.tif"), tmp_path / "folder"
    folder.mkdir()
    save_edit(photo.pixels if bits == 16 else photo.image, tmp_path / f"whole{ending}", SETTINGS, photo)
    size = (tmp_path / f"whole{ending}").stat().st_size
    for room in (0, 1, size // 2, size - 1):
        with room_for(room), pytest.raises(OutputError, match="can't be written"):
            save_edit(photo.pixels if bits == 16 else photo.image, folder / f"out{ending}", SETTINGS, photo)
        assert not list(folder.iterdir())
