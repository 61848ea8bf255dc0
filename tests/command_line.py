"""Runs commands of the command line in this process."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from lora_unitune.cli import main

QUICK = ["--set", "fit.steps=2", "--set", "fit.batch_size=1", "--set", "edit.steps=2", "--device", "cpu"]


def run(*arguments: str | Path) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="lora-unitune")


def refused(*arguments: str | Path, folder: Path, code: int = 1) -> str:
    """Runs a command that has to fail: exit code, one line, nothing written. Returns the line."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = run(*arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return errors[0]
