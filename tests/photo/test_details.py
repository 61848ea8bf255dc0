"""The photo's own pixels and fine detail in an edit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_unitune.photo.details import DOUBTED, UNKNOWN, add_detail, doubted_pixels, restore, transfer_colors

SIZES = [(48, 48), (32, 64), (56, 40)]  # (height, width)


def patchwork(height: int, width: int, seed: int = 0) -> Tensor:
    """An image of squares of different colors, (1, 3, height, width): much contrast in every window."""
    colors = torch.rand((1, 3, height // 4, width // 4), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(0.7 * colors + 0.15, (height, width), mode="nearest")


def with_detail(redraw: Tensor, seed: int = 1) -> Tensor:
    """The image with fine detail that its redraw loses."""
    noise = torch.randn(redraw.shape, generator=torch.Generator().manual_seed(seed))
    return (redraw + 0.03 * noise).clamp(0, 1)


def doubt_of(height: int, width: int, value: float) -> Tensor:
    return torch.full((1, 1, height // 4, width // 4), value)


def away(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().mean().item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("doubt", [0.0, 1.0])
def test_nothing_edited_gives_the_photo(size: tuple[int, int], doubt: float) -> None:
    redraw = patchwork(*size)
    photo = with_detail(redraw)
    restored = restore(photo, redraw, redraw, doubt_of(*size, doubt))
    assert restored.shape == photo.shape
    assert away(restored, photo) < 0.2 * away(redraw, photo)
    if doubt:
        torch.testing.assert_close(restored, photo, atol=5e-3, rtol=0)
    same = restore(redraw, redraw, redraw, doubt_of(*size, 0.0))
    assert torch.equal(same, redraw), "a redraw without error needs no restoring"


@pytest.mark.parametrize("size", SIZES)
def test_each_of_a_batch_is_restored_on_its_own(size: tuple[int, int]) -> None:
    redraw = patchwork(*size)
    photo, edits = (
        with_detail(redraw),
        torch.cat([0.5 * redraw, redraw.flip(3), redraw.mean(1, True).expand(1, 3, -1, -1)]),
    )
    doubt = doubt_of(*size, 0.0)
    doubt[..., : size[1] // 8] = 0.8
    together = restore(photo, redraw, edits, doubt)
    assert together.shape == edits.shape and together.min() >= 0 and together.max() <= 1
    alone = [restore(photo, redraw, edits[[index]], doubt) for index in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_what_an_edit_puts_in_place_of_a_doubted_thing_is_kept_and_other_edits_restore_it() -> None:
    """Another thing in its place changes it alone; another light changes the rest as much."""
    redraw = patchwork(48, 48)
    photo, other, doubt = with_detail(redraw), redraw.clone(), doubt_of(48, 48, 0.0)
    doubt[..., 3:9, 3:9] = 0.8
    other[..., 12:36, 12:36] = 1 - redraw[..., 12:36, 12:36].flip(3)
    exchanged, dark = restore(photo, redraw, torch.cat([other, 0.3 * other]), doubt).split(1)
    inside = (..., slice(15, 33), slice(15, 33))
    assert away(exchanged[inside], other[inside]) < 0.02 < away(photo[inside], other[inside])
    assert away(dark[inside], 0.3 * photo[inside]) < 0.5 * away(0.3 * other[inside], 0.3 * photo[inside])


# The photo in the edit's light


def test_the_photo_takes_the_gain_of_the_edit() -> None:
    redraw = patchwork(48, 40)
    photo, everywhere = with_detail(redraw), torch.ones((1, 1, 48, 40))
    gain = torch.tensor([0.5, 0.8, 0.9]).reshape(1, 3, 1, 1)
    for factor in (gain, gain.mean()):
        relit = transfer_colors(photo, redraw, factor * redraw, everywhere)
        torch.testing.assert_close(relit, factor * photo, atol=0.02, rtol=0)


def test_the_photo_of_a_gray_edit_is_gray() -> None:
    redraw = patchwork(48, 40)
    photo, everywhere = with_detail(redraw), torch.ones((1, 1, 48, 40))
    relit = transfer_colors(photo, redraw, redraw.mean(1, keepdim=True).expand_as(redraw), everywhere)
    assert (relit.amax(1) - relit.amin(1)).mean() < 0.1 * (photo.amax(1) - photo.amin(1)).mean()


def test_only_the_weighted_pixels_tell_the_light() -> None:
    redraw, weight = patchwork(48, 40), torch.zeros((1, 1, 48, 40))
    weight[..., :20] = 1
    edit = 0.5 * redraw
    other = edit.clone()
    other[..., 20:] = 0.9
    torch.testing.assert_close(
        *(transfer_colors(redraw, redraw, each, weight) for each in (edit, other)), atol=1e-5, rtol=0
    )


# What the base can't draw


def regions() -> Tensor:
    """Two regions of doubt 0.45, with a peak in the right one."""
    doubt = torch.full((1, 1, 16, 24), 0.2)
    doubt[..., 4:12, 2:9] = doubt[..., 4:12, 15:22] = 0.45
    doubt[..., 6:9, 17:20] = 0.8
    return doubt


def test_a_region_counts_if_it_has_a_peak() -> None:
    assert DOUBTED < 0.45 < UNKNOWN < 0.8
    mask = doubted_pixels(torch.full((1, 3, 64, 96), 0.5), regions())
    assert mask.shape == (1, 1, 64, 96) and mask.min() >= 0 and mask.max() <= 1
    assert mask[..., :48].max() == 0, "without a peak the base knows it"
    assert mask[..., 24:36, 68:80].min() == 1, "the peak"
    assert mask[..., 38:46, 64:84].mean() > 0.5, "and the region around it"
    assert mask[..., :8, :].max() == 0 and mask[..., 92:].max() == 0


def test_no_doubt_is_no_pixel_and_doubt_everywhere_is_all() -> None:
    photo = patchwork(64, 96)
    assert doubted_pixels(photo, torch.zeros((1, 1, 16, 24))).max() == 0
    assert doubted_pixels(photo, torch.ones((1, 1, 16, 24))).min() == 1


@pytest.mark.parametrize("edge", [30, 31])
def test_the_border_of_a_region_is_an_edge_of_the_photo(edge: int) -> None:
    doubt = torch.full((1, 1, 16, 16), 0.2)
    doubt[..., 8:] = 0.8  # about from column 30 of the photo, blurred over five
    flat, edged = torch.full((1, 3, 64, 64), 0.5), torch.full((1, 3, 64, 64), 0.1)
    edged[..., edge:] = 0.9
    soft, sharp = (doubted_pixels(photo, doubt) for photo in (flat, edged))
    assert sharp[..., :edge].max() == 0 and sharp[..., edge:].min() == 1
    assert soft[..., 29:32].min() > 0.2 and soft[..., 29:32].max() < 0.8


# Fine detail


def test_detail_comes_back_where_the_edit_keeps_the_structure() -> None:
    redraw = patchwork(48, 64)
    photo = with_detail(redraw)
    detail = photo - redraw
    kept = add_detail(photo, redraw, redraw) - redraw
    assert (kept * detail).sum() / detail.square().sum() > 0.8
    darker = add_detail(photo, redraw, 0.5 * redraw) - 0.5 * redraw
    torch.testing.assert_close(darker, 0.5 * kept, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["flat", "noise"])
def test_an_unrelated_edit_gets_no_detail(kind: str) -> None:
    redraw = patchwork(48, 64)
    photo = with_detail(redraw)
    noise = torch.rand(redraw.shape, generator=torch.Generator().manual_seed(7))
    edit = torch.full_like(redraw, 0.4) if kind == "flat" else noise
    added, detail = add_detail(photo, redraw, edit) - edit, photo - redraw
    assert (added * detail).sum().abs() / detail.square().sum() < 0.1
