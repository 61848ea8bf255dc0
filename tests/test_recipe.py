"""Recipes: strict keys, types and ranges; TOML and back; the shipped ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lora_unitune.errors import RecipeError
from lora_unitune.families import FAMILIES, Family, default_recipe
from lora_unitune.recipe import Recipe, available_recipes
from lora_unitune.settings import EditSettings, FitSettings, LoraSettings, PhotoSettings

SHIPPED = ["pocket/default", "sd15/12gb", "sd15/6gb", "sd15/8gb", "sdxl/12gb", "sdxl/8gb"]


def test_shipped_recipes_are_found_by_name() -> None:
    assert available_recipes() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_survives_toml_and_dictionaries(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_text_with_quotes_and_foreign_letters_survives_toml() -> None:
    recipe = Recipe().override(['prompt.rare_tokens=sk"s \\ über 🦊'])
    assert Recipe.from_toml(recipe.to_toml()).prompt.rare_tokens == 'sk"s \\ über 🦊'


def test_missing_keys_keep_their_defaults() -> None:
    assert Recipe.from_toml("") == Recipe()
    assert Recipe.from_toml("[fit]\nsteps = 3").fit == FitSettings(steps=3)


def test_integers_are_accepted_as_floats_but_not_the_reverse() -> None:
    assert isinstance(LoraSettings(2, alpha=4).alpha, float)
    with pytest.raises(RecipeError, match="a whole number"):
        FitSettings(steps=2.0)  # type: ignore[arg-type]


def test_overrides_are_read_in_the_settings_own_type() -> None:
    assignments = [
        "fit.steps=3",
        "lora.unet.rank=4",
        "lora.unet.learning_rate=1e-3",
        "lora.text_encoder.rank=0",
        "fit.precision=bf16",
        "fit.gradient_checkpointing=true",
        "lora.unet.targets=to_q, to_v",
        'lora.text_encoder.targets=["q_proj"]',
    ]
    recipe = Recipe().override(assignments)
    assert (recipe.fit.steps, recipe.lora["unet"].learning_rate, recipe.fit.precision) == (3, 1e-3, "bf16")
    assert recipe.fit.gradient_checkpointing is True
    assert recipe.lora["unet"].targets == ("to_q", "to_v")
    assert recipe.lora["text_encoder"].targets == ("q_proj",)
    assert Recipe() == Recipe().override([])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "write SECTION.KEY=VALUE"),
        ("fit.=3", "write SECTION.KEY=VALUE"),
        ("fit.stepz=3", "did you mean 'steps'"),
        ("fitt.steps=3", "did you mean 'fit'"),
        ("fit.steps=many", "a whole number from 1"),
        ("fit.steps=0", "a whole number from 1"),
        ("lora.unet.learning_rate=nan", "a number from 0 to 1"),
        ("lora.unet.learning_rate=inf", "a number from 0 to 1"),
        (f"fit.steps={10**400}", "a whole number from 1"),
        ("fit.precision=fp8", "auto, fp32, bf16, fp16"),
        ("fit.gradient_checkpointing=maybe", "true or false"),
        ("lora.unet.targets=to_q", "lora.unet has no rank"),
        ("lora.unet.rnk=3", "did you mean 'rank'"),
        ("lora.unet_rank=3", "lora.PART.rank"),
        ("photo.size=12 x 3", "WIDTHxHEIGHT"),
        ("photo.size=0x3", "WIDTHxHEIGHT"),
        ("edit.strength=0", "above 0 and up to 1"),
        ("edit.strength=1.5", "above 0 and up to 1"),
        ("edit.guidance=-2", "from 1 to 100"),
        ("prompt.rare_tokens=a\nb", "one line of text"),
    ],
)
def test_bad_overrides_say_what_is_allowed(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe().override([assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[fit",
        "fit = 3",
        "[fitt]",
        "steps = 3",
        "[fit]\nsteps = true",
        "[fit]\nsteps = '3'",
        "[lora]\nunet_targets = 'q'",
        "[lora.unet]\nrank = 2\ntargets = 'q'",
        "[lora.unet]\nalpha = 2",
        "[lora.'a b']\nrank = 2",
    ],
)
def test_bad_toml_is_one_line(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_toml(text)
    assert "\n" not in str(caught.value)


def test_a_recipe_file_is_loaded_by_path_and_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[edit]\nsteps = 7\n")
    assert Recipe.load(path).edit == EditSettings(steps=7)
    path.write_text("[edit]\nstep = 7\n")
    with pytest.raises(RecipeError, match="mine.toml.*did you mean 'steps'"):
        Recipe.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.load(path)


def test_unknown_recipes_are_suggested(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'pocket/default'"):
        Recipe.load("pocket/defualt")
    with pytest.raises(RecipeError, match="doesn't exist"):
        Recipe.load(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="can't be read"):
        (tmp_path / "folder.toml").mkdir()
        Recipe.load(tmp_path / "folder.toml")


def test_each_base_has_a_default_recipe() -> None:
    sd, sdxl = FAMILIES["sd"], FAMILIES["sdxl"]
    assert default_recipe("pocket", sd) == sd.complete(Recipe.load("pocket/default"))
    assert default_recipe("owner/model", sd) == sd.complete(Recipe.load("sd15/8gb"))
    assert default_recipe("owner/model", sdxl) == sdxl.complete(Recipe.load("sdxl/12gb"))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_family_completes_a_recipe_once_and_keeps_what_it_says(family: Family) -> None:
    whole = family.complete(Recipe())
    assert list(whole.lora) == list(family.parts) and family.complete(whole) == whole
    for part, settings in family.parts.items():
        assert whole.lora[part] == settings and settings.targets and settings.learning_rate > 0
        mine = family.complete(Recipe(lora={part: LoraSettings(3, alpha=6)}))
        assert (mine.lora[part].rank, mine.lora[part].scale) == (3, 2.0)
        assert mine.lora[part].targets == settings.targets
    with pytest.raises(RecipeError, match=f"lora.nothing: {family.title} has no part 'nothing'"):
        family.complete(Recipe(lora={"nothing": LoraSettings(1)}))


def test_a_size_is_exact_or_a_number_of_pixels_or_neither() -> None:
    assert (PhotoSettings("96x64").exact, PhotoSettings("96x64").pixels) == ((96, 64), 0)
    assert (PhotoSettings("6144").exact, PhotoSettings("6144").pixels) == (None, 6144)
    assert (PhotoSettings().exact, PhotoSettings().pixels) == (None, 0)


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_files_open_with_their_command_and_state_no_defaults(name: str) -> None:
    path = Path(__file__).resolve().parent.parent / "recipes" / f"{name}.toml"
    text = path.read_text(encoding="utf-8")
    assert (
        text.splitlines()[0].startswith("# lora-unitune fit ") and f"--recipe {name}" in text.splitlines()[0]
    )
    written = [
        line.split(" = ")[0] for line in text.splitlines() if " = " in line and not line.startswith("#")
    ]
    recipe, defaults = Recipe.load(name), Recipe().to_dict()
    parts = recipe.to_dict().pop("lora").values()
    sections = {key: section for key, section in recipe.to_dict().items() if key != "lora"}
    stated = [
        key for name, section in sections.items() for key in section if section[key] != defaults[name][key]
    ]
    unsaid = dataclasses.asdict(LoraSettings(0))
    stated += [
        key for section in parts for key in section if key == "rank" or section[key] != list_of(unsaid[key])
    ]
    assert sorted(written) == sorted(stated)


def list_of(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
