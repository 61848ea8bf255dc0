"""Arguments in Python: taken where they are natural, refused by name elsewhere; an Editor that threads share."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_unitune import Adapter, Editor, SettingError, UnituneError, fit
from lora_unitune.families import Base

QUICK = ("fit.steps=1", "fit.batch_size=1")


def test_natural_arguments_are_taken(
    base15: Base, editor: Editor, saved: Path, tiny_sd15: Path, photo_image: Image.Image
) -> None:
    file = io.BytesIO()
    photo_image.save(file, "PNG")
    wanted = editor.edit(Adapter.load(saved), "a fox", photo=photo_image, steps=2).image.tobytes()
    for adapter in (saved, str(saved)):
        for photo in (file.getvalue(), io.BytesIO(file.getvalue())):
            made = editor.edit(adapter, "a fox", photo=photo, negative_prompt=None, steps=2)
            assert made.image.tobytes() == wanted and made.settings["negative_prompt"] == ""
    assert editor.reconstruct(saved, steps=1) and editor.photo_round_trip(str(saved))
    again = editor.repeat(saved, made.settings, photo_image)
    assert again.image.tobytes() == wanted
    assert Editor(tiny_sd15, device="cpu").base.fingerprint == base15.fingerprint
    assert len(fit(photo_image, base=base15, overrides="fit.steps=2").history) == 2
    assert fit(file.getvalue(), base=tiny_sd15, device="cpu", overrides=QUICK, start=saved).history


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adapter", {}),
        ("adapter", 3),
        ("prompt", ["a fox", "a cat"]),
        ("prompt", b"a fox"),
        ("prompt", "a fox \udcff"),
        ("negative_prompt", ["a fox"]),
        ("negative_prompt", "\udcff"),
        ("seed", "3"),
        ("seed", 3.0),
        ("seed", None),
        ("guidance", "3"),
        ("steps", "3"),
        ("photo", 3),
        ("photo", np.zeros((64, 64, 3))),
    ],
)
def test_other_arguments_of_an_edit_are_refused_by_name(
    editor: Editor, adapter: Adapter, name: str, value: Any
) -> None:
    arguments = {"adapter": adapter, "prompt": "a fox", name: value}
    with pytest.raises(UnituneError, match=name) as caught:
        editor.edit(**arguments)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seeds", 3), ("seeds", ["3"]), ("batch_size", 0), ("batch_size", "2"), ("batch_size", None)],
)
def test_other_arguments_of_edits_are_refused_by_name(
    editor: Editor, adapter: Adapter, name: str, value: Any
) -> None:
    with pytest.raises(SettingError, match=name.removesuffix("s")):
        list(editor.edits(**{"adapter": adapter, "prompt": "a fox", "seeds": [0], name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "3"),
        ("seed", True),
        ("base", None),
        ("base", 3),
        ("recipe", {"fit": {}}),
        ("overrides", {"fit.steps": 2}),
        ("overrides", [("fit.steps", 2)]),
        ("start", {}),
        ("photo", 3),
    ],
)
def test_other_arguments_of_a_fit_are_refused_by_name(
    base15: Base, photo_image: Image.Image, name: str, value: Any
) -> None:
    arguments: dict[str, Any] = {"photo": photo_image, "base": base15, name: value}
    with pytest.raises(UnituneError, match=name) as caught:
        fit(**arguments)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


def test_an_editor_takes_no_other_bases() -> None:
    for base in (None, 3, {}):
        with pytest.raises(UnituneError, match="base = "):
            Editor(base)  # type: ignore[arg-type]


def test_threads_may_share_an_editor(editor: Editor, adapter: Adapter) -> None:
    other = replace(adapter, tensors={name: -2 * tensor for name, tensor in adapter.tensors.items()})
    calls = [(each, seed) for seed in range(3) for each in (adapter, other, None)]
    wanted = [
        editor.edit(each, "a fox", seed=seed, strength=1, steps=4).image.tobytes() for each, seed in calls
    ]
    made: dict[int, bytes] = {}

    def run(number: int) -> None:
        each, seed = calls[number]
        made[number] = editor.edit(each, "a fox", seed=seed, strength=1, steps=4).image.tobytes()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made.get(number) for number in range(len(calls))] == wanted
