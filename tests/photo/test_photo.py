"""Photos: any image is read as upright sRGB, or raises one clear error."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lora_unitune.errors import PhotoError
from lora_unitune.photo.reading import load_photo, photo_to_tensor

SIDE = 32


@pytest.fixture
def quarters() -> Image.Image:
    """A 32 x 32 RGB image of four colours, which detects any rotation or flip."""
    image = Image.new("RGB", (SIDE, SIDE))
    for index, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]):
        image.paste(colour, (index % 2 * 16, index // 2 * 16, index % 2 * 16 + 16, index // 2 * 16 + 16))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_an_rgb_image_is_unchanged(tmp_path: Path, quarters: Image.Image) -> None:
    quarters.save(tmp_path / "a.png")
    for source in (quarters, tmp_path / "a.png", str(tmp_path / "a.png")):
        photo = load_photo(source)
        assert np.array_equal(pixels(photo.image), pixels(quarters))
        assert photo.notes == ()
    assert load_photo(quarters).source == "PIL image"


def test_the_tensor_runs_from_minus_one_to_one(quarters: Image.Image) -> None:
    tensor = photo_to_tensor(load_photo(quarters))
    assert tensor.shape == (1, 3, SIDE, SIDE) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert torch.equal(tensor[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_photo_upright(tmp_path: Path, quarters: Image.Image, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quarters.transpose(undo[orientation]) if orientation in undo else quarters
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(load_photo(tmp_path / "turned.png").image), pixels(quarters))


def test_the_digest_follows_pixels_and_shape_but_not_the_file(tmp_path: Path, quarters: Image.Image) -> None:
    for name in ("a.png", "a.bmp", "a.tif"):
        quarters.save(tmp_path / name)
        assert load_photo(tmp_path / name).digest == load_photo(quarters).digest
    changed = quarters.copy()
    changed.putpixel((3, 4), (1, 2, 3))
    plain = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))
    digests = {load_photo(image).digest for image in (quarters, changed, *plain)}
    assert len(digests) == 4 and all(len(digest) == 32 for digest in digests)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "LA", "RGBA"])
def test_other_modes_become_rgb(mode: str, quarters: Image.Image) -> None:
    photo = load_photo(quarters.convert(mode))
    assert photo.image.mode == "RGB" and photo.notes == ()
    assert np.abs(pixels(photo.image) - pixels(quarters.convert(mode))).max() <= 1


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "P"), ("a.tif", "CMYK"), ("a.jpg", "CMYK"), ("a.bmp", "RGB")]
)
def test_files_of_other_modes_are_read(tmp_path: Path, quarters: Image.Image, name: str, mode: str) -> None:
    quarters.convert(mode).save(tmp_path / name)
    assert np.abs(pixels(load_photo(tmp_path / name).image) - pixels(quarters)).mean() < 16


def test_sixteen_bit_greys_keep_their_brightness(tmp_path: Path) -> None:
    greys = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE)
    Image.fromarray(greys.astype(np.uint16)).save(tmp_path / "deep.png")
    for source in (
        tmp_path / "deep.png",
        Image.fromarray(greys.astype(np.int32)),
        Image.fromarray(greys / 65535),
    ):
        photo = load_photo(source)
        assert np.abs(pixels(photo.image)[..., 0] - greys / 257).max() <= 1
        assert photo.deep is not None and np.abs(photo.deep[..., 0] - greys).max() <= 1


def test_transparent_parts_are_shown_on_white(tmp_path: Path, quarters: Image.Image) -> None:
    layered = quarters.convert("RGBA")
    layered.paste((9, 9, 9, 0), (0, 0, 16, 16))
    layered.save(tmp_path / "clear.png")
    photo = load_photo(tmp_path / "clear.png")
    assert photo.image.getpixel((4, 4)) == (255, 255, 255) and photo.image.getpixel((28, 4)) == (0, 255, 0)
    assert photo.notes == ("its transparent parts become white",)
    palette = quarters.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert load_photo(tmp_path / "palette.png").image.getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp", "pages.tif"])
def test_the_first_frame_is_used(tmp_path: Path, quarters: Image.Image, name: str) -> None:
    others = [Image.new("RGB", (SIDE, SIDE), "black"), Image.new("RGB", (SIDE, SIDE), "white")]
    options = {"lossless": True} if name.endswith("webp") else {}
    quarters.save(tmp_path / name, save_all=True, append_images=others, **options)
    photo = load_photo(tmp_path / name)
    assert np.abs(pixels(photo.image) - pixels(quarters)).max() <= 2
    assert photo.notes == ("the first of 3 frames is used",)


def test_an_embedded_profile_is_applied_and_a_broken_one_ignored(
    tmp_path: Path, quarters: Image.Image
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    quarters.save(tmp_path / "srgb.png", icc_profile=profile)
    quarters.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    for name in ("srgb.png", "broken.png"):
        assert np.abs(pixels(load_photo(tmp_path / name).image) - pixels(quarters)).max() <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif"])
def test_cut_off_files_are_one_clear_error(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0.9, 0.5, 0.1):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(PhotoError, match="damaged or incomplete|isn't an image") as caught:
            load_photo(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")
    for name in ("text.jpg", "empty.png", "page.eps"):
        with pytest.raises(PhotoError, match=f"{name} isn't an image"):
            load_photo(tmp_path / name)
    with pytest.raises(PhotoError, match="doesn't exist"):
        load_photo(tmp_path / "none.png")
    with pytest.raises(PhotoError, match="is a folder"):
        load_photo(tmp_path)


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = side.to_bytes(4, "big") * 2  # width and height in the header
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bytes(content))
    with pytest.raises(PhotoError, match="more than 125 million pixels"):
        load_photo(tmp_path / "bomb.png")
