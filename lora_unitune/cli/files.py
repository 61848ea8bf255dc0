"""The commands that work on adapter files alone, without a base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_unitune.cli.terminal import base_option, json_option, overwrite_option, shown, size

if TYPE_CHECKING:
    from lora_unitune.adapter.convert import Layout


@click.command("inspect")
@click.argument("adapter_file", metavar="FILE")
@json_option
def inspect_command(adapter_file: str, as_json: bool) -> None:
    """Tell what is in an adapter FILE, without a base model.

    \b
    Examples:
      lora-unitune inspect photo.safetensors
      lora-unitune inspect photo.safetensors --json
    """
    from lora_unitune import Recipe
    from lora_unitune.adapter.adapter import describe

    described = describe(adapter_file)
    if as_json:
        click.echo(json.dumps(described))
        return
    recipe = Recipe.from_dict(described.pop("recipe"))
    for name, value in described.items():
        click.echo(f"{name.replace('_', ' '):<16}{shown(value)}")
    click.echo("recipe")
    for line in recipe.to_toml().splitlines():
        click.echo(f"  {line}".rstrip())


@click.command("convert")
@click.argument("adapter_file", metavar="FILE")
@click.option(
    "--to",
    "layout",
    required=True,
    type=click.Choice(["diffusers", "kohya", "peft"]),
    help="kohya for ComfyUI and A1111; diffusers is what fit writes; peft makes a folder.",
)
@click.option("-o", "--output", required=True, metavar="OUT", help="The file or, for peft, folder to write.")
@overwrite_option
@json_option
def convert_command(adapter_file: str, layout: Layout, output: str, overwrite: bool, as_json: bool) -> None:
    """Write the adapter in FILE in another tool's layout; nothing of it is lost.

    \b
    Examples:
      lora-unitune convert photo.safetensors --to kohya -o photo-comfyui.safetensors
      lora-unitune convert photo-comfyui.safetensors --to diffusers -o again.safetensors
      lora-unitune convert photo.safetensors --to peft -o photo-peft
    """
    from lora_unitune.adapter.convert import convert

    convert(adapter_file, layout, output, overwrite)
    click.echo(json.dumps({"file": output, "layout": layout}) if as_json else f"{output}: layout of {layout}")


@click.command("strip")
@click.argument("adapter_file", metavar="FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The adapter file to write.")
@click.option("--keep-photo", is_flag=True, help="Keep the photo's latents, so that edits need no --photo.")
@overwrite_option
@json_option
def strip_command(adapter_file: str, output: str, keep_photo: bool, overwrite: bool, as_json: bool) -> None:
    """Write the adapter in FILE without what an edit doesn't need: photo, date, seed, settings of the fit.

    Its weights can redraw the photo all the same: that is what they were fitted for.

    \b
    Examples:
      lora-unitune strip photo.safetensors -o bare.safetensors
      lora-unitune strip photo.safetensors -o bare.safetensors --keep-photo
    """
    from lora_unitune.adapter.convert import strip

    strip(adapter_file, output, keep_photo, overwrite)
    written = Path(output).stat().st_size
    click.echo(json.dumps({"file": output, "bytes": written}) if as_json else f"{output}: {size(written)}")


@click.command("compress")
@click.argument("adapter_file", metavar="FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The adapter file to write.")
@click.option("--keep", type=float, metavar="SHARE", help="Share of all ranks' worth to keep, such as 0.99.")
@click.option("--to-bytes", type=click.IntRange(1), metavar="N", help="Bytes the tensors may take.")
@click.option("--eight-bit", is_flag=True, help="Store 8 bits a number; only lora-unitune reads such a file.")
@base_option
@overwrite_option
@json_option
def compress_command(
    adapter_file: str,
    output: str,
    keep: float | None,
    to_bytes: int | None,
    eight_bit: bool,
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the adapter in FILE with fewer ranks: those that add least for their bytes go first.

    Where the base is at hand (pocket is; else --base), a rank counts by its effect on the base's predictions
    of the photo, and it tells how much of the whole effect is lost. Without, it counts by its size.

    \b
    Examples:
      lora-unitune compress photo.safetensors --keep 0.99 -o small.safetensors
      lora-unitune compress photo.safetensors --to-bytes 100000 -o small.safetensors
      lora-unitune compress photo.safetensors --eight-bit -o half.safetensors
    """
    import torch

    from lora_unitune.adapter.compress import compress, effect_lost
    from lora_unitune.adapter.convert import open_adapter
    from lora_unitune.families import load_base
    from lora_unitune.output import check_output

    check_output(output, overwrite)
    adapter = open_adapter(adapter_file)
    near = base or ("pocket" if adapter.base == "pocket" else None)
    loaded = load_base(near) if near else None
    found = compress(adapter, keep, to_bytes, loaded, eight_bit)
    lost = effect_lost(loaded, adapter, found.adapter) if loaded else None
    found.adapter.save(output, overwrite, torch.int8 if eight_bit else torch.float16)
    before, after = Path(adapter_file).stat().st_size, Path(output).stat().st_size
    if as_json:
        ranks = {"before": found.ranks[0], "after": found.ranks[1]}
        told = {"file": output, "bytes": after, "kept": found.kept, "ranks": ranks, "effect_lost": lost}
        click.echo(json.dumps(told))
        return
    click.echo(
        f"{output}: {size(after)} instead of {size(before)}, {found.ranks[1]} of {found.ranks[0]} ranks, "
        f"{100 * found.kept:.2f} % of their worth"
        + (f", {100 * lost:.1f} % of its effect lost" if lost is not None else "")
    )


@click.command("push")
@click.argument("adapter_file", metavar="FILE")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--licence", default="other", show_default=True, help="Its identifier on the hub.")
@click.option(
    "--picture", "pictures", multiple=True, metavar="PNG", help="Show a sample in the card; up to two."
)
@click.option("--private", is_flag=True, help="Only you see a repository that this creates.")
@click.option("--dry-run", is_flag=True, help="Show everything that would be sent, and send nothing.")
@json_option
def push_command(
    adapter_file: str,
    repo: str,
    licence: str,
    pictures: tuple[str, ...],
    private: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload an adapter FILE with a model card to the hub, as you are logged in there.

    Whoever has the file can redraw its photo; strip leaves out what an edit doesn't need. Others edit with
    hub://OWNER/NAME for the file.

    \b
    Examples:
      lora-unitune push photo.safetensors me/my-photo --dry-run
      lora-unitune push photo.safetensors me/my-photo --licence cc-by-4.0 --picture out.png
    """
    from lora_unitune.adapter.hub import prepare_push, push

    upload = prepare_push(adapter_file, repo, licence=licence, pictures=pictures, private=private)
    files = {name: path.stat().st_size for name, path in upload.files.items()}
    address = None if dry_run else push(upload)
    if as_json:
        told = {"repo": upload.repo, "private": private, "files": files, "card": upload.card}
        click.echo(json.dumps({**told, "pushed": address}))
        return
    if dry_run:
        click.echo(upload.card)
    for name, count in files.items():
        click.echo(f"{name}: {size(count)}")
    click.echo(f"nothing was sent to {upload.repo}" if dry_run else f"pushed: {address}")
