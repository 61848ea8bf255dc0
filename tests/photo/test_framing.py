"""Framing: a photo of any shape is resized to a size that the base supports, without cropping if possible."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from lora_unitune.errors import PhotoError
from lora_unitune.photo.framing import LONGEST_SHAPE, choose_size, frame
from lora_unitune.photo.reading import load_photo
from lora_unitune.settings import PhotoSettings

OWN = PhotoSettings()
BASES = [((64, 64), 16), ((512, 512), 64), ((1024, 1024), 64), ((32, 32), 4)]
SHAPES = [(4000, 3000), (3000, 4000), (4032, 2268), (1500, 1000), (900, 900), (1080, 2400), (5000, 500)]


def gradient(width: int, height: int) -> Image.Image:
    """An image whose red grows from left to right, and whose green grows from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@pytest.mark.parametrize(("own", "step"), BASES)
@pytest.mark.parametrize("photo", SHAPES)
def test_the_size_suits_the_base_and_is_near_to_the_photo(
    own: tuple[int, int], step: int, photo: tuple[int, int]
) -> None:
    width, height = choose_size(photo, OWN, own, step)
    assert width % step == height % step == 0
    assert 0.7 <= width * height / (own[0] * own[1]) <= 1.3
    wanted = min(max(photo[0] / photo[1], 1 / LONGEST_SHAPE), LONGEST_SHAPE)
    assert abs(math.log(width / height / wanted)) < math.log(1.15)
    assert choose_size(photo[::-1], OWN, own, step) == (height, width)


@pytest.mark.parametrize(("own", "step"), BASES)
def test_a_square_photo_gets_the_bases_own_size(own: tuple[int, int], step: int) -> None:
    assert choose_size((700, 700), OWN, own, step) == own


def test_a_number_of_pixels_and_an_exact_size_are_kept() -> None:
    assert choose_size((300, 200), PhotoSettings("96x33"), (64, 64), 16) == (96, 33)
    width, height = choose_size((300, 200), PhotoSettings("24576"), (64, 64), 16)
    assert (width, height) == (192, 128)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256), (320, 200)])
def test_a_photo_of_nearly_the_shape_is_not_cropped(shape: tuple[int, int]) -> None:
    photo = load_photo(gradient(*shape))
    size = choose_size(shape, OWN, (64, 64), 16)
    framed = np.asarray(frame(photo, size).image).astype(int)
    assert framed.shape == (size[1], size[0], 3)
    assert framed[:, 0, 0].max() < 8 and framed[:, -1, 0].min() > 247, "from its left to its right edge"
    assert framed[0, :, 1].max() < 8 and framed[-1, :, 1].min() > 247, "from its top to its bottom edge"


def test_a_panorama_is_center_cropped_with_a_note() -> None:
    framed = frame(load_photo(gradient(1000, 100)), choose_size((1000, 100), OWN, (64, 64), 16))
    assert framed.image.size == (96, 48)
    assert "the base sees only its centre, 200 of 1000 pixels of its width" in framed.notes
    red = np.asarray(framed.image)[..., 0]
    assert red.min() > 95 and red.max() < 160, "the middle fifth"


def test_a_photo_of_the_right_size_is_unchanged() -> None:
    image = gradient(64, 48)
    framed = frame(load_photo(image), (64, 48))
    assert framed.image.tobytes() == image.tobytes() and framed.notes == ()
    assert framed.digest == load_photo(image).digest


def test_a_change_of_shape_and_an_enlargement_are_noted_and_a_tiny_photo_is_refused() -> None:
    notes = " ".join(frame(load_photo(gradient(300, 200)), (80, 48)).notes)
    assert "changes its shape by 11 %" in notes
    (note,) = frame(load_photo(gradient(32, 32)), (64, 64)).notes
    assert "enlarged from 32 x 32 to 64 x 64" in note
    with pytest.raises(PhotoError, match="needs at least 128 x 128"):
        frame(load_photo(gradient(64, 64)), (512, 512))
    with pytest.raises(PhotoError, match="needs at least 16 x 16"):
        frame(load_photo(gradient(15, 32)), (32, 32))
