"""The commands that edit photos, and repeat edits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_unitune import BaseModelError
from lora_unitune.cli.imports import load_libraries
from lora_unitune.cli.options import (
    FILE,
    TEXT,
    Share,
    adapter_argument,
    base_option,
    device_option,
    json_option,
    located,
    output_option,
    overwrite_option,
    seed_option,
    settings_options,
    sign_options,
)
from lora_unitune.cli.terminal import (
    check_apart,
    command,
    print_notes,
    progress,
    uninterrupted,
    writing,
)
from lora_unitune.output import PICTURES
from lora_unitune.settings import EditSettings

if TYPE_CHECKING:
    from lora_unitune import Adapter, Edit, Editor

_BATCH = 4
"""Batch size of `edit -n`: twice as fast as single images, while the first ones are still available early."""

F = TypeVar("F", bound=Callable[..., Any])

_keep_gps_option = click.option(
    "--keep-gps", is_flag=True, help="Keep the position that the photo was taken at in the image."
)


def _lora_options(command: F) -> F:
    """Adds the options for LoRAs beside an adapter."""
    scale = click.option(
        "--lora-scale",
        type=Share(0, 4),
        default=1.0,
        show_default=True,
        metavar="X",
        help="Scale of each --lora.",
    )
    lora = click.option(
        "--lora",
        "loras",
        metavar="FILE",
        type=FILE,
        multiple=True,
        help="Another LoRA for the same base, such as one of a style, added to ADAPTER; its trigger words belong in "
        "PROMPT. May be repeated.",
    )
    return lora(scale(command))


@command("edit")
@adapter_argument
@click.argument("prompt", metavar="PROMPT", type=TEXT)
@output_option("FILE", "The PNG, JPEG, WebP, TIFF or AVIF to write; see -n.", *PICTURES)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of images, with consecutive seeds; for more than one, out.png becomes out-SEED.png.",
)
@seed_option
@click.option(
    "--negative-prompt",
    type=TEXT,
    default="",
    metavar="TEXT",
    help="Negative prompt: what the image should not show.",
)
@settings_options(EditSettings)
@click.option(
    "--photo",
    metavar="PHOTO",
    type=FILE,
    help="The photo to start from, instead of the one in ADAPTER; the image gets its size and its fine detail.",
)
@click.option(
    "--mask",
    metavar="FILE",
    type=FILE,
    help="With --photo: an image whose white parts may change, gray ones partly, and black ones not at all.",
)
@click.option(
    "--then",
    type=TEXT,
    multiple=True,
    metavar="PROMPT",
    help="Edit the edit by another prompt; may be repeated.",
)
@sign_options
@_keep_gps_option
@click.option(
    "--trigger",
    type=TEXT,
    metavar="WORDS",
    help='Trigger words of the adapter, if ADAPTER doesn\'t store them; "" if it needs none.',
)
@_lora_options
@base_option
@device_option
@overwrite_option
@json_option
def edit_command(
    adapter: str,
    prompt: str,
    output: str,
    count: int,
    seed: int,
    negative_prompt: str,
    photo: str | None,
    mask: str | None,
    then: tuple[str, ...],
    sign_cert: str | None,
    sign_key: str | None,
    keep_gps: bool,
    trigger: str | None,
    loras: tuple[str, ...],
    lora_scale: float,
    base: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Edit the photo of ADAPTER according to PROMPT.

    ADAPTER is a file that fit wrote, or hub://OWNER/NAME. PROMPT describes the edit alone: the rare tokens of
    the photo are stored in the file, and so are the default settings. Each image stores all settings that it was
    made with. A LoRA of another tool (a kohya or diffusers file, or a PEFT folder) needs --trigger and --base.

    \b
    Examples:
      lora-unitune edit photo.safetensors "a fox at night" -o out.jpg --photo photo.jpg
      lora-unitune edit photo.safetensors "a red balloon" -o out.png --photo photo.jpg --mask sky.png
      lora-unitune edit photo.safetensors "at night" --then "a fox" -o out.png --photo photo.jpg
      lora-unitune edit photo.safetensors "a fox at night" -o out.png -n 4 --guidance 4
      lora-unitune edit photo.safetensors "a pencil sketch" -o out.png --strength 0.8
    """
    from lora_unitune import find_signer
    from lora_unitune.output import check_output

    seeds, out = range(seed, seed + count), Path(output)
    many = count > 1
    paths = {each: out.with_name(f"{out.stem}-{each}{out.suffix}") if many else out for each in seeds}
    for path in paths.values():
        check_apart(path)
        check_output(path, overwrite)
    signer = find_signer(sign_cert, sign_key)
    images: list[dict[str, Any]] = []
    try:
        with progress() as display:
            display.show("loading the base", 0, 1)
            opened = _opened(adapter, trigger, loras, lora_scale)
            editor = _editor(opened, base, device)
            display.show("editing", 0, count)
            given = {"negative_prompt": negative_prompt, "photo": photo, "mask": mask, "then": then}
            batch_size = 1 if then else _BATCH  # so that a sequence repeats bit for bit
            options = {"batch_size": batch_size, **given, **settings}
            for batch in editor.batches(opened, prompt, seeds, **options):
                with display.aside(), uninterrupted():  # what is sampled is saved
                    for edit in batch:
                        path = paths[edit.settings["seed"]]
                        with writing(path):
                            saved = edit.save(path, overwrite, keep_gps, signer)
                        if not as_json:
                            print_notes((*(() if images else edit.notes), *saved))
                            click.echo(f"{path}: {edit.seconds:.1f} s")
                        images.append(_as_json(edit, path, saved))
                display.show("editing", len(images), count)
    finally:
        if as_json and images:
            click.echo(json.dumps({"adapter": adapter, "images": images}))


@command("repeat")
@click.argument("picture", metavar="PICTURE", type=FILE)
@click.option(
    "--adapter", required=True, type=FILE, metavar="ADAPTER", help="The adapter that PICTURE was made with."
)
@output_option("FILE", "The PNG, JPEG, WebP, TIFF or AVIF to write.", *PICTURES)
@click.option("--photo", type=FILE, metavar="PHOTO", help="The photo that was edited, if --photo gave it.")
@click.option("--mask", type=FILE, metavar="FILE", help="The mask, if --mask gave one.")
@sign_options
@_keep_gps_option
@_lora_options
@base_option
@device_option
@overwrite_option
@json_option
def repeat_command(
    picture: str,
    adapter: str,
    output: str,
    photo: str | None,
    mask: str | None,
    sign_cert: str | None,
    sign_key: str | None,
    keep_gps: bool,
    loras: tuple[str, ...],
    lora_scale: float,
    base: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Repeat the edit that made PICTURE, with all of its turns, from the settings in it.

    The result is the same bit for bit with the same versions of the libraries on the same kind of device, if
    PICTURE wasn't made in a batch: `edit -n` without --then makes batches of four.

    \b
    Examples:
      lora-unitune repeat out.jpg --adapter photo.safetensors -o again.png
      lora-unitune repeat out.jpg --adapter photo.safetensors --photo photo.jpg -o again.png
    """
    from lora_unitune import find_signer, read_settings
    from lora_unitune.output import check_output

    check_output(output, overwrite)
    signer = find_signer(sign_cert, sign_key)
    settings = read_settings(picture)
    with progress() as display:
        display.show("loading the base", 0, 1)
        opened = _opened(adapter, None, loras, lora_scale)
        editor = _editor(opened, base, device)
        display.show("editing", 0, 1)
        edit = editor.repeat(opened, settings, photo, mask)
    with writing(output):
        saved = edit.save(output, overwrite, keep_gps, signer)
    if as_json:
        click.echo(json.dumps({"adapter": adapter, "image": _as_json(edit, Path(output), saved)}))
        return
    print_notes((*edit.notes, *saved))
    click.echo(f"{output}: {edit.seconds:.1f} s")


def _opened(adapter: str, trigger: str | None, loras: Sequence[str], scale: float) -> Adapter:
    """Loads an adapter, and adds LoRAs to it."""
    from lora_unitune import Adapter, stacked

    opened = Adapter.load(adapter, trigger)
    for each in loras:
        opened = stacked(opened, Adapter.load(each, ""), scale)
    return opened


def _editor(adapter: Adapter, base: str | None, device: str) -> Editor:
    """Loads the base that an adapter is for."""
    files = located(_base_for(adapter, base))
    load_libraries()
    from lora_unitune import Editor

    return Editor(files, device=device)


def _base_for(adapter: Adapter, base: str | None) -> str:
    """Returns the base to edit with. An untrusted file may name any model, so it is never downloaded by default."""
    if base or adapter.base == "pocket":
        return base or adapter.base
    raise BaseModelError(
        f"the adapter was fitted on base {adapter.base!r}; say where that is with --base FOLDER, FILE or HUB_ID"
    )


def _as_json(edit: Edit, path: Path, saved: Sequence[str]) -> dict[str, Any]:
    """Returns the entry of one edit in the output of --json."""
    return {
        "path": str(path),
        "size": list(edit.image.size),
        "seconds": edit.seconds,
        "notes": [*edit.notes, *saved],
        "settings": edit.settings,
    }
