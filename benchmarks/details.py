"""Edits at the photo's own size, against the known truth.

    python -m benchmarks.details lights FOLDER -o benchmarks/results/details/lights.json
    python -m benchmarks.details kinds FOLDER -o benchmarks/results/details/kinds.json
    python -m benchmarks.details edits -o benchmarks/results/details/edits.json
    python -m benchmarks.details turns -o benchmarks/results/details/turns.json

The first changes the light of real photos by functions, at the photo's size and at the base's: how much of the truth
`photo/composition.py` restores, if the base's own edit were right. The second composes true edits of scenes of the
test lists and of real photos through the base's autoencoder, local ones also exact, and measures kinds, borders and
ghosts. The third fits scenes of the test lists, rendered at eight times the base's size, and edits them. The fourth
edits such scenes six times in sequence. "Enlarged" is the base's own image, enlarged.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lora_unitune import Edit, Editor, History, fit
from lora_unitune.editing.prompts import asks_for_a_style
from lora_unitune.output import write_atomically
from lora_unitune.photo.colors import to_bytes
from lora_unitune.photo.composition import Changes, compose, find_changes
from lora_unitune.photo.details import add_detail
from lora_unitune.photo.framing import choose_size, frame, seen_part
from lora_unitune.photo.reading import load_photo, photo_to_tensor
from lora_unitune.pocket.world import COMPANIONS, SIDE, Change, Scene, counterfactual, render
from lora_unitune.pocket.world.drawing import LOOKS, Values, night, sepia, sunset
from lora_unitune.pocket.world.sprites import OBJECTS
from lora_unitune.settings import PhotoSettings

from .counterfactual.measures import interval, psnr
from .counterfactual.pairs import TEST, Pair, draw_pairs, scenes
from .counterfactual.run import noise_seeds, photos
from .origin import origin

SCALE = 8
FIELDS = {"object": OBJECTS, "companion": COMPANIONS}
"""What the turns change, in turn."""
SMALLEST = 1024  # pixels of a photo's shorter side
EDGE = 0.05  # gradient of an edge
FEWEST = 200  # pixels that a gradient is measured on
Row = dict[str, Any]
Case = tuple[str, str, tuple[str, ...], NDArray[np.uint8], NDArray[np.uint8]]
"""Name of a photo, the edit, the kinds that are right, the photo and its truth."""
LIGHTS = {"night": night, "sunset": sunset, "sepia": sepia}


def likeness(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """PSNR in dB."""
    return psnr(float(np.square(first / 255.0 - second / 255.0).mean()))


def enlarged(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def expected(pair: Pair) -> tuple[str, ...]:
    """The kinds of change that an edit's truth may count as; a place may keep its sky and its light, or not."""
    before, after = pair.before, pair.truth.scene
    if pair.kind == "look" and {before.look, after.look} != {"plain", "sepia"}:
        return ("restyled",)
    if pair.kind in ("look", "time"):
        return "relit", "both"
    return ("local", "both", "restyled") if pair.kind == "place" else ("local",)


def outside_of_truth(photo: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The pixels, (h, w), outside of what the truth changes, grown by two latents, or one at 1,024."""
    changes = torch.from_numpy((np.abs(photo.astype(int) - truth).max(2) > 2).astype(np.float32))
    cells = F.max_pool2d(changes[None, None], SCALE)
    outside: NDArray[np.bool_] = (
        F.interpolate(F.max_pool2d(cells, 5, 1, 2), scale_factor=SCALE)[0, 0].numpy() == 0
    )
    return outside


def kept_bytes(photo: NDArray[np.uint8], truth: NDArray[np.uint8], edit: NDArray[np.uint8]) -> float:
    """The share of the pixels that an edit keeps exactly, outside of what the truth changes, grown by two latents."""
    outside = outside_of_truth(photo, truth)
    return float((edit == photo).all(2)[outside].mean()) if outside.any() else float("nan")


def energy(image: NDArray[np.uint8]) -> Values:
    """The squared gradient of each pixel, (h, w), of values in [0, 1]."""
    values = image / 255.0
    down, along = (np.diff(values, axis=axis, append=values.take([-1], axis)) for axis in (0, 1))
    return (down**2 + along**2).sum(2)


def ghost(photo: NDArray[np.uint8], truth: NDArray[np.uint8], edit: NDArray[np.uint8]) -> float:
    """The gradient energy that is left where the photo has edges that the truth doesn't have; NaN if it has few."""
    before, true, after = (energy(image) for image in (photo, truth, edit))
    old = (before > EDGE**2) & (true < 0.1 * before) & (np.abs(photo.astype(int) - truth).max(2) > 2)
    return float(after[old].sum() / before[old].sum()) if old.sum() > FEWEST else float("nan")


def seam(truth: NDArray[np.uint8], edit: NDArray[np.uint8], changes: Changes) -> float:
    """The mean gradient at the borders of replaced regions, of at least one level of 255, in units of the truth's."""
    shown = F.interpolate(changes.replaced, truth.shape[:2], mode="bilinear")[0, 0].numpy()
    border = (shown > 0.25) & (shown < 1)
    if border.sum() < FEWEST:
        return float("nan")
    after, true = (max(float(np.sqrt(energy(image))[border].mean()), 1 / 255) for image in (edit, truth))
    return after / true


def borders(
    photo: NDArray[np.uint8], truth: NDArray[np.uint8], edit: NDArray[np.uint8], changes: Changes
) -> Row:
    """What is kept of a photo outside of a local edit, and how well it is put in."""
    measures = {
        "kept": kept_bytes(photo, truth, edit),
        "ghost": ghost(photo, truth, edit),
        "seam": seam(truth, edit, changes),
    }
    return {name: round(value, 4) if np.isfinite(value) else None for name, value in measures.items()}


def _borders(rows: list[Row]) -> Row:
    """Summaries of `borders` over edits that should be local, and the share of them within each bound."""
    bounds = {"kept": (0.99, 1.0), "ghost": (0.0, 0.1), "seam": (0.0, 1.2)}
    result: Row = {}
    for name, (low, high) in bounds.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        within = float(np.mean([low <= value <= high for value in values])) if values else None
        result[name] = _summary(values) | {"within": within and round(within, 3)}
    return result


def _summary(values: list[float]) -> dict[str, Any]:
    kept = np.array([value for value in values if np.isfinite(value)])
    if not len(kept):
        return {"edits": 0}
    mean, low, high = (round(float(each), 3) for each in interval(kept[:, None]))
    least, most = (round(float(each), 3) for each in (kept.min(), kept.max()))
    return {"edits": len(kept), "mean": mean, "interval": [low, high], "least": least, "most": most}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("lights")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
def run_lights(folder: Path, output: Path) -> None:
    """Real photos of a FOLDER, of at least 1,024 pixels, at pocket's size."""
    rows = []
    for path in sorted(folder.iterdir()):
        photo = load_photo(path)
        width, height = photo.image.size
        if min(width, height) < SMALLEST:
            continue
        shape = width * SMALLEST // min(width, height), height * SMALLEST // min(width, height)
        photo = load_photo(photo.image.resize(shape, Image.Resampling.LANCZOS))
        size = choose_size(shape, PhotoSettings(), (SIDE, SIDE), 16)
        values, box = np.asarray(photo.image), seen_part(shape, size)
        before = photo_to_tensor(frame(photo, size)) / 2 + 0.5
        for name, light in LIGHTS.items():
            truth = Image.fromarray((light(values / 255.0) * 255).round().astype(np.uint8))
            after = frame(load_photo(truth), size).image
            changes = find_changes(before, photo_to_tensor(load_photo(after)) / 2 + 0.5)
            left, top, right, bottom = box
            seen = np.asarray(truth)[top:bottom, left:right]
            ours = compose(values, changes, box)[top:bottom, left:right]
            psnrs = likeness(enlarged(after, (right - left, bottom - top)), seen), likeness(ours, seen)
            rows.append({"photo": path.name, "light": name, "kind": changes.kind, "psnr": [*psnrs]})
            click.echo(f"{path.name} {name}: {psnrs[0]:.1f} to {psnrs[1]:.1f} dB, {changes.kind}", err=True)
    gains = [after - before for before, after in (row["psnr"] for row in rows)]
    result = {
        "made": origin(torch.device("cpu")),
        "photos": len({row["photo"] for row in rows}),
        "least_gain": round(min(gains), 2),
        "median_psnr": round(float(np.median([row["psnr"][1] for row in rows])), 2),
        "rows": [{**row, "psnr": [round(value, 2) for value in row["psnr"]]} for row in rows],
    }
    _write(output, result)


@main.command("kinds")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--pairs", "count", default=50, show_default=True, type=click.IntRange(1), help="Of each list.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
@torch.no_grad()
def run_kinds(folder: Path, count: int, output: Path) -> None:
    """True edits of scenes at 512 and 1,024 pixels, and of the middles of a FOLDER's photos, at pocket's size."""
    base, rows = Editor("pocket").base, list[Row]()
    for name, what, kinds, before, truth in chain(_scenes(count), _looks(folder)):
        small, edit = (_reduced(image) for image in (before, truth))
        redraws = [base.decode(base.encode(2 * image - 1)[0]) for image in (small, edit)]
        ways = {"autoencoder": add_detail(small, *redraws).clamp(0, 1)}
        if kinds == ("local",):
            ways["exact"] = edit
        for way, pixels in ways.items():
            changes = styled = find_changes(small, pixels)
            if asks_for_a_style(what):
                styled = find_changes(small, pixels, True)
            image = compose(before, styled, (0, 0, *before.shape[1::-1]))
            large = enlarged(Image.fromarray(to_bytes(pixels[0])), before.shape[1::-1])
            row = {"photo": name, "edit": what, "way": way, "expected": list(kinds), "found": styled.kind}
            row |= {"without_words": changes.kind, "psnr": round(likeness(image, truth), 2)}
            more = borders(before, truth, image, styled) if kinds == ("local",) else {}
            rows.append({**row, "enlarged_psnr": round(likeness(large, truth), 2), **more})
            click.echo(str(rows[-1]), err=True)
    result: Row = {"made": origin(torch.device("cpu"))}
    for way in dict.fromkeys(row["way"] for row in rows):
        of = [row for row in rows if row["way"] == way]
        table = Counter(f"{'/'.join(row['expected'])}: {row['found']}" for row in of)
        result[way] = {
            "right": _summary([float(row["found"] in row["expected"]) for row in of]),
            "right_without_words": _summary([float(row["without_words"] in row["expected"]) for row in of]),
            "kinds": dict(sorted(table.items())),
            "local": _borders([row for row in of if row["expected"] == ["local"]]),
        }
    _write(output, {**result, "rows": rows})


def _scenes(count: int) -> Iterator[Case]:
    """Scenes and their truths, one in six at 1,024 pixels; a second object is put in or taken out by turns."""
    for which, split in TEST.items():
        for number, pair in enumerate(draw_pairs(split, count)):
            scenes, side = [pair.before, pair.truth.scene], SIDE * SCALE * (1 + (number % 6 == 0))
            taken = pair.kind == "companion" and pair.photo % 2 == 1
            before, truth = (np.asarray(render(scene, side)) for scene in (scenes[::-1] if taken else scenes))
            what = f"without {pair.truth.scene.companion}" if taken else pair.prompt
            yield f"{which} {pair.photo}", what, expected(pair), before, truth


def _looks(folder: Path) -> Iterator[Case]:
    """The middles of real photos with functions of light and look, and unchanged."""
    for path in sorted(folder.iterdir()):
        side = SIDE * SCALE
        middle = ImageOps.fit(load_photo(path).image, (side, side), Image.Resampling.LANCZOS)
        values = np.asarray(middle)
        for name, light in LIGHTS.items():
            yield path.name, name, ("relit",), values, (light(values / 255.0) * 255).round().astype(np.uint8)
        for look, words in (("sketch", "a pencil sketch"), ("pixel", "pixel art")):
            yield path.name, words, ("restyled",), values, np.asarray(LOOKS[look](middle, side))
        yield path.name, "nothing", ("nothing",), values, values


def _reduced(image: NDArray[np.uint8]) -> torch.Tensor:
    """An image at pocket's size, (1, 3, 64, 64) in [0, 1]."""
    small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return photo_to_tensor(load_photo(small)) / 2 + 0.5


@main.command("edits")
@click.option("--pairs", "count", default=60, show_default=True, type=click.IntRange(1), help="Of each list.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
def run_edits(count: int, output: Path) -> None:
    """Scenes of the test lists at eight times the base's size, fitted and edited."""
    editor, rows, table = Editor("pocket"), list[Row](), Counter[str]()
    for which, split in TEST.items():
        for number, group in photos(draw_pairs(split, count)):
            photo = render(group[0].before, SIDE * SCALE)
            editor.release()
            adapter = fit(photo, base=editor.base, seed=0)
            for pair, seed in zip(group, noise_seeds(number, 0, len(group)), strict=True):
                edit = editor.edit(adapter, pair.prompt, photo=photo, seed=seed)
                row = _measured(pair, np.asarray(photo), edit)
                rows.append({"list": which, "photo": number, "prompt": pair.prompt, **row})
                table[f"{pair.kind}: {row['found']}"] += 1
                click.echo(f"{which} {number} {pair.prompt}: {row}", err=True)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    local = [row for row in rows if row["expected"] == ["local"] and row["enlarged_psnr"] > 20]
    _write(
        output,
        {
            "made": origin(editor.base.device),
            "right_kind": _summary([float(row["found"] in row["expected"]) for row in rows]),
            "kinds": dict(sorted(table.items())),
            "gain": {
                kind: _summary([row["psnr"] - row["enlarged_psnr"] for row in of])
                for kind, of in by_kind.items()
            },
            "local": _borders(local),
            "rows": rows,
        },
    )


@main.command("turns")
@click.option("--photos", "count", default=6, show_default=True, type=click.IntRange(1))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
def run_turns(count: int, output: Path) -> None:
    """Six local edits in sequence of scenes of the test list, at eight times the base's size."""
    editor, rows = Editor("pocket"), list[dict[str, Any]]()
    for number, scene in enumerate(scenes(TEST["known"], count)):
        rng, photo = random.Random(f"turns {number}"), render(scene, SIDE * SCALE)
        values = np.asarray(photo)
        outside, untouched = np.ones(values.shape[:2], bool), np.ones(values.shape[:2], bool)
        editor.release()
        history = History(editor, fit(photo, base=editor.base, seed=0), photo)
        for field in ("object", "companion") * 3:
            choices = [each for each in FIELDS[field] if each not in (scene.object, scene.companion)]
            truth = counterfactual(scene, Change(field, value := rng.choice(choices)))
            prompt = f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
            edit = history.edit(prompt if field == "object" else f"and {prompt}", seed=number)
            before, after = (np.asarray(render(each, SIDE * SCALE)) for each in (scene, truth.scene))
            outside &= outside_of_truth(before, after)
            untouched &= left_alone(edit)
            scene = truth.scene
        image = np.asarray(edit.image)
        row = {
            "prompts": [turn.settings["prompt"] for turn in history.turns],
            "kinds": [turn.changes.kind for turn in history.turns if turn.changes],
            "outside_psnr": round(likeness(values[outside], image[outside]), 2),
            "outside_kept": round(float((values == image).all(2)[outside].mean()), 4),
            "untouched": round(float(untouched.mean()), 4),
            "untouched_is_exact": bool((values == image).all(2)[untouched].all()),
        }
        rows.append(row)
        click.echo(f"{number}: {row}", err=True)
    psnrs = [row["outside_psnr"] for row in rows]
    result = {
        "made": origin(editor.base.device),
        "outside_psnr": _summary(psnrs),
        "photos_at_45_db": sum(psnr >= 45 for psnr in psnrs),
        "outside_kept": _summary([row["outside_kept"] for row in rows]),
        "untouched_is_exact": all(row["untouched_is_exact"] for row in rows),
        "rows": rows,
    }
    _write(output, result)


def left_alone(edit: Edit) -> NDArray[np.bool_]:
    """The pixels, (h, w), of which an edit itself says that it doesn't change them."""
    changes, (width, height) = edit.changes, edit.image.size
    assert changes is not None
    identity = torch.eye(3)[None, :, :, None, None]
    moved = (changes.matrix - identity).abs().flatten(1, 2).amax(1) + changes.offset.abs().amax(1)
    touched = ((moved + changes.replaced[:, 0] > 0) | (changes.kind == "restyled")).float()[:, None]
    grown = F.interpolate(F.max_pool2d(touched, 3, 1, 1), (height, width))
    alone: NDArray[np.bool_] = grown[0, 0].numpy() == 0
    return alone


def _measured(pair: Pair, photo: NDArray[np.uint8], edit: Any) -> dict[str, Any]:
    scene: Scene = pair.truth.scene
    truth, image = np.asarray(render(scene, SIDE * SCALE)), np.asarray(edit.image)
    large = enlarged(edit.base_image, edit.image.size)
    return {
        "kind": pair.kind,
        "expected": list(expected(pair)),
        "found": edit.changes.kind,
        "enlarged_psnr": round(likeness(large, truth), 2),
        "psnr": round(likeness(image, truth), 2),
        **borders(photo, truth, image, edit.changes),
    }


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"), overwrite=True)
    click.echo(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1))


if __name__ == "__main__":
    main()
