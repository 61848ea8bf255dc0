from __future__ import annotations

import pytest
from PIL import Image

from lora_unitune.editing.score import psnr


def test_one_grey_level_is_48_decibels() -> None:
    first, second = (Image.new("RGB", (4, 4), (v, v, v)) for v in (100, 101))
    assert psnr(first, second) == pytest.approx(48.13, abs=0.01)
    assert psnr(first, first) == pytest.approx(148.13, abs=0.01)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        psnr(Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5)))
