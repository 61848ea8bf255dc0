"""Framing: a photo of any shape is resized to a size that the base supports, without cropping if possible."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from lora_unitune.errors import PhotoError, RecipeError, SettingError
from lora_unitune.photo.framing import (
    LARGEST_ENLARGEMENT,
    LONGEST_SHAPE,
    Box,
    box_in,
    choose_size,
    faded,
    frame,
    seen_part,
    with_context,
)
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


BOXES = [
    (1200, 800, 900, 900),
    (0, 0, 100, 100),
    (3000, 2000, 1000, 1000),
    (10, 1400, 3980, 60),
    (1, 2, 16, 16),
]


def boxed(text: str) -> PhotoSettings:
    return PhotoSettings(box=text)


@pytest.mark.parametrize(("own", "step"), BASES)
@pytest.mark.parametrize("numbers", BOXES)
def test_a_box_is_seen_with_context_in_the_bases_shape(
    own: tuple[int, int], step: int, numbers: tuple[int, int, int, int]
) -> None:
    photo, (x, y, width, height) = (4000, 3000), numbers
    box = x, y, x + width, y + height
    size = choose_size(with_context(photo, box), OWN, own, step)
    left, top, right, bottom = seen_part(photo, size, box)
    assert 0 <= left <= x and 0 <= top <= y and right <= photo[0] and bottom <= photo[1]
    assert x + width <= right and y + height <= bottom, "all of the box"
    for side, seen, whole in ((width, right - left, 4000), (height, bottom - top, 3000)):
        assert seen >= min(whole, side + 2 * (side // 6)), "its context too"
    if right - left < photo[0] and bottom - top < photo[1]:
        assert math.isclose((right - left) / (bottom - top), size[0] / size[1], rel_tol=0.05)
    assert right - left >= size[0] / LARGEST_ENLARGEMENT and bottom - top >= size[1] / LARGEST_ENLARGEMENT


@pytest.mark.parametrize(("own", "step"), BASES)
@pytest.mark.parametrize("photo", SHAPES)
def test_the_whole_photo_as_a_box_is_seen_as_without_a_box(
    own: tuple[int, int], step: int, photo: tuple[int, int]
) -> None:
    box = 0, 0, *photo
    assert with_context(photo, box) == with_context(photo, None) == photo
    size = choose_size(photo, OWN, own, step)
    assert seen_part(photo, size, box) == seen_part(photo, size)


def test_a_framed_box_shows_its_part_of_the_photo() -> None:
    image = gradient(1000, 800)
    framed = frame(load_photo(image), (64, 64), (500, 300, 740, 540))
    values, context = np.asarray(framed.image).astype(int), 240 / 6
    assert framed.image.size == (64, 64) and framed.notes == ()
    for channel, axis, start, whole in ((0, 1, 500, 1000), (1, 0, 300, 800)):
        line = values[..., channel].mean(1 - axis)
        assert abs(line[0] - 255 * (start - context) / whole) < 3
        assert abs(line[-1] - 255 * (start + 240 + context) / whole) < 3


@pytest.mark.parametrize("box", [(60, 40, 120, 100), (0, 0, 60, 60), (100, 3, 200, 50), (0, 0, 200, 150)])
def test_an_edit_of_a_box_fades_in_its_context(box: Box) -> None:
    photo = 200, 150
    size = choose_size(with_context(photo, box), OWN, (64, 64), 16)
    left, top, right, bottom = seen = seen_part(photo, size, box)
    shown = np.zeros((photo[1], photo[0]))
    shown[top:bottom, left:right] = faded(photo, seen, box)
    assert (shown[box[1] : box[3], box[0] : box[2]] == 255).all(), "the box, to the photo's borders"
    across, down = (box[2] - box[0]) // 6 + 1, (box[3] - box[1]) // 6 + 1
    outside = np.ones(shown.shape, bool)
    outside[max(0, box[1] - down) : box[3] + down, max(0, box[0] - across) : box[2] + across] = False
    assert not shown[outside].any()
    for axis, step in ((1, across), (0, down)):
        assert np.abs(np.diff(shown, axis=axis)).max(initial=0) <= 1.5 * 255 / (step - 1) + 2, "no seam"


def test_a_box_too_long_for_the_base_is_cropped_with_a_note_and_without_a_seam() -> None:
    photo, box = (2000, 100), (100, 10, 1900, 90)
    size = choose_size(with_context(photo, box), OWN, (64, 64), 16)
    seen = seen_part(photo, size, box)
    assert seen == (900, 0, 1100, 100)
    (note,) = frame(load_photo(gradient(*photo)), size, box).notes
    assert note == "the base sees only the box's centre, 200 of 2000 pixels of the box's width"
    shown = faded(photo, seen, box)
    assert shown[50, 0] < 5 and shown[50, -1] < 5


def test_a_box_of_a_copy_is_scaled_with_it() -> None:
    photo, settings = load_photo(gradient(400, 300)), boxed("100,60,80,120")
    assert box_in(photo, OWN) is None
    assert box_in(photo, settings) == box_in(photo, settings, (400, 300)) == (100, 60, 180, 180)
    half = load_photo(gradient(200, 151))
    left, top, right, bottom = box_in(half, settings, (400, 300)) or ()
    assert (left, right) == (50, 90) and abs(top - 30) < 2 and abs(bottom - 90) < 2
    with pytest.raises(PhotoError, match="is 300 x 300 pixels, and the adapter's box .* 400 x 300"):
        box_in(load_photo(gradient(300, 300)), settings, (400, 300))
    with pytest.raises(SettingError, match="is 8 x 12 pixels of PIL image; it needs at least 16 x 16"):
        box_in(load_photo(gradient(40, 30)), settings, (400, 300))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("350,0,80,80", "isn't inside of the photo, which is 400 x 300 pixels"),
        ("0,290,80,80", "y \\+ height up to 300"),
        ("9000,9000,80,80", "isn't inside"),
        ("10,10,15,80", "is 15 x 80 pixels"),
        ("10,10,80,0", "is 80 x 0 pixels"),
    ],
)
def test_boxes_that_a_photo_doesnt_have_are_refused(box: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        box_in(load_photo(gradient(400, 300)), boxed(box))
    assert str(caught.value).startswith(f"photo.box = '{box}' is")


@pytest.mark.parametrize(
    "box", ["1,2,3", "1,2,30,40,50", "-1,2,30,30", "1.5,2,30,30", "a,b,c,d", "1 2 30 30", "1,,30,30"]
)
def test_what_is_not_four_whole_numbers_is_no_box(box: str) -> None:
    with pytest.raises(RecipeError, match="give four whole numbers x,y,width,height"):
        boxed(box)


def test_spaces_in_a_box_are_taken() -> None:
    assert boxed("1, 2,  30, 40").part == (1, 2, 31, 42)


def test_a_box_of_a_jpeg_that_is_read_at_half_its_size_is_in_the_files_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = io.BytesIO()
    gradient(640, 480).save(file, "JPEG", quality=95)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    photo = load_photo(file.getvalue())
    assert photo.image.size == (320, 240) and photo.size_of_file == (640, 480)
    assert box_in(photo, boxed("400,300,200,100")) == (200, 150, 300, 200)
    assert load_photo(photo.image).size_of_file == (320, 240)
