from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from lora_unitune.pocket.world import (
    TIMES,
    Change,
    Scene,
    caption,
    change_scene,
    counterfactual,
    draw_scene,
    is_held_out,
    is_unseen_pair,
    object_mask,
    render,
    words,
)
from lora_unitune.pocket.world.sprites import COLOURED, OBJECTS, UNKNOWN


def test_a_scene_is_drawn_the_same_twice() -> None:
    for seed in range(8):
        scene = draw_scene(seed)
        assert scene == draw_scene(seed)
        assert render(scene).tobytes() == render(scene).tobytes()
        assert render(scene).size == (64, 64)


def test_splits_do_not_meet() -> None:
    train = {draw_scene(seed) for seed in range(400)}
    held_out = {draw_scene(seed, "held-out") for seed in range(200)}
    unseen = {draw_scene(seed, "unseen") for seed in range(100)}
    assert not any(is_held_out(scene) for scene in train)
    assert all(is_held_out(scene) for scene in held_out | unseen)
    assert all(is_unseen_pair(scene.object, scene.place) for scene in unseen)
    assert not any(is_unseen_pair(scene.object, scene.place) for scene in train | held_out)


def test_every_object_is_seen_somewhere_and_every_attribute_occurs() -> None:
    drawn = [draw_scene(seed) for seed in range(1500)]
    assert {scene.object for scene in drawn} == set(OBJECTS)
    assert {scene.time for scene in drawn} == set(TIMES)
    assert all(bool(scene.colour) == (scene.object in COLOURED) for scene in drawn)


def test_objects_at_a_side_face_the_middle() -> None:
    drawn = [draw_scene(seed) for seed in range(300)]
    assert {scene.side: scene.mirrored for scene in drawn if scene.side != "middle"} == {
        "left": True,
        "right": False,
    }
    assert {scene.mirrored for scene in drawn if scene.side == "middle"} == {True, False}
    assert len({scene.size for scene in drawn}) == 3


def test_captions_use_only_known_words_and_vary() -> None:
    rng = random.Random(0)
    known = {word.strip(",") for word in words()}
    said = [caption(draw_scene(seed), rng) for seed in range(500)]
    assert {word.strip(",") for text in said for word in text.split()} <= known
    assert 20 < sum(not text for text in said) < 90
    assert len({caption(draw_scene(3), rng) for _ in range(30)}) > 15


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        (Change("object", "balloon"), "a red balloon"),
        (Change("object", "elephant"), "an elephant"),
        (Change("place", "beach"), "a dog on the beach"),
        (Change("time", "night"), "a dog at night"),
        (Change("look", "sketch"), "a pencil sketch of a dog"),
        (Change("companion", "apple"), "a dog and an apple"),
        (Change("x", 0.6875), "a dog on the right"),
        (Change("size", 42 / 64), "a big dog"),
    ],
)
def test_an_edit_changes_one_thing(change: Change, prompt: str) -> None:
    scene = Scene("dog", "meadow", x=0.4375, size=34 / 64, seed=5)
    edit = counterfactual(scene, change)
    assert edit.prompt == prompt
    before, after = (np.asarray(render(s)).astype(int) for s in (scene, edit.scene))
    assert np.abs(before - after)[~edit.mask].max(initial=0) <= 6
    assert edit.mask.any()
    if change.field in ("companion", "object"):
        assert edit.mask.mean() < 0.4


def test_recolouring_is_local() -> None:
    scene = Scene("car", "city", colour="red", seed=2)
    edit = counterfactual(scene, Change("colour", "blue"))
    assert edit.prompt == "a blue car"
    assert 0.01 < edit.mask.mean() < 0.3


def test_a_new_object_keeps_a_colour_it_can_have() -> None:
    scene = Scene("car", "city", colour="green", seed=2)
    assert change_scene(scene, Change("object", "balloon")).colour == "green"
    assert change_scene(scene, Change("object", "dog")).colour == ""


def test_an_impossible_scene_is_refused() -> None:
    with pytest.raises(ValueError, match="place is 'moon'; allowed"):
        Scene("dog", "moon")
    with pytest.raises(ValueError, match="colour"):
        Scene("dog", "meadow", colour="red")


def test_unknown_objects_are_rendered_and_never_drawn_for_training() -> None:
    names = [name for each in UNKNOWN.values() for name in each]
    assert len(names) == len(set(names)) == 32 and not set(names) & set(OBJECTS)
    assert not {draw_scene(seed).object for seed in range(300)} & set(names)
    pictures = {render(Scene(name, "meadow")).tobytes() for name in names}
    assert len(pictures) == len(names)


def test_object_mask_covers_what_the_object_changes() -> None:
    scene = Scene("owl", "desert", "night", x=0.3, size=0.5, mirrored=True)
    other = dataclasses.replace(scene, object="robot")
    changed = np.abs(np.asarray(render(scene), int) - np.asarray(render(other), int)).max(-1) > 60
    assert not (changed & ~(object_mask(scene) | object_mask(other))).sum() > 30
    assert 300 < object_mask(scene).sum() < 1100
