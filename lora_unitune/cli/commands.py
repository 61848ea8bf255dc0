"""The command line: parses arguments, calls the public API, prints the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_unitune import BaseModelError, __version__
from lora_unitune.cli.files import (
    compress_command,
    convert_command,
    inspect_command,
    push_command,
    strip_command,
)
from lora_unitune.cli.imports import load_libraries
from lora_unitune.cli.options import (
    FILE,
    FOLDER,
    TEXT,
    Share,
    adapter_argument,
    base_option,
    device_option,
    fit_base_option,
    json_option,
    located,
    output_option,
    overwrite_option,
    recipe_option,
    seed_option,
    set_option,
    settings_options,
    sign_options,
)
from lora_unitune.cli.report import doctor_command, words_command
from lora_unitune.cli.terminal import (
    Commands,
    bytes_text,
    check_apart,
    print_notes,
    progress,
    uninterrupted,
    writing,
)
from lora_unitune.output import PICTURES
from lora_unitune.settings import EditSettings, FitSettings

_BATCH = 4
"""Batch size of `edit -n`: twice as fast as single images, while the first ones are still available early."""

if TYPE_CHECKING:
    from lora_unitune import Adapter, Edit


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora-unitune")
def main() -> None:
    """Fit one photo in seconds, then edit it with prompts.

    \b
    Examples:
      lora-unitune demo
      lora-unitune fit photo.jpg -o photo.safetensors
      lora-unitune edit photo.safetensors "a fox at night" -o out.png
      lora-unitune inspect photo.safetensors
      lora-unitune convert photo.safetensors --to kohya -o photo-comfyui.safetensors

    \b
    To complete commands, options and files in bash (or zsh, or fish):
      eval "$(_LORA_UNITUNE_COMPLETE=bash_source lora-unitune)"
    """


_FILES = (inspect_command, convert_command, strip_command, compress_command, push_command)
for _command in (*_FILES, doctor_command, words_command):
    main.add_command(_command)


@main.command("fit")
@click.argument("photo", metavar="PHOTO", type=FILE)
@output_option("FILE", "The adapter file to write (.safetensors).", ".safetensors")
@fit_base_option
@recipe_option
@set_option
@settings_options(FitSettings, ["method"])
@click.option(
    "--from",
    "start",
    metavar="ADAPTER",
    type=FILE,
    help="Continue training from an adapter, of this or another tool.",
)
@click.option(
    "--embed-photo/--no-embed-photo",
    default=True,
    show_default=True,
    help="Embed the photo's latents in the file, or leave them out; then edits need --photo.",
)
@seed_option
@device_option
@overwrite_option
@json_option
def fit_command(
    photo: str,
    output: str,
    base: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    method: str | None,
    start: str | None,
    embed_photo: bool,
    seed: int,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit PHOTO and write an adapter file.

    The file holds the trained weights and, unless --no-embed-photo is given, the photo's latents. Anyone with
    the file can reproduce the photo.

    \b
    Examples:
      lora-unitune fit photo.jpg -o photo.safetensors
      lora-unitune fit photo.jpg -o photo.safetensors --set fit.steps=50 --seed 3
      lora-unitune fit photo.jpg -o photo.safetensors --base ./stable-diffusion-v1-5 --recipe sd15/8gb
    """
    from lora_unitune.output import check_output

    check_output(output, overwrite)
    notes: list[str] = []
    with progress() as display:
        display.show("loading the base", 0, 1)
        files = located(base)
        load_libraries()
        from lora_unitune import Adapter, describe, fit
        from lora_unitune.adapter.tools import readers

        adapter = fit(
            photo,
            base=files,
            recipe=recipe,
            overrides=[*overrides, *([f"fit.method={method}"] if method else [])],
            seed=seed,
            device=device,
            embed_photo=embed_photo,
            start=Adapter.load(start) if start else None,
            on_step=lambda step, steps, loss: display.show(f"fitting, loss {loss:.4f}", step, steps),
            on_note=notes.append,
        )
    with writing(output):
        adapter.save(output, overwrite=overwrite)
    summary = describe(output)
    if as_json:
        click.echo(json.dumps({**summary, "notes": notes, "losses": adapter.history}))
        return
    print_notes(notes)
    click.echo(
        f"{output}: {bytes_text(summary['bytes'])}, fitted in {adapter.seconds:.1f} s as "
        f"{adapter.rare_tokens!r}, loss {adapter.history[0]:.4f} to {adapter.history[-1]:.4f}"
    )
    click.echo(f"{output}: read by {readers(summary)}")


@main.command("edit")
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
@sign_options
@click.option("--keep-gps", is_flag=True, help="Keep the position that the photo was taken at in the image.")
@click.option(
    "--trigger",
    type=TEXT,
    metavar="WORDS",
    help='Trigger words of the adapter, if ADAPTER doesn\'t store them; "" if it needs none.',
)
@click.option(
    "--lora",
    "loras",
    metavar="FILE",
    type=FILE,
    multiple=True,
    help="Another LoRA for the same base, such as one of a style, added to ADAPTER; its trigger words belong in "
    "PROMPT. May be repeated.",
)
@click.option(
    "--lora-scale",
    type=Share(0, 4),
    default=1.0,
    show_default=True,
    metavar="X",
    help="Scale of each --lora.",
)
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
      lora-unitune edit photo.safetensors "a fox at night" -o out.png -n 4 --guidance 4
      lora-unitune edit photo.safetensors "a pencil sketch" -o out.png --strength 0.8
    """
    from lora_unitune.output import check_output

    seeds, out = range(seed, seed + count), Path(output)
    many = count > 1
    paths = {each: out.with_name(f"{out.stem}-{each}{out.suffix}") if many else out for each in seeds}
    for path in paths.values():
        check_apart(path)
        check_output(path, overwrite)
    from lora_unitune import find_signer

    signer = find_signer(settings.pop("sign_cert"), settings.pop("sign_key"))
    images: list[dict[str, Any]] = []
    try:
        with progress() as display:
            display.show("loading the base", 0, 1)
            from lora_unitune import Adapter, stacked

            opened = Adapter.load(adapter, trigger)
            for each in loras:
                opened = stacked(opened, Adapter.load(each, ""), lora_scale)
            files = located(_base_for(opened, base))
            load_libraries()
            from lora_unitune import Editor

            editor = Editor(files, device=device)
            display.show("editing", 0, count)
            given = {"negative_prompt": negative_prompt, "photo": photo, "mask": mask}
            options = {"batch_size": _BATCH, **given, **settings}
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


@main.command("demo")
@output_option(
    "FOLDER", "The folder to write.", required=False, default="unitune-demo", show_default=True, type=FOLDER
)
@fit_base_option
@set_option
@seed_option
@device_option
@overwrite_option
@json_option
def demo_command(
    output: str,
    base: str,
    overrides: tuple[str, ...],
    seed: int,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit the example photos, edit each, and write a contact sheet.

    The folder receives the adapter files, the images, contact-sheet.png and summary.json: all of them, or none.

    \b
    Examples:
      lora-unitune demo
      lora-unitune demo -o demo-3 --seed 3 --overwrite
    """
    with progress() as display:
        display.show("loading the base", 0, 1)
        files = located(base)
        load_libraries()
        from lora_unitune.cli.demo import run_demo

        summary = run_demo(
            output,
            base=files,
            overrides=overrides,
            seed=seed,
            device=device,
            overwrite=overwrite,
            on_progress=display.show,
        )
    click.echo(
        json.dumps(summary) if as_json else f"{summary['contact_sheet']}: done in {summary['seconds']:.0f} s"
    )


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
