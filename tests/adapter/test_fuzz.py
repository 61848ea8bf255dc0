"""A short run of the harness that opens mutated files; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.__main__ import PACKAGE, few_steps, foreign, little_memory, open_as, open_mutated

from lora_unitune.adapter.adapter import Adapter


def test_files_of_other_tools_are_among_them(tmp_path: Path) -> None:
    """Each is read as it is; else a mutation would say nothing of its kind."""
    path = tmp_path / "foreign.safetensors"
    results = []
    for content in foreign():
        path.write_bytes(content)
        results.append(open_as(lambda place: Adapter.load(place, ""), path))
    assert results == ["read"] * 6


def test_mutated_files_are_read_or_refused() -> None:
    counts = open_mutated(1000)
    assert counts["refused"] > 1000 and counts["read"] > 50


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (Path(PACKAGE) / "header.py", "while True:\n    number = 0\n    number += 1"),
        (Path(PACKAGE) / "header.py", "sum(0 for _ in iter(int, 1))"),
        (Path("elsewhere.py"), "def one(): pass\nwhile True: one()"),
    ],
)
def test_an_endless_loop_is_stopped(file: Path, text: str) -> None:
    with pytest.raises(AssertionError, match="more than 1000 steps"), few_steps(1000):
        exec(compile(text, str(file), "exec"), {})


def test_freed_memory_counts_too() -> None:
    with little_memory(2**20):
        bytearray(2**19)
    with pytest.raises(AssertionError, match="bytes of Python objects"), little_memory(2**20):
        bytearray(2**21)
