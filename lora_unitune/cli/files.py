"""The commands for adapter files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_unitune.cli.options import (
    FILE,
    Share,
    adapter_argument,
    base_option,
    check_ending,
    json_option,
    located,
    output_option,
    overwrite_option,
)
from lora_unitune.cli.terminal import bytes_text, command, shown, size_text, writing
from lora_unitune.output import PICTURES

if TYPE_CHECKING:
    from lora_unitune.adapter.convert import Layout


@command("inspect")
@adapter_argument
@click.option(
    "--for",
    "tool",
    type=click.Choice(["diffusers", "comfyui", "a1111"]),
    help="Fail if this tool (a1111: Forge too) doesn't read all of the file.",
)
@json_option
def inspect_command(adapter: str, tool: str | None, as_json: bool) -> None:
    """Describe ADAPTER, without loading its base model.

    ADAPTER is a file, a PEFT folder, or hub://OWNER/NAME; or a picture that edit wrote, with the settings it was made
    with.

    \b
    Examples:
      lora-unitune inspect photo.safetensors
      lora-unitune inspect photo.safetensors --for comfyui
      lora-unitune inspect photo.safetensors --json
      lora-unitune inspect out.jpg
    """
    from lora_unitune import describe
    from lora_unitune.adapter.tools import check_tool, readers
    from lora_unitune.recipe import toml

    if tool is not None:
        from lora_unitune.adapter.header import open_source

        check_tool(tool, open_source(adapter))
    if Path(adapter).suffix.lower() in PICTURES and Path(adapter).is_file():
        _show_settings(adapter, as_json)
        return
    summary = describe(adapter)
    if as_json:
        click.echo(json.dumps(summary))
        return
    recipe = summary.pop("recipe")
    summary["read_by"] = readers(summary)
    for name, value in summary.items():
        text = (
            size_text(value)
            if name in ("size", "photo_size") and value
            else "unknown"
            if value in (None, "")
            else shown(value) or "none"
        )
        if value or name not in ("entries", "notes"):
            click.echo(f"{name.replace('_', ' '):<16}{text}")
    click.echo("recipe" if recipe else "recipe          unknown")
    for line in toml(recipe).splitlines() if recipe else ():
        click.echo(f"  {line}".rstrip())


def _show_settings(picture: str, as_json: bool) -> None:
    """Prints the settings that a picture was made with."""
    from lora_unitune import read_settings
    from lora_unitune.editing.record import turns_of
    from lora_unitune.photo.provenance import read_signature

    settings = {**read_settings(picture), **(read_signature(picture) or {})}
    if as_json:
        click.echo(json.dumps(settings))
        return
    *earlier, last = turns_of(settings)
    for number, turn in enumerate(earlier, 1):
        other = {name: value for name, value in turn.items() if name not in last or last[name] != value}
        click.echo(f"turn {number}")
        _print_settings({"prompt": turn.get("prompt"), **other}, "  ")
    if earlier:
        click.echo(f"turn {len(earlier) + 1}, with the settings that all have")
    _print_settings(last, "  " if earlier else "")


def _print_settings(settings: dict[str, Any], before: str) -> None:
    for name, value in settings.items():
        text = f"{value:g}" if isinstance(value, float) else shown(value) or "none"
        click.echo(f"{before}{name.replace('_', ' '):<18}{text}")


@command("convert")
@adapter_argument
@click.option(
    "--to",
    "layout",
    required=True,
    type=click.Choice(["diffusers", "kohya", "peft"]),
    help="kohya is for ComfyUI and A1111; diffusers is the layout that fit writes; peft writes a folder.",
)
@output_option("PATH", "The file to write; for peft, the folder.")
@click.option(
    "--sidecar",
    is_flag=True,
    help="For kohya: also write the JSON file beside it from which A1111, Forge and InvokeAI take the trigger words.",
)
@overwrite_option
@json_option
def convert_command(
    adapter: str, layout: Layout, output: str, sidecar: bool, overwrite: bool, as_json: bool
) -> None:
    """Convert ADAPTER to another tool's layout, without loss.

    Author, license, tags and trigger words in a file of another tool are kept.

    \b
    Examples:
      lora-unitune convert photo.safetensors --to kohya -o photo-comfyui.safetensors
      lora-unitune convert photo-comfyui.safetensors --to diffusers -o again.safetensors
      lora-unitune convert photo.safetensors --to peft -o photo-peft
    """
    from lora_unitune import convert

    if layout != "peft":
        check_ending(output, ".safetensors")
    with writing(output):
        convert(adapter, layout, output, overwrite, sidecar)
    click.echo(json.dumps({"path": output, "layout": layout}) if as_json else f"{output}: layout of {layout}")


@command("strip")
@adapter_argument
@output_option("FILE", "The adapter file to write (.safetensors).", ".safetensors")
@click.option("--keep-photo", is_flag=True, help="Keep the photo's latents, so that edits need no --photo.")
@overwrite_option
@json_option
def strip_command(adapter: str, output: str, keep_photo: bool, overwrite: bool, as_json: bool) -> None:
    """Write ADAPTER without the photo, date, seed and settings of its fit.

    Of these an edit needs only the photo. The weights can still reproduce the photo that they were fitted on.

    \b
    Examples:
      lora-unitune strip photo.safetensors -o bare.safetensors
      lora-unitune strip photo.safetensors -o bare.safetensors --keep-photo
    """
    from lora_unitune import describe
    from lora_unitune.adapter.convert import strip

    with writing(output):
        strip(adapter, output, keep_photo, overwrite)
    described = describe(output)
    if as_json:
        click.echo(json.dumps({"path": output, "bytes": described["bytes"]}))
        return
    lacks_photo = described["format_version"] is not None and not described["photo_embedded"]
    hint = ", without the photo: edits need --photo; --keep-photo keeps it" if lacks_photo else ""
    click.echo(f"{output}: {bytes_text(described['bytes'])}{hint}")


@command("compress")
@adapter_argument
@output_option("FILE", "The adapter file to write (.safetensors).", ".safetensors")
@click.option(
    "--keep",
    type=Share(0, 1, min_open=True),
    metavar="X",
    help="Share of the ranks' total squared effect to keep, such as 0.99.",
)
@click.option("--to-bytes", type=click.IntRange(1), metavar="N", help="Maximum size of the tensors in bytes.")
@click.option(
    "--eight-bit", is_flag=True, help="Store the matrices in 8 bits; only lora-unitune reads such a file."
)
@base_option
@overwrite_option
@json_option
def compress_command(
    adapter: str,
    output: str,
    keep: float | None,
    to_bytes: int | None,
    eight_bit: bool,
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compress ADAPTER by removing the ranks with the least effect per byte.

    With its base (pocket, or --base), a rank's effect is that on the base's predictions of the photo, and the
    command prints how much of the whole effect is lost. Without a base, the singular values stand for it.

    \b
    Examples:
      lora-unitune compress photo.safetensors --keep 0.99 -o small.safetensors
      lora-unitune compress photo.safetensors --to-bytes 100000 -o small.safetensors
      lora-unitune compress photo.safetensors --eight-bit -o half.safetensors
    """
    from lora_unitune.output import check_output

    check_output(output, overwrite)
    import torch

    from lora_unitune import Adapter, compress, describe, load_base
    from lora_unitune.adapter.compress import effect_lost

    opened = Adapter.load(adapter)
    name = base or ("pocket" if opened.base == "pocket" else None)
    loaded = load_base(located(name)) if name else None
    result = compress(opened, keep, to_bytes, loaded, eight_bit)
    lost = effect_lost(loaded, opened, result.adapter) if loaded else None
    with writing(output):
        result.adapter.save(output, overwrite, torch.int8 if eight_bit else torch.float16)
    before, after = describe(adapter)["bytes"], describe(output)["bytes"]
    if as_json:
        ranks = {"before": result.ranks[0], "after": result.ranks[1]}
        values = {"path": output, "bytes": after, "kept": result.kept, "ranks": ranks, "effect_lost": lost}
        click.echo(json.dumps(values))
        return
    kept = (
        f"{100 * (1 - result.kept):.2f} % of their squares"
        if lost is None
        else f"{100 * lost:.1f} % of the effect"
    )
    click.echo(
        f"{output}: {bytes_text(after)} instead of {bytes_text(before)}, {result.ranks[1]} of "
        f"{result.ranks[0]} ranks, {kept} lost"
    )


@command("push")
@adapter_argument
@click.argument("repo", metavar="OWNER/NAME")
@click.option(
    "--license",
    default="other",
    show_default=True,
    metavar="NAME",
    help="The license's identifier on the hub.",
)
@click.option(
    "--picture",
    "pictures",
    multiple=True,
    metavar="PICTURE",
    type=FILE,
    help="A sample image (PNG, JPEG, WebP or AVIF) to show in the card; may be repeated once.",
)
@click.option("--private", is_flag=True, help="Make the repository private, if this creates it.")
@click.option("--dry-run", is_flag=True, help="Show everything that would be sent, and send nothing.")
@json_option
def push_command(
    adapter: str,
    repo: str,
    license: str,
    pictures: tuple[str, ...],
    private: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload ADAPTER with a model card to the Hugging Face hub, with your stored login.

    Anyone with the file can reproduce its photo; strip removes what an edit doesn't need. Others edit with
    hub://OWNER/NAME in place of a file.

    \b
    Examples:
      lora-unitune push photo.safetensors me/my-photo --dry-run
      lora-unitune push photo.safetensors me/my-photo --license cc-by-4.0 --picture out.png
    """
    from lora_unitune.adapter.hub import prepare_push, push

    upload = prepare_push(adapter, repo, license=license, pictures=pictures, private=private)
    files = {name: len(content) for name, content in upload.files.items()}
    url = None if dry_run else push(upload)
    if as_json:
        values = {"repo": upload.repo, "private": private, "files": files, "card": upload.card, "url": url}
        click.echo(json.dumps(values))
        return
    if dry_run:
        click.echo(upload.card)
    for name, count in files.items():
        click.echo(f"{name}: {bytes_text(count)}")
    click.echo(f"nothing was sent to {upload.repo}" if dry_run else f"pushed: {url}")
