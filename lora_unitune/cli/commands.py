"""The command line: reads what was typed, calls the public API, prints what came back."""

from __future__ import annotations

import json
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
from lora_unitune.cli.terminal import (
    Commands,
    base_option,
    json_option,
    overwrite_option,
    print_notes,
    progress,
    shown,
    size,
)

if TYPE_CHECKING:
    from lora_unitune import Adapter, Edit


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora-unitune")
def main() -> None:
    """Fit one photo in seconds, then edit it with words.

    \b
    Examples:
      lora-unitune demo
      lora-unitune fit photo.jpg -o photo.safetensors
      lora-unitune edit photo.safetensors "a fox at night" -o out.png
      lora-unitune inspect photo.safetensors
      lora-unitune convert photo.safetensors --to kohya -o photo-comfyui.safetensors
    """


for _command in (inspect_command, convert_command, strip_command, compress_command, push_command):
    main.add_command(_command)


def _png_name(ctx: click.Context, option: click.Parameter, value: str) -> str:
    if not value.lower().endswith(".png"):
        raise click.BadParameter(f"{value!r} has to end in .png, which holds the settings too.")
    return value


_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto takes a GPU if there is one.",
)
_seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of all noise.",
)
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting of the recipe, such as fit.steps=50; may be given again.",
)


@main.command("fit")
@click.argument("photo", metavar="PHOTO")
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="The adapter file to write (.safetensors)."
)
@click.option(
    "--base", default="pocket", show_default=True, metavar="NAME|FOLDER|HUB_ID", help="The base model to fit."
)
@click.option(
    "--recipe", metavar="NAME|FILE", help="A shipped recipe or a TOML file; each base has a default."
)
@_set
@click.option(
    "--method", type=click.Choice(["lora", "full"]), help="Train adapters, or all weights for comparison."
)
@click.option(
    "--from", "start", metavar="FILE", help="Go on from an adapter, of this or another tool, for more steps."
)
@click.option(
    "--no-embed-photo", is_flag=True, help="Leave the photo out of the file; edits then need --photo."
)
@_seed
@_device
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
    no_embed_photo: bool,
    seed: int,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit PHOTO and write an adapter file.

    The file holds what the base learned and, unless told not to, the photo itself in the base's latents:
    whoever has it can redraw the photo.

    \b
    Examples:
      lora-unitune fit photo.jpg -o photo.safetensors
      lora-unitune fit photo.jpg -o photo.safetensors --set fit.steps=50 --seed 3
      lora-unitune fit photo.jpg -o photo.safetensors --base ./stable-diffusion-v1-5 --recipe sd15/8gb
    """
    from lora_unitune.output import check_output

    check_output(output, overwrite)
    chosen = [*overrides, *([f"fit.method={method}"] if method else [])]
    told: list[str] = []
    with progress() as tell:
        tell("loading the base", 0, 1)
        from lora_unitune import fit
        from lora_unitune.adapter.adapter import describe
        from lora_unitune.adapter.convert import open_adapter
        from lora_unitune.photo.reading import load_photo

        adapter = fit(
            photo,
            base=base,
            recipe=recipe,
            overrides=chosen,
            seed=seed,
            device=device,
            embed_photo=not no_embed_photo,
            start=open_adapter(start) if start else None,
            on_step=lambda step, steps, loss: tell(f"fitting, loss {loss:.4f}", step, steps),
            on_note=told.append,
        )
    adapter.save(output, overwrite=overwrite)
    described = describe(output)
    notes = [*load_photo(photo, adapter.resolution).notes, *told]
    if as_json:
        click.echo(json.dumps({**described, "notes": notes}))
        return
    print_notes(notes)
    written, tokens = size(described["bytes"]), adapter.rare_tokens
    click.echo(f"{output}: {written}, fitted in {adapter.seconds:.1f} s as {tokens!r}")


@main.command("edit")
@click.argument("adapter_file", metavar="FILE")
@click.argument("prompt", metavar="PROMPT")
@click.option(
    "-o", "--output", required=True, callback=_png_name, metavar="OUT", help="The PNG to write; see -n."
)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    metavar="COUNT",
    help="Pictures to make, from consecutive seeds; out.png becomes out-SEED.png for each.",
)
@click.option("--guidance", type=float, metavar="W", help="How strongly to follow the text, from 1.")
@click.option("--guidance-start", type=float, metavar="S", help="First share of the steps without guidance.")
@click.option("--guidance-stop", type=float, metavar="S", help="Share of the steps after which it ends.")
@click.option("--guidance-rescale", type=float, metavar="R", help="Remedy against saturated colours, 0 to 1.")
@click.option(
    "--strength", type=float, metavar="S", help="Noise put on the photo, above 0 to 1; 1 starts from noise."
)
@click.option(
    "--adapter-scale", type=float, metavar="A", help="How much of the adapter is used; 1 is all of it."
)
@click.option("--steps", type=int, metavar="N", help="Sampling steps.")
@click.option("--negative-prompt", metavar="TEXT", help="What the picture should not show.")
@click.option("--unconditional", type=click.Choice(["adapter", "base"]), help="Weights for the empty prompt.")
@click.option("--residual/--no-residual", default=None, help="Add to the photo only what the words change.")
@click.option("--photo", metavar="PHOTO", help="The photo to start from, when the file doesn't hold it.")
@click.option(
    "--tokens", default="", metavar="WORDS", help="The rare tokens, when the file doesn't say them."
)
@base_option
@_seed
@_device
@overwrite_option
@json_option
def edit_command(
    adapter_file: str,
    prompt: str,
    output: str,
    count: int,
    base: str | None,
    tokens: str,
    seed: int,
    device: str,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Edit the photo of an adapter FILE as PROMPT says.

    The prompt is the edit alone: the rare tokens that stand for the photo are in the file. Settings that
    aren't given are those of the recipe in the file. Each PNG carries all settings that made it. A LoRA of
    another tool (kohya's or diffusers' layout, or PEFT's folder) is opened with --tokens and --base. FILE
    may be hub://OWNER/NAME.

    \b
    Examples:
      lora-unitune edit photo.safetensors "a fox at night" -o out.png
      lora-unitune edit photo.safetensors "a fox at night" -o out.png -n 4 --guidance 4
      lora-unitune edit photo.safetensors "a pencil sketch" -o out.png --strength 0.8
    """
    from lora_unitune.output import check_output

    seeds = range(seed, seed + count)
    out = Path(output)
    paths = [out] if count == 1 else [out.with_name(f"{out.stem}-{each}{out.suffix}") for each in seeds]
    for each in paths:
        check_output(each, overwrite)
    given = {name: value for name, value in settings.items() if value is not None}
    with progress() as tell:
        tell("loading the base", 0, 1)
        from lora_unitune import Editor
        from lora_unitune.adapter.convert import open_adapter
        from lora_unitune.adapter.hub import SCHEME, download

        path = download(adapter_file) if adapter_file.startswith(SCHEME) else adapter_file
        adapter = open_adapter(path, tokens)
        editor = Editor(_base_for(adapter, base), device=device)
        edits = []
        for done, each_seed in enumerate(seeds):
            tell("editing", done, count)
            edits.append(editor.edit(adapter, prompt, seed=each_seed, **given))
        tell("editing", count, count)
    for edit, each in zip(edits, paths, strict=True):
        edit.save(each, overwrite=overwrite)
    if as_json:
        images = [_edit_entry(edit, each) for edit, each in zip(edits, paths, strict=True)]
        click.echo(json.dumps({"adapter": adapter_file, "images": images}))
        return
    print_notes(edits[0].notes)
    for edit, each in zip(edits, paths, strict=True):
        click.echo(f"{each}: {edit.seconds:.1f} s")


@main.command("doctor")
@_device
@json_option
def doctor_command(device: str, as_json: bool) -> None:
    """Tell what this machine has, what works on it, and which recipe suits it.

    \b
    Examples:
      lora-unitune doctor
      lora-unitune doctor --json
    """
    from lora_unitune.cli.doctor import examine

    found = examine(device)
    if as_json:
        click.echo(json.dumps(found))
        return
    notes = found.pop("notes")
    for name in ("free_bytes", "total_bytes"):
        found[name] = "unknown" if found[name] is None else f"{found[name] / 2**30:.1f} GiB"
    for name, value in found.items():
        click.echo(f"{name.replace('_', ' '):<18}{shown(value)}")
    print_notes(tuple(notes))


@main.command("demo")
@click.option(
    "-o", "--output", default="unitune-demo", show_default=True, metavar="FOLDER", help="The folder to write."
)
@click.option(
    "--base", default="pocket", show_default=True, metavar="NAME|FOLDER|HUB_ID", help="The base model to fit."
)
@_set
@_seed
@_device
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
    """Fit the example photos, edit each, and lay all on one sheet.

    The folder gets the adapter files, the pictures, contact-sheet.png and summary.json.

    \b
    Examples:
      lora-unitune demo
      lora-unitune demo -o shown --seed 3 --overwrite
    """
    with progress() as tell:
        tell("loading the base", 0, 1)
        from lora_unitune.cli.demo import run_demo

        summary = run_demo(
            output,
            base=base,
            overrides=overrides,
            seed=seed,
            device=device,
            overwrite=overwrite,
            on_progress=tell,
        )
    click.echo(
        json.dumps(summary) if as_json else f"{summary['contact_sheet']}: done in {summary['seconds']:.0f} s"
    )


def _base_for(adapter: Adapter, given: str | None) -> str:
    """Returns the base to edit with. A stranger's file may name any model: it is never downloaded unasked."""
    if given or adapter.base == "pocket":
        return given or adapter.base
    raise BaseModelError(
        f"the adapter was fitted on base {adapter.base!r}; say where it is with --base FOLDER or HUB_ID"
    )


def _edit_entry(edit: Edit, path: Path) -> dict[str, Any]:
    """Returns what --json tells about one edit."""
    return {"file": str(path), "seconds": edit.seconds, "notes": list(edit.notes), "settings": edit.settings}
