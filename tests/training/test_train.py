"""The fit: it lowers the loss, is deterministic, and restores the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import at, weights_of
from PIL import Image

from lora_unitune.adapter import layers
from lora_unitune.errors import FitError, PhotoError, RecipeError, SettingError
from lora_unitune.families import Base
from lora_unitune.photo.reading import load_photo
from lora_unitune.recipe import Recipe
from lora_unitune.training.fit import _full_tensors, _trainable, fit
from lora_unitune.training.loop import OnNote, denoising_error, train
from lora_unitune.training.prepare import Prepared, prepare

QUICK = ("fit.steps=3", "fit.batch_size=2", "lora.unet.learning_rate=1e-3")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(
    base: Base, prepared: Prepared, overrides: Sequence[str], on_note: OnNote | None = None
) -> dict[str, torch.Tensor]:
    """Trains as `fit` does, and returns the tensors before they are rounded to float16."""
    recipe = base.family.complete(Recipe(), overrides)
    with _trainable(base, recipe, seeded()):
        train(prepared, base, recipe, seeded(1), on_note=on_note)
        return _full_tensors(base) if recipe.fit.method == "full" else layers.collect(base)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of tensors with the same keys."""
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def untrained(base: Base, overrides: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors that `trained` starts from."""
    recipe = base.family.complete(Recipe(), overrides)
    with _trainable(base, recipe, seeded()):
        return _full_tensors(base) if recipe.fit.method == "full" else layers.collect(base)


def apart(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """The distance between the results of two fits, relative to the first one's distance from its start.

    A fit that doesn't train has distance 1 to one that does, whatever the learning rate.
    """
    assert first.keys() == second.keys() == start.keys()
    between, way = (
        torch.cat([(first[key] - other[key]).flatten() for key in first]).norm().item()
        for other in (second, start)
    )
    assert way > 0, "the first fit has to move for this to mean anything"
    return between / way


@pytest.fixture(params=["15", "21", "xl"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(f"base{request.param}")


@pytest.fixture
def prepared(base15: Base, photo_image: Image.Image) -> Prepared:
    return prepare(at(photo_image, 32), Recipe(), base15)


@torch.no_grad()
def error_on_photo(base: Base, photo: Image.Image) -> float:
    """The loss on the photo with its rare tokens, with fixed noise and timesteps."""
    prepared = prepare(at(photo, 32), Recipe(), base)
    latents, schedule = prepared.mean.expand(32, -1, -1, -1), base.schedule()
    noise = torch.randn(latents.shape, generator=seeded(8))
    index = torch.arange(32) * 31 + 15
    condition = base.condition(prepared.rare_tokens)
    return denoising_error(base, schedule, latents, noise, index, condition).item()


def test_a_fit_lowers_the_loss_for_epsilon_and_v_prediction(base: Base, photo_image: Image.Image) -> None:
    before = error_on_photo(base, photo_image)
    seen: list[tuple[int, int, float]] = []
    overrides = (
        "fit.steps=25",
        "lora.unet.learning_rate=1e-2",
        "lora.unet.targets=to_q,to_k,to_v,to_out.0,conv1,conv2,conv_out",
    )
    adapter = fit(
        photo_image, base=base, recipe=Recipe(), overrides=overrides, on_step=lambda *args: seen.append(args)
    )
    assert [step for step, _, _ in seen] == list(range(1, 26)) and {steps for _, steps, _ in seen} == {25}
    layers.attach(base, adapter.recipe.lora)
    layers.load_in_place(layers.slots(base), adapter.tensors, adapter.recipe.lora)
    assert error_on_photo(base, photo_image) < 0.8 * before


def test_the_adapter_says_what_made_it(base15: Base, photo_image: Image.Image) -> None:
    adapter = fit(photo_image, base=base15, recipe=Recipe(), overrides=QUICK, seed=4)
    assert (adapter.base, adapter.fingerprint) == (base15.name, base15.fingerprint)
    assert (adapter.seed, adapter.size, adapter.recipe.fit.steps) == (4, (36, 28), 3)
    assert len(adapter.history) == 3 and adapter.photo_digest == load_photo(photo_image).digest
    assert len(adapter.rare_tokens.split()) == 2 and adapter.seconds > 0
    prepared = prepare(at(photo_image, 36, 28), Recipe(), base15)
    assert adapter.photo_latents is not None and torch.equal(
        adapter.photo_latents, prepared.mean.half().float()
    )
    assert (
        fit(photo_image, base=base15, recipe=Recipe(), overrides=QUICK, embed_photo=False).photo_latents
        is None
    )


def test_a_base_can_be_named_by_its_folder(tiny_sd15: Path, base15: Base, photo_image: Image.Image) -> None:
    named = fit(photo_image, base=str(tiny_sd15), recipe=Recipe(), overrides=QUICK, device="cpu")
    held = fit(photo_image, base=base15, recipe=Recipe(), overrides=QUICK)
    assert distance(named.tensors, held.tensors) == 0
    assert any(tensor.any() for key, tensor in held.tensors.items() if key.endswith("lora_B.weight"))


def test_the_same_seed_gives_the_same_tensors_twice(base: Base, photo_image: Image.Image) -> None:
    fits = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(fits))  # the global random state has no effect
        fits.append(fit(photo_image, base=base, recipe=Recipe(), overrides=QUICK, seed=seed).tensors)
    assert distance(fits[0], fits[1]) == 0
    learned = [{key: t for key, t in tensors.items() if key.endswith("lora_B.weight")} for tensors in fits]
    assert distance(learned[0], learned[2]) > 0  # B starts from 0 in each


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_base_is_restored_bit_for_bit_even_when_stopped(
    base15: Base, photo_image: Image.Image, method: str
) -> None:
    before = weights_of(base15)
    identities = [id(child) for module in base15.parts.values() for child in module.modules()]

    def check() -> None:
        after = weights_of(base15)
        assert before.keys() == after.keys() and distance(before, after) == 0
        assert identities == [id(child) for module in base15.parts.values() for child in module.modules()]
        parameters = [p for module in base15.parts.values() for p in module.parameters()]
        assert not any(p.requires_grad or p.grad is not None for p in parameters)

    def stop(step: int, steps: int, loss: float) -> None:
        during = weights_of(base15)
        assert during.keys() != before.keys() or distance(before, during) > 0
        raise KeyboardInterrupt

    overrides = [*QUICK, f"fit.method={method}"]
    fit(photo_image, base=base15, recipe=Recipe(), overrides=overrides)
    check()
    with pytest.raises(KeyboardInterrupt):
        fit(photo_image, base=base15, recipe=Recipe(), overrides=overrides, on_step=stop)
    check()


@pytest.mark.parametrize("text_encoder_rank", [0, 4])
def test_full_fine_tuning_trains_every_weight_of_the_adapted_parts(
    base15: Base, photo_image: Image.Image, text_encoder_rank: int
) -> None:
    overrides = [*QUICK, "fit.method=full", f"lora.text_encoder.rank={text_encoder_rank}"]
    adapter = fit(photo_image, base=base15, recipe=Recipe(), overrides=overrides)
    parts = {"unet": base15.parts["unet"]} | (base15.parts if text_encoder_rank else {})
    original = {f"{part}.{name}": p for part, m in parts.items() for name, p in m.named_parameters()}
    assert adapter.tensors.keys() == original.keys()
    changed = sum(not torch.equal(adapter.tensors[key], original[key].half().float()) for key in original)
    assert changed > 0.9 * len(original)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulation_equals_a_big_batch(base15: Base, prepared: Prepared, method: str) -> None:
    common = ("fit.steps=3", "fit.optimizer=sgd", "lora.unet.learning_rate=0.1", f"fit.method={method}")
    small, big = (
        trained(base15, prepared, [*common, *sizes])
        for sizes in (
            ("fit.batch_size=2", "fit.gradient_accumulation=3"),
            ("fit.batch_size=6", "fit.gradient_accumulation=1"),
        )
    )
    assert apart(big, small, untrained(base15, common)) < 1e-4


def test_checkpointing_changes_nothing_and_is_switched_off(base15: Base, prepared: Prepared) -> None:
    unet, was_on = base15.parts["unet"], list[bool]()
    hook = unet.register_forward_pre_hook(lambda *args: was_on.append(unet.is_gradient_checkpointing))
    plain = trained(base15, prepared, QUICK)
    saving = trained(base15, prepared, [*QUICK, "fit.gradient_checkpointing=true"])
    hook.remove()
    assert was_on == [False] * 3 + [True] * 3
    assert apart(plain, saving, untrained(base15, QUICK)) < 1e-4
    assert not base15.parts["unet"].is_gradient_checkpointing


def test_a_fit_that_runs_out_of_memory_continues_with_less_to_the_same_result(
    base15: Base, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory shrinks after two steps; with checkpointing a noised copy needs a third of it."""
    overrides = ("fit.steps=3", "fit.optimizer=sgd", "lora.unet.learning_rate=0.1", "fit.batch_size=4")
    whole, predict, unet = trained(base15, prepared, overrides), base15.predict, base15.parts["unet"]
    notes, sizes, room = list[str](), list[int](), [12, 12, 2]

    def on_a_small_card(latents: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if len(latents) * (1 if unet.is_gradient_checkpointing else 3) > room[min(len(sizes), 2)]:
            raise torch.OutOfMemoryError("the card is full")
        sizes.append(len(latents))
        return predict(latents, *others)

    monkeypatch.setattr(base15, "predict", on_a_small_card)
    saving = trained(base15, prepared, overrides, notes.append)
    assert apart(whole, saving, untrained(base15, overrides)) < 1e-4
    assert sizes == [4, 4, 2, 2]
    assert len(notes) == 2 and "step 3" in notes[0] and "recomputed" in notes[0]
    assert "2 noised copies at a time, 2 times" in notes[1]
    assert not unet.is_gradient_checkpointing
    room[2] = 0
    with pytest.raises(FitError, match="memory ran out at step 1 with one noised copy"):
        trained(base15, prepared, overrides)
    assert not unet.is_gradient_checkpointing


def test_warm_up_starts_slowly(base15: Base, prepared: Prepared) -> None:
    once = ("fit.steps=1", "fit.optimizer=sgd", "fit.max_gradient_norm=0", "lora.unet.learning_rate=0.1")
    full = trained(base15, prepared, once)
    quarter = trained(base15, prepared, [*once, "fit.warmup_steps=3"])
    moved = {key: tensor for key, tensor in full.items() if tensor.any() and key.endswith("lora_B.weight")}
    expected, start = ({key: share * tensor for key, tensor in moved.items()} for share in (1 / 4, 0))
    assert apart(expected, {key: quarter[key] for key in moved}, start) < 1e-4  # B starts from 0


def test_decay_ends_slowly(base15: Base, prepared: Prepared) -> None:
    settings = ("fit.optimizer=sgd", "fit.max_gradient_norm=0", "lora.unet.learning_rate=0.1")
    once = trained(base15, prepared, [*settings, "fit.steps=1"])
    steady = trained(base15, prepared, [*settings, "fit.steps=2"])
    decayed = trained(base15, prepared, [*settings, "fit.steps=2", "fit.decay_share=1"])
    halfway = {key: (once[key] + steady[key]) / 2 for key in once}
    assert apart(halfway, decayed, once) < 1e-3  # of the second step's way, half


def test_gradients_are_clipped(base15: Base, prepared: Prepared) -> None:
    once = (
        "fit.steps=1",
        "fit.optimizer=sgd",
        "lora.unet.learning_rate=1",
        "lora.text_encoder.learning_rate=1",
    )
    tensors = trained(base15, prepared, [*once, "fit.max_gradient_norm=0.001"])
    moved = torch.cat([t.flatten() for key, t in tensors.items() if key.endswith("lora_B.weight")])
    assert moved.norm().item() == pytest.approx(0.001, rel=1e-3)  # the gradient of A is 0 while B is


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "override", "share"),
    [
        ("lora", "fit.precision=bf16", 0.3),
        ("full", "fit.precision=bf16", 0.3),
        ("full", "fit.optimizer=adamw8bit", 0.05),  # small tensors, all of "lora" here, stay in 32 bits
    ],
)
def test_other_precisions_and_optimizers_end_nearby_in_one_process(
    base15: Base, prepared: Prepared, method: str, override: str, share: float
) -> None:
    settings = [*QUICK, f"fit.method={method}"]
    start, plain = untrained(base15, settings), trained(base15, prepared, settings)
    assert 0 < apart(plain, trained(base15, prepared, [*settings, override]), start) < share
    assert distance(plain, trained(base15, prepared, settings)) == 0


def test_a_text_encoder_without_adapter_is_not_run_again(base15: Base, prepared: Prepared) -> None:
    calls = []
    text_encoder = base15.parts["text_encoder"]
    handle = text_encoder.register_forward_hook(lambda *args: calls.append(args[1][0].shape[0]))
    try:
        trained(base15, prepared, [*QUICK, "lora.text_encoder.rank=0"])
        assert calls == [1]
        calls.clear()
        trained(base15, prepared, QUICK)
        assert calls == [1, 1, 1], "once a step, whatever the batch"
    finally:
        handle.remove()


def test_a_loss_that_explodes_says_which_setting_to_lower(base15: Base, photo_image: Image.Image) -> None:
    overrides = [
        "fit.optimizer=sgd",
        "fit.method=full",
        "lora.unet.learning_rate=1",
        "fit.max_gradient_norm=0",
    ]
    with pytest.raises(FitError, match="lower lora.unet.learning_rate"):
        fit(photo_image, base=base15, recipe=Recipe(), overrides=overrides)


def test_impossible_settings_are_refused(base15: Base, photo_image: Image.Image, tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, *overrides: str, **settings: object) -> None:
        before = weights_of(base15)
        with pytest.raises(error, match=message):
            fit(
                **{"photo": photo_image, "base": base15, "recipe": Recipe(), "overrides": overrides}
                | settings
            )
        assert distance(before, weights_of(base15)) == 0

    refused(SettingError, "'fp16' needs a CUDA GPU", "fit.precision=fp16")
    refused(SettingError, "'adam9' is unknown", "fit.optimizer=adam9")
    refused(RecipeError, "'to_kk' names no layer", "lora.unet.targets=to_kk")
    refused(RecipeError, "photo.size = 33x32", "photo.size=33x32")
    refused(RecipeError, "no part 'unett' .did you mean 'unet'", "lora.unett.rank=3")
    refused(RecipeError, "stepz", "fit.stepz=3")
    refused(SettingError, "seed = -1", seed=-1)
    refused(PhotoError, "doesn't exist", photo=tmp_path / "none.jpg")
