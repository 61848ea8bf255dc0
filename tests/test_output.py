"""Writing: atomic, with one line of error if it fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from conftest import room_for

from lora_unitune.errors import OutputError
from lora_unitune.output import check_output, write_atomically


def write_text(path: Path) -> None:
    path.write_text("new")


def test_a_new_file_has_its_content_and_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    write_atomically(path, write_text)
    (tmp_path / "ordinary").touch()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_an_existing_file_is_replaced_only_when_allowed(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(OutputError, match="already exists; .*overwrite=True"):
        write_atomically(path, write_text)
    assert path.read_text() == "old"
    write_atomically(path, write_text, overwrite=True)
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_write_leaves_the_folder_as_it_was(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("hal")
        raise failure

    with pytest.raises(failure):
        write_atomically(path, interrupted, overwrite=True)
    assert os.listdir(tmp_path) == ["result.txt"]
    assert path.read_text() == "old"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with room_for(4096), pytest.raises(OutputError, match="can't be written") as caught:
        write_atomically(tmp_path / "result", lambda temporary: temporary.write_bytes(bytes(10_000)) and None)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_impossible_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {
        tmp_path / "missing" / "result": "folder .* doesn.t exist",
        tmp_path / "file" / "result": "can't be written",
        tmp_path: "isn't a file",
        Path("/dev/null"): "isn't a file",
        Path("/proc/result"): "can't be written",
        tmp_path / ("x" * 300): "can't be written",
        tmp_path / "a\0b": "can't be written",
    }
    for place, message in places.items():
        with pytest.raises(OutputError, match=message) as caught:
            write_atomically(place, write_text, overwrite=True)
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_checking_first_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "result")
    assert os.listdir(tmp_path) == []
    (tmp_path / "result").touch()
    check_output(tmp_path / "result", overwrite=True)
    with pytest.raises(OutputError, match="already exists"):
        check_output(tmp_path / "result")
