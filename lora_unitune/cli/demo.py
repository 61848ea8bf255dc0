"""The demo: fits the example photos that ship with the package, edits them, and writes a contact sheet."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

import lora_unitune
from lora_unitune import Adapter, Edit, Editor, OutputError, Recipe, UnituneError, fit
from lora_unitune.cli.terminal import bytes_text, uninterrupted, writing
from lora_unitune.families import BaseFiles, default_recipe
from lora_unitune.families.location import locate_base
from lora_unitune.photo.reading import load_photo
from lora_unitune.recipe import read_toml

EXAMPLES = Path(__file__).resolve().parent.parent / "pocket" / "examples"

OnProgress = Callable[[str, int, int], None]
"""Called with the current stage, its completed steps, and its total steps."""

_PICTURE, _LARGEST = 192, 480  # pixels: smaller images are enlarged on the contact sheet, larger ones reduced
_GAP = 16
_TEXT_LINES = 3
_TEXT_SIZE = 15
_LINE = 20


@dataclass(frozen=True)
class Example:
    """A photo to fit, and its edit prompts."""

    name: str
    photo: Path
    description: str
    edits: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One photo's row on the contact sheet: a heading, and images with their captions."""

    heading: str
    pictures: tuple[tuple[Image.Image, str], ...]


def read_examples(folder: Path = EXAMPLES) -> list[Example]:
    """Reads edits.toml: for each photo in its folder, a table with a description and a list of edit prompts."""
    tables = read_toml(folder / "edits.toml")
    return [
        Example(name, folder / f"{name}.png", table["description"], tuple(table["edits"]))
        for name, table in tables.items()
    ]


def run_demo(
    folder: str | Path = "unitune-demo",
    *,
    base: str | BaseFiles = "pocket",
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    examples: Path = EXAMPLES,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Fits and edits each example photo.

    Args:
        folder: Output folder of the adapter files, the images, contact-sheet.png and summary.json.
        base: "pocket", a folder, a .safetensors file, a hub id, or what `locate_base` found.
        overrides: Changes of the base's default recipe, such as "fit.steps=50".
        seed: Seed of the fits and of every image.
        device: "auto", "cpu", "cuda" or "mps".
        overwrite: Whether files in `folder` may be replaced.
        examples: Folder with edits.toml and its photos.
        on_progress: Callback for every step.

    Returns:
        The content of summary.json: seconds, bytes and settings, with the paths of the outputs.

    Raises:
        UnituneError: An argument is invalid, or the folder can't be written; then nothing is written.
    """
    files = locate_base(base) if isinstance(base, str) else base
    recipe = default_recipe(files.name, files.family).override(overrides)
    show = on_progress or (lambda stage, done, total: None)
    started = time.perf_counter()
    with _finished_folder(Path(folder), overwrite) as unfinished:
        rows, fitted = [], []
        chosen = read_examples(examples)
        show("loading the base", 0, 1)
        editor = Editor(files, device=device)
        for number, example in enumerate(chosen, start=1):
            label = f"{example.name} ({number} of {len(chosen)})"
            adapter = _fit_example(example, files, recipe, seed, device, label, show)
            adapter.save(unfinished / f"{example.name}.safetensors")
            row, entry = _edit_example(example, editor, adapter, seed, unfinished, label, show)
            rows.append(row)
            fitted.append(entry)
        contact_sheet(rows).save(unfinished / "contact-sheet.png")
        summary = {
            "lora_unitune": lora_unitune.__version__,
            "base": editor.base.name,
            "device": str(editor.base.device),
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 2),
            "recipe": recipe.to_dict(),
            "photos": fitted,
        }
        (unfinished / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return {"folder": str(folder), "contact_sheet": str(Path(folder) / "contact-sheet.png"), **summary}


def _fit_example(
    example: Example, base: BaseFiles, recipe: Recipe, seed: int, device: str, label: str, show: OnProgress
) -> Adapter:
    """Fits one example, and reports each step."""

    def on_step(step: int, steps: int, loss: float) -> None:
        show(f"fitting {label}, loss {loss:.4f}", step, steps)

    show(f"fitting {label}", 0, recipe.fit.steps)
    return fit(example.photo, base=base, recipe=recipe, seed=seed, device=device, on_step=on_step)


def _edit_example(
    example: Example, editor: Editor, adapter: Adapter, seed: int, folder: Path, label: str, show: OnProgress
) -> tuple[Row, dict[str, Any]]:
    """Reconstructs and edits one example, saves the images, and returns its row and its summary entry."""
    photo = load_photo(example.photo).image
    total = 1 + len(example.edits)
    show(f"redrawing {label}", 0, total)
    redrawn = editor.reconstruct(adapter, seed=seed)
    redrawn.save(folder / f"{example.name}-reconstruction.png")
    pictures = [(photo, "the photo"), (redrawn.image, "redrawn from noise by its rare tokens alone")]
    edits: list[dict[str, Any]] = []
    for number, prompt in enumerate(example.edits, start=1):
        show(f"editing {label}", number, total)
        edit = editor.edit(adapter, prompt, photo=example.photo, seed=seed)
        edits.append(_save_edit(edit, prompt, folder, f"{example.name}-edit-{number}.png"))
        pictures.append((edit.image, prompt))
    show(f"editing {label}", total, total)
    size = (folder / f"{example.name}.safetensors").stat().st_size
    entry = {
        "name": example.name,
        "description": example.description,
        "adapter": f"{example.name}.safetensors",
        "adapter_bytes": size,
        "rare_tokens": adapter.rare_tokens,
        "fit_seconds": round(adapter.seconds, 2),
        "reconstruction": f"{example.name}-reconstruction.png",
        "edits": edits,
    }
    heading = f"{example.description}: fitted in {adapter.seconds:.0f} s, {bytes_text(size)}"
    return Row(heading, tuple(pictures)), entry


def _save_edit(edit: Edit, prompt: str, folder: Path, name: str) -> dict[str, Any]:
    """Saves one edit and returns its entry in the summary."""
    edit.save(folder / name)
    return {"prompt": prompt, "file": name, "seconds": round(edit.seconds, 2), "settings": edit.settings}


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Returns a white RGB sheet with rows of images of any shape, each with its caption below.

    Images are shown at their own size between `_PICTURE` and `_LARGEST` pixels; large ones are on several lines.
    """
    cells = [
        min(max(_PICTURE, *(max(picture.size) for picture, _ in row.pictures)), _LARGEST) for row in rows
    ]
    width = max(max(len(row.pictures) for row in rows) * (_PICTURE + _GAP), max(cells) + _GAP)
    font, tiles, top = ImageFont.load_default(_TEXT_SIZE), [], _GAP
    headings = []
    for row, cell in zip(rows, cells, strict=True):
        headings.append((top, row.heading))
        top += _LINE + _GAP // 2
        columns = width // (cell + _GAP)
        for first in range(0, len(row.pictures), columns):
            line = row.pictures[first : first + columns]
            shown = [
                (ImageOps.contain(each, (cell, cell), Image.Resampling.LANCZOS), text) for each, text in line
            ]
            height = max(_PICTURE, *(picture.height for picture, _ in shown))
            lefts = range(_GAP, width, cell + _GAP)
            tiles += [(left, top, cell, height, *each) for left, each in zip(lefts, shown, strict=False)]
            top += height + _TEXT_LINES * _LINE + _GAP
    sheet = Image.new("RGB", (_GAP + width, top), "white")
    draw = ImageDraw.Draw(sheet)
    for upper, heading in headings:
        draw.text((_GAP, upper), heading, fill=(110, 110, 110), font=font)
    for left, upper, cell, height, picture, text in tiles:
        sheet.paste(picture, (left + (cell - picture.width) // 2, upper + (height - picture.height) // 2))
        for number, words in enumerate(_wrap(text, font, cell)):
            draw.text((left, upper + height + 4 + number * _LINE), words, fill="black", font=font)
    return sheet


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Wraps a caption to the width of an image; longer ones are truncated with "..."."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return (
        lines if len(lines) <= _TEXT_LINES else [*lines[: _TEXT_LINES - 1], f"{lines[_TEXT_LINES - 1]} ..."]
    )


@contextmanager
def _finished_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Makes a hidden folder inside `folder` to write to; its files are moved up on success, and deleted on failure.

    Raises:
        OutputError: The folder holds files and may not be overwritten, or can't be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} isn't a folder; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"{folder} isn't empty; choose another folder, or pass overwrite=True to replace them"
        )
    is_new = not folder.exists()
    unfinished: Path | None = None
    try:
        with uninterrupted():
            if is_new:
                folder.mkdir()
            unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
        yield unfinished
        with writing(folder):
            for path in sorted(unfinished.iterdir()):
                os.replace(path, folder / path.name)
    except UnituneError:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder} can't be written ({error.strerror or error}); choose another folder"
        ) from error
    finally:
        with uninterrupted():
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            if is_new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
