"""What an edit starts from: its settings, and the photo with its mask, from files or from the adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.suits import checked_photo
from lora_unitune.editing.record import Edit
from lora_unitune.errors import PhotoError, RecipeError, SettingError
from lora_unitune.families import Base
from lora_unitune.photo.framing import Box, box_in, choose_size, frame, have_same_shape
from lora_unitune.photo.opening import PhotoSource
from lora_unitune.photo.reading import Photo, load_photo, photo_to_tensor
from lora_unitune.settings import EditSettings, PhotoSettings, make_section


@dataclass(frozen=True)
class Start:
    """What an edit starts from.

    Attributes:
        size: (width, height) of the edit in pixels.
        photo: x0 of the photo, (1, c, h, w); None samples without it.
        pixels: The photo itself, (1, 3, height, width) float32 in [0, 1]; None if there is only its x0.
        whole: The photo at its own size; None if it isn't given.
        mask: Where the image may differ from the photo, white, at the photo's own size; None allows it everywhere.
        origin: "given", "adapter", "edit", or None without a photo.
        notes: Notes for the user, one sentence each.
        earlier: The edit that this one edits, whose image is its photo.
        box: The part of the photo that is edited, in its pixels; None for all of it.
    """

    size: tuple[int, int]
    photo: Tensor | None = None
    pixels: Tensor | None = None
    whole: Photo | None = None
    mask: Image.Image | None = None
    origin: str | None = None
    notes: tuple[str, ...] = ()
    earlier: Edit | None = None
    box: Box | None = None


def starting_point(
    base: Base,
    adapter: Adapter | None,
    photo: PhotoSource | Photo | Edit | None,
    settings: EditSettings,
    mask: PhotoSource | None = None,
) -> Start:
    """Reads and encodes the photo that an edit starts from, if its settings need one.

    Args:
        base: The base.
        adapter: The adapter, which may hold its photo's x0.
        photo: The photo to start from, instead of the adapter's; or an edit, to edit that.
        settings: The edit's settings.
        mask: An image whose white parts may change, and gray ones partly.

    Raises:
        SettingError: The strength is below 1 and there is no photo; a mask has no effect; or the settings don't
            start from the edit.
        PhotoError: The photo or the mask can't be read, or they don't fit together.
    """
    if mask is not None and (photo is None or settings.size == "base"):
        raise SettingError(
            "mask is for the photo at its own size; pass photo=PATH too, and edit.size = 'photo'"
        )
    size = adapter.size_on(base) if adapter else base.size
    earlier = photo if isinstance(photo, Edit) else None
    if earlier:
        check_starts_from_photo(settings)
    if settings.strength == 1 and not settings.residual:
        return Start(size)
    if photo is not None:
        read, notes = _read(photo), list[str]()
        if not earlier and adapter and adapter.photo_digest and adapter.photo_digest != read.digest:
            notes.append("it isn't the one that the adapter was fitted on, pixel for pixel")
        if adapter is None or not all(adapter.size):
            size = choose_size(read.image.size, PhotoSettings(), base.size, base.size_step)
        is_whole = not earlier or earlier.photo is not None  # an edit of the base's size shows the box alone
        box = box_in(read, adapter.recipe.photo, adapter.photo_size) if adapter and is_whole else None
        framed = frame(read, size, box)
        pixels = photo_to_tensor(framed)
        prefixed = [] if earlier else [f"the photo: {note}" for note in (*notes, *framed.notes)]
        allowed, origin = (
            None if mask is None else _read_mask(mask, read, box, prefixed),
            "edit" if earlier else "given",
        )
        x0, shown = base.encode(pixels)[0], pixels / 2 + 0.5
        return Start(size, x0, shown, read, allowed, origin, tuple(prefixed), earlier, box)
    if adapter is not None and adapter.photo_latents is not None:
        own = f"the image has the base's size, {size[0]} x {size[1]}; give the photo too for its own size"
        return Start(
            size,
            checked_photo(adapter, base),
            origin="adapter",
            notes=() if settings.size == "base" else (own,),
        )
    if settings.strength == 1:
        lacks = "the adapter doesn't hold its photo, so this is sampled from noise alone; give the photo too"
        return Start(size, notes=(lacks,) if adapter else ())
    raise SettingError(
        f"edit.strength = {settings.strength:g} starts from the photo and the adapter doesn't hold it; "
        "pass photo=PATH, or strength=1"
    )


def check_starts_from_photo(settings: EditSettings) -> None:
    """Checks that an edit with these settings starts from its photo, so that an edit can be edited.

    Raises:
        SettingError: It starts from noise alone.
    """
    if settings.strength == 1 and not settings.residual:
        raise SettingError(
            "edit.strength = 1 without residual starts from noise alone, so it can't edit an edit; pass "
            "residual=True, or a strength below 1"
        )


def _read(photo: PhotoSource | Photo | Edit) -> Photo:
    """Returns a photo, read if it isn't yet, or the image of an edit."""
    if isinstance(photo, Edit):
        return Photo(photo.image, "the edit", deep=photo.deep)
    return photo if isinstance(photo, Photo) else load_photo(photo)


def _read_mask(source: PhotoSource, photo: Photo, box: Box | None, notes: list[str]) -> Image.Image:
    """Reads a mask and scales it to the photo's size; appends notes for the user.

    Raises:
        PhotoError: It has another shape than the photo, or no part of the photo or its box that may change.
    """
    read = load_photo(source, background=0)  # what isn't painted white stays
    mask, (width, height) = read.image.convert("L"), photo.image.size
    if not have_same_shape(mask.size, (width, height)):
        raise PhotoError(
            f"the mask is {mask.width} x {mask.height} pixels, and the photo {width} x {height}; give one of the "
            "photo's shape"
        )
    notes += [f"the mask: {note}" for note in read.notes]
    if mask.size != photo.image.size:
        mask = mask.resize(photo.image.size, Image.Resampling.BILINEAR)
        notes.append(f"the mask: it is scaled from {read.image.width} x {read.image.height} pixels")
    if not mask.crop(box).getbbox():
        where = "all over" if box is None else "all over the box that is edited"
        raise PhotoError(f"the mask is black {where}, so nothing may change; what may change has to be white")
    return mask


def chosen_settings(
    base: Base, adapter: Adapter | None, has_photo: bool, chosen: dict[str, Any]
) -> EditSettings:
    """Returns the settings of an edit: the chosen ones that aren't None, and the recipe's for the others.

    Args:
        base: The base.
        adapter: The adapter, whose recipe has the defaults.
        has_photo: Whether a photo is given.
        chosen: Values of some settings, by name.

    Raises:
        SettingError: A setting is unknown, out of its range, or impossible with the base or the adapter.
    """
    defaults = adapter.recipe.edit if adapter else EditSettings(strength=0.95 if has_photo else 1.0)
    is_replaced = adapter is not None and not adapter.is_low_rank
    if is_replaced:  # the base's own weights aren't in memory
        defaults = dataclasses.replace(defaults, unconditional="adapter")
    changes = {name: value for name, value in chosen.items() if value is not None}
    try:
        settings = make_section(EditSettings, "edit", changes, defaults)
    except RecipeError as error:
        raise SettingError(str(error)) from error
    steps, most = settings.steps, len(base.schedule())
    if steps > most:
        raise SettingError(f"edit.steps = {steps} isn't allowed; this base takes from 1 to {most}")
    if int(steps * settings.strength) < 1:
        raise SettingError(f"edit.strength = {settings.strength} leaves none of {steps} steps; raise one")
    if is_replaced and settings.unconditional == "base":
        raise SettingError(
            "edit.unconditional = 'base' needs an adapter of method 'lora', not 'full' nor a DoRA; use 'adapter'"
        )
    return settings
