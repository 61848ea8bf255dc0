"""A short run of the harness that opens mutated files; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

from fuzz.__main__ import open_mutated


def test_mutated_files_are_read_or_refused() -> None:
    found = open_mutated(1500)
    assert found["refused"] > 1500 and found["read"] > 50
