"""The command line: parses arguments, calls the public API, prints the results."""

from __future__ import annotations

import json

import click

from lora_unitune import __version__
from lora_unitune.cli.editing import edit_command, repeat_command
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
)
from lora_unitune.cli.report import doctor_command, words_command
from lora_unitune.cli.terminal import (
    Commands,
    bytes_text,
    print_notes,
    progress,
    writing,
)
from lora_unitune.settings import FitSettings, PhotoSettings


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


for _command in (
    edit_command,
    repeat_command,
    inspect_command,
    convert_command,
    strip_command,
    compress_command,
    push_command,
    doctor_command,
    words_command,
):
    main.add_command(_command)


@main.command("fit")
@click.argument("photo", metavar="PHOTO", type=FILE)
@output_option("FILE", "The adapter file to write (.safetensors).", ".safetensors")
@fit_base_option
@recipe_option
@set_option
@settings_options(FitSettings, ["method"])
@settings_options(PhotoSettings, ["box"])
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
    box: str | None,
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
      lora-unitune fit holiday.jpg -o face.safetensors --box 1200,800,900,900
      lora-unitune fit photo.jpg -o photo.safetensors --base ./stable-diffusion-v1-5 --recipe sd15/8gb
    """
    from lora_unitune.output import check_output

    check_output(output, overwrite)
    given = {"fit.method": method, "photo.box": box}
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
            overrides=[
                *overrides,
                *(f"{name}={value}" for name, value in given.items() if value is not None),
            ],
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
