"""Undo, redo and branches of several edits."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_unitune import Adapter, Editor, History, SettingError


@pytest.fixture
def history(editor: Editor, adapter: Adapter, photo_image: Image.Image) -> History:
    """Three turns, of which the last two are branches: 1, then 2 and 3 of 1."""
    history = History(editor, adapter, photo_image)
    history.edit("a fox", steps=2)
    history.edit("at night", steps=2, seed=3)
    history.undo()
    history.edit("at sunset", steps=2)
    return history


def test_turns_form_a_tree(history: History) -> None:
    first, second, third = history.turns
    assert history.before == (0, 1, 1) and history.turn == 3 and history.current is third
    assert history.undo() is first and history.redo() is third
    assert history.go_to(2) is second
    assert history.undo() is first and history.redo() is second
    assert history.undo() is first and history.undo() is None
    assert history.turn == 0 and history.current is None
    assert history.redo() is first and history.redo() is second
    assert history.go_to(0) is None and history.turns == (first, second, third)


def test_going_back_gives_the_same_file(
    editor: Editor, adapter: Adapter, photo_image: Image.Image, tmp_path: Path
) -> None:
    history = History(editor, adapter, photo_image)
    history.edit("a fox", steps=2).save(tmp_path / "first.png")
    history.edit("at night", steps=2)
    back = history.undo()
    assert back is not None
    back.save(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_a_turn_is_an_edit_of_the_one_before(
    history: History, editor: Editor, adapter: Adapter, photo_image: Image.Image
) -> None:
    first = editor.edit(adapter, "a fox", photo=photo_image, steps=2)
    second = editor.edit(adapter, "at night", photo=first, steps=2, seed=3)
    assert [turn.image.tobytes() for turn in history.turns[:2]] == [
        first.image.tobytes(),
        second.image.tobytes(),
    ]
    assert history.turns[1].settings == second.settings


def test_a_history_keeps_the_photo_and_the_adapter_that_it_began_with(
    editor: Editor, saved: Path, photo_image: Image.Image, tmp_path: Path
) -> None:
    photo_image.save(tmp_path / "photo.png")
    history = History(editor, saved, tmp_path / "photo.png")
    for file in (saved, tmp_path / "photo.png"):
        file.unlink()
    assert history.edit("a fox", steps=2).image.size == photo_image.size


def test_steps_that_lead_nowhere_are_refused(editor: Editor, adapter: Adapter) -> None:
    history = History(editor, adapter)
    with pytest.raises(SettingError, match="nothing to undo"):
        history.undo()
    with pytest.raises(SettingError, match="nothing to redo"):
        history.redo()
    for turn in (1, -1, True, "a fox", None):
        with pytest.raises(SettingError, match="from 0, the photo, to 0"):
            history.go_to(turn)  # type: ignore[arg-type]
    for more in ({"photo": "photo.jpg"}, {"then": ["a fox"]}):
        with pytest.raises(SettingError, match="isn't allowed here"):
            history.edit("a fox", **more)
    with pytest.raises(SettingError):
        history.edit("a fox", steps=0)
    assert history.turns == () and history.current is None
