"""Several edits of one photo, one after another, with undo, redo and branches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.editing.editor import Editor
from lora_unitune.editing.record import Edit
from lora_unitune.errors import SettingError
from lora_unitune.photo.opening import PhotoSource
from lora_unitune.photo.reading import Photo, load_photo


class History:
    """Edits of a photo, each of the one before it.

        history = History(editor, adapter, photo="holiday.jpg")
        history.edit("at sunset")
        history.edit("a fox").save("both.png")
        history.undo()  # back at the sunset
        history.edit("a balloon")  # a branch beside the fox

    The edits are the turns of a tree, numbered from 1 as they are made; its root, 0, is the photo. None is ever
    changed or dropped: going back to a turn gives the same `Edit`, and so the same file.
    """

    def __init__(
        self, editor: Editor, adapter: Adapter | str | Path | None, photo: PhotoSource | Photo | None = None
    ) -> None:
        """Begins at the photo; it and the adapter are read now.

        Args:
            editor: The editor, which may be used for other edits too.
            adapter: As for `Editor.edit`.
            photo: The photo to start from, instead of the one in the adapter file; the images have its size.

        Raises:
            PhotoError: The photo can't be read.
            AdapterFileError: The adapter's file can't be read.
        """
        self._editor = editor
        self._adapter = editor.open(adapter) if isinstance(adapter, (str, Path)) else adapter
        self._photo = photo if photo is None or isinstance(photo, Photo) else load_photo(photo)
        self._turns: list[Edit] = []
        self._before: list[int] = []
        self._next: dict[int, int] = {}
        self._at = 0

    @property
    def turns(self) -> tuple[Edit, ...]:
        """All edits, of all branches: turn 1 comes first."""
        return tuple(self._turns)

    @property
    def before(self) -> tuple[int, ...]:
        """For each of the turns, the number of the turn that it edits; 0 for the photo."""
        return tuple(self._before)

    @property
    def turn(self) -> int:
        """The number of the current turn; 0 at the photo."""
        return self._at

    @property
    def current(self) -> Edit | None:
        """The edit that the next one edits; None at the photo."""
        return self._turns[self._at - 1] if self._at else None

    def edit(self, prompt: str, **settings: Any) -> Edit:
        """Edits the current edit, or the photo, and goes to the result; after `undo`, this begins a branch.

        Args:
            prompt: Description of the edit; the rare tokens are prepended.
            **settings: The other arguments of `Editor.edit`, but for its photo.

        Raises:
            SettingError: A photo or `then` is among the settings.
            UnituneError: As for `Editor.edit`.
        """
        for name in ("photo", "then"):
            if name in settings:
                raise SettingError(f"{name} isn't allowed here: each turn of a history edits the current one")
        edit = self._editor.edit(self._adapter, prompt, photo=self.current or self._photo, **settings)
        self._turns.append(edit)
        self._before.append(self._at)
        self.go_to(len(self._turns))
        return edit

    def undo(self) -> Edit | None:
        """Goes back to the turn that the current one edits, and returns it; None at the photo.

        Raises:
            SettingError: This is the photo.
        """
        if not self._at:
            raise SettingError("there is nothing to undo: this is the photo, before any edit")
        self._at = self._before[self._at - 1]
        return self.current

    def redo(self) -> Edit | None:
        """Goes forward again, to the turn that was last gone to from here, and returns it.

        Raises:
            SettingError: There is none.
        """
        if self._at not in self._next:
            raise SettingError("there is nothing to redo: no turn follows this one")
        self._at = self._next[self._at]
        return self.current

    def go_to(self, turn: int) -> Edit | None:
        """Goes to a turn of any branch, and returns it; None for the photo.

        Args:
            turn: Its number, from 1; 0 for the photo.

        Raises:
            SettingError: There is no such turn.
        """
        if isinstance(turn, bool) or not isinstance(turn, int) or not 0 <= turn <= len(self._turns):
            raise SettingError(
                f"turn = {turn!r} isn't allowed; give a number from 0, the photo, to {len(self._turns)}"
            )
        self._at = turn
        while turn:
            before = self._before[turn - 1]
            self._next[before], turn = turn, before
        return self.current
