from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from random_adapters import make_adapter
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.counterfactual import report
from benchmarks.counterfactual.__main__ import main
from benchmarks.counterfactual.imagic import trainable
from benchmarks.counterfactual.measures import interval, measure
from benchmarks.counterfactual.method import photo_latents
from benchmarks.counterfactual.methods import METHODS, ddim_step
from benchmarks.counterfactual.pairs import KINDS, TEST, Pair, draw_pairs
from benchmarks.counterfactual.run import noise_seeds, split_name
from benchmarks.memory import of_adapter
from lora_unitune import Editor
from lora_unitune.families import POCKET_FOLDER
from lora_unitune.pocket.world import draw_scene, render


def pictures_of(name: str, editor: Editor, pairs: list[Pair]) -> np.ndarray:
    method, dials = split_name(name)
    made: np.ndarray = method.edit(editor, None, pairs, noise_seeds(0, 0, len(pairs)), dials)
    return made


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor("pocket", "cpu")


def test_a_longer_list_begins_with_the_shorter_and_the_lists_share_no_photo() -> None:
    pairs, tuning = draw_pairs("test", 60), draw_pairs("tuning", 60)
    assert [pair.truth.prompt for pair in draw_pairs("test", 20)] == [p.truth.prompt for p in pairs[:20]]
    assert not {repr(pair.before) for pair in pairs} & {repr(pair.before) for pair in tuning}
    assert {pair.kind for pair in pairs} == set(KINDS)
    assert all(pair.truth.mask.any() and not pair.before.companion for pair in pairs)


def test_the_three_references_have_known_scores(editor: Editor) -> None:
    pairs = draw_pairs("test", 240)
    mean = {
        name: {field: np.nanmean([row[field] for row in rows]) for field in rows[0]}
        for name in ("photo", "truth")
        for rows in [measure(pairs, pictures_of(name, editor, pairs))]
    }
    assert mean["photo"]["preserved"] >= 0.98 and mean["photo"]["aligned"] <= 0.02
    assert mean["photo"]["psnr_outside"] == 50 and mean["photo"]["ssim_outside"] == pytest.approx(1)
    assert mean["truth"]["aligned"] >= 0.98 and mean["truth"]["preserved"] >= 0.98
    assert mean["truth"]["psnr_truth"] == 50
    few = pairs[:12]
    drawn = measure(few, pictures_of("text-to-image", editor, few))
    assert np.mean([row["preserved"] for row in drawn]) <= 0.25
    assert np.mean([row["aligned"] for row in drawn]) >= 0.5


def test_the_interval_holds_the_mean_and_leaves_nan_out() -> None:
    values = np.array([[1.0, 0.0, 1.0], [np.nan, np.nan, np.nan], [0.0, 0.0, 1.0]])
    mean, low, high = interval(values)
    assert mean == pytest.approx(0.5)
    assert low <= mean <= high
    assert np.isnan(interval(np.full((2, 2), np.nan))[0])
    assert interval(np.ones((5, 2))) == (1.0, 1.0, 1.0)


def test_a_ddim_step_back_and_forth_changes_nothing(editor: Editor) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 1, 4, 16, 16), generator=generator)
    signal = editor.base.schedule().alpha.square()

    def velocity(step: int) -> torch.Tensor:
        alpha = 1.0 if step < 0 else float(signal[step])
        return alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean

    noisy = ddim_step(editor.base, clean, velocity(-1), -1, 500)
    alpha = float(signal[500])
    assert torch.allclose(noisy, alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise, atol=1e-5)
    assert torch.allclose(ddim_step(editor.base, noisy, velocity(500), 500, -1), clean, atol=1e-5)


def test_trained_weights_are_restored_bit_for_bit() -> None:
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with trainable(module), torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(module.weight, before)
    assert not module.weight.requires_grad


@pytest.mark.parametrize("name", ["ddim-inversion", "ledits++", "imagic"])
def test_a_baseline_edits_and_restores_the_base(
    name: str, editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, dials = split_name(name)
    for steps in ("embedding_steps", "unet_steps"):
        if hasattr(method, steps):
            monkeypatch.setattr(method, steps, 2)
    before = {key: weight.clone() for key, weight in editor.base.parts["unet"].state_dict().items()}
    pairs = draw_pairs("tuning", 2)
    fitted = method.fit(editor, None, 0, dials)
    made = method.edit(editor, fitted, pairs, [1, 2], dials)
    assert made.shape == (2, 64, 64, 3) and made.dtype == np.uint8
    assert np.isfinite(made).all() and made.std() > 5
    after = editor.base.parts["unet"].state_dict()
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())


def test_without_a_fit_the_sampler_is_ours(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an adapter's scale of 0, and with its rare tokens left out, our edit is that of the plain base."""
    adapter, pairs = make_adapter(editor.base, seed=0), draw_pairs("tuning-unknown", 2)
    ours, dials = split_name("lora")
    adapter = replace(adapter, rare_tokens="", photo_latents=photo_latents(editor, pairs))
    with_adapter = ours.edit(editor, adapter, pairs, [1, 2], {**dials, "adapter_scale": 0.0})
    method = METHODS["no-fit"]
    chosen = {name: value for name, value in dials.items() if name != "adapter_scale"}
    assert chosen.keys() <= method.grid.keys()
    made = method.edit(editor, method.fit(editor, None, 0, chosen), pairs, [1, 2], chosen)
    assert np.abs(with_adapter.astype(int) - made).max() <= 1
    seen = []
    monkeypatch.setattr(editor, "pixels", lambda *args: seen.append(args) or torch.zeros(2, 3, 64, 64))
    method.edit(editor, None, pairs, [1, 2], {**chosen, "strength": 1.0})
    adapter, texts, _, photo, _, settings = seen[0]
    assert adapter is None and texts == [pair.prompt for pair in pairs]
    assert photo is not None and settings.residual  # a residual needs the photo at strength 1 too


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in report.TIMES}
    return value


def test_the_size_of_a_file_does_not_depend_on_its_seconds(editor: Editor) -> None:
    adapter = make_adapter(editor.base, seed=0)
    sizes = {of_adapter(replace(adapter, seconds=s))["file_bytes"] for s in (0.5, 0.05123456789123457)}
    assert len(sizes) == 1


def ran(*words: str) -> str:
    result = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_resumes_and_two_runs_agree(tmp_path: Path) -> None:
    few = ["--pairs", "2", "--seeds", "1"]
    summaries = []
    for folder in ("first", "second"):
        for methods in ("photo,sdedit,lora@1", "no-fit,full@1"):  # as by two processes
            ran("--methods", methods, *few, "--out", str(tmp_path / folder))
        ran("report", str(tmp_path / folder), *few)
        summaries.append(json.loads((tmp_path / folder / "results.json").read_text()))
    assert without_times(summaries[0]) == without_times(summaries[1])
    for which in TEST:
        summary = summaries[0][which]
        assert list(summary) == ["lora@1", "full@1", "no-fit", "sdedit", "photo"]
        assert summary["lora@1"]["cost"]["file_bytes"]["median"] < 300_000
        assert summary["sdedit"]["nearer_than_sdedit"]["all"] == [0.5, 0.5, 0.5]
        assert summary["no-fit"]["success_minus_no_fit"]["all"] == [0, 0, 0]
        for name in ("frontier.png", "cost.png", "steps.png", "contact-sheet.png"):
            assert (tmp_path / "first" / which / name).stat().st_size > 0
    tables = (tmp_path / "first" / "table.md").read_text()
    assert "success, object %" in tables and "Unknown things" in tables
    kept = tmp_path / "first" / "known" / "lora@1.jsonl"
    whole = kept.read_text()
    kept.write_text(whole[:-20])  # as left by a run that is interrupted while writing
    ran("report", str(tmp_path / "first"), *few)
    assert kept.read_text() == whole[:-20]  # another process may be writing it
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert "lora@1" not in results["known"] and "lora@1" in results["unknown"]
    command = ["--methods", "lora@1", "--list", "known", *few, "--out", str(tmp_path / "first")]
    ran(*command)
    lines, again = ([json.loads(line) for line in text.splitlines()] for text in (whole, kept.read_text()))
    assert [line.get("rows") for line in lines] == [line.get("rows") for line in again]
    assert lines[:-1] == again[:-1]
    kept.write_text('{"dials": {}}\n')
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "give another --out" in result.output


def random_clip(folder: Path) -> Path:
    """A tiny random CLIP and a tiny random DINO, in one folder each, as transformers saves them."""
    tokenizer = CLIPTokenizer.from_pretrained(POCKET_FOLDER / "tokenizer")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    patches = {**shape, "image_size": 32, "patch_size": 16}
    text, vision = CLIPTextConfig(vocab_size=len(tokenizer), **shape), CLIPVisionConfig(**patches)
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    clip.save_pretrained(folder / "clip")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**patches)).save_pretrained(folder / "dino")
    images.save_pretrained(folder / "dino")
    return folder


@pytest.mark.parametrize("layout", ["pie", "ted"])
def test_a_folder_of_photos_is_scored_with_the_available_models(
    layout: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    inner = photos / ("annotation_images/a" if layout == "pie" else "originals")
    inner.mkdir(parents=True)
    for number in range(2):
        render(draw_scene(number)).resize((80, 64)).save(inner / f"{number}.png")
    if layout == "pie":
        entries = {
            str(n): {"image_path": f"a/{n}.png", "editing_prompt": "a [fox] at night", "mask": [0, 512 * 256]}
            for n in range(2)
        }
        (photos / "mapping_file.json").write_text(json.dumps(entries))
    else:
        listed = [{"img_name": f"{n}.png", "target_text": "a fox at night"} for n in range(2)]
        (photos / "input_list.json").write_text(json.dumps(listed))
    weights = random_clip(tmp_path)
    command = ["folder", str(photos), "--base", str(tiny_sd15), "--methods", "lora@1,sdedit,photo"]
    command += [
        "--clip",
        str(weights / "clip"),
        "--dino",
        str(weights / "dino"),
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    kept = summary["methods"]["photo"]
    assert kept["psnr_outside"][0] == 50 and kept["ssim_outside"][0] == 1
    assert kept["dino_photo"][0] == pytest.approx(1, abs=1e-3)
    assert -1 <= summary["methods"]["lora@1"]["clip_text"][0] <= 1
    assert summary["methods"]["sdedit"]["psnr_outside"][0] < 50
    assert all("left out" in line and "lpips" in line for line in summary["left_out"])


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["folder", str(tmp_path), "--base", "pocket", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2 and "mapping_file.json" in result.output


@pytest.mark.parametrize("name", ["sdedit@40", "lora@x", "nothing"])
def test_an_unknown_method_lists_the_known_ones(name: str) -> None:
    result = CliRunner().invoke(main, ["--methods", name, "--out", "unused"])
    assert result.exit_code == 2
    assert "lora@40" in result.output and "Traceback" not in result.output
