"""Ctrl-C: the reported files are complete, and there are no others."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUICK, run
from PIL import Image

from lora_unitune import read_settings
from lora_unitune.cli.demo import EXAMPLES
from lora_unitune.cli.editing import _BATCH
from lora_unitune.cli.terminal import uninterrupted

CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from lora_unitune.cli import main; main()"
)


def stopped(*arguments: str | Path, stream: str, at: str) -> tuple[list[str], list[str]]:
    """Runs a command, presses Ctrl-C once a line begins with some text, and returns what it printed.

    Args:
        *arguments: The command's arguments.
        stream: Stream of the line: "stdout" or "stderr".
        at: Beginning of the line.

    Returns:
        All lines of standard output, and the last of standard error.
    """
    command = [sys.executable, "-u", "-c", CODE, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        for line in getattr(process, stream):
            lines.append(line.rstrip("\n"))
            if line.startswith(at):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    return [*(lines if stream == "stdout" else []), *output.splitlines()], errors.splitlines()[-1:]


@pytest.fixture(scope="module")
def pocket_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter fitted on pocket."""
    file = tmp_path_factory.mktemp("pocket") / "a.safetensors"
    assert run("fit", EXAMPLES / "scene-1.png", "-o", file, *QUICK).exit_code == 0
    return file


@pytest.mark.parametrize("seed", [3, 4])
def test_an_edit_keeps_the_images_that_it_names(tmp_path: Path, pocket_file: Path, seed: int) -> None:
    out, first = tmp_path / "out.png", tmp_path / f"out-{seed + 1}.png"
    arguments = ("edit", pocket_file, "at night", "-o", out, "-n", "8", "--seed", str(seed), "--steps", "10")
    lines, errors = stopped(*arguments, stream="stdout", at=str(first))
    written = [line.partition(": ")[0] for line in lines]
    assert 2 <= len(written) < 8
    (message,) = errors
    assert message.startswith("stopped; ") and message.endswith(" are written")
    named = re.findall(r"[^\s,]+\.png", message)
    assert named == written if len(written) <= 4 else named == [written[0], written[-1]]
    assert sorted(map(str, tmp_path.iterdir())) == written
    for number, path in enumerate(written, start=seed):
        Image.open(path).load()
        assert read_settings(path)["seed"] == number


def test_what_is_sampled_is_saved(tmp_path: Path, pocket_file: Path) -> None:
    out, first = tmp_path / "out.png", tmp_path / "out-0.png"
    arguments = ("edit", pocket_file, "at night", "-o", out, "-n", "12", "--steps", "10")
    lines, _ = stopped(*arguments, stream="stdout", at=str(first))
    count = len(lines)
    assert 0 < count < 12 and count % _BATCH == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"out-{seed}.png" for seed in range(count)}


def test_an_edit_that_has_made_no_image_leaves_nothing(tmp_path: Path, pocket_file: Path) -> None:
    arguments = ("edit", pocket_file, "at night", "-o", tmp_path / "out.png", "-n", "8", "--json")
    assert stopped(*arguments, stream="stderr", at="editing") == ([], ["stopped; nothing was written"])
    assert not any(tmp_path.iterdir())


def test_a_fit_leaves_nothing(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    arguments = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", tiny_sd15)
    more = ("--set", "fit.steps=5000")
    printed = stopped(*arguments, *more, stream="stderr", at="fitting")
    assert printed == ([], ["stopped; nothing was written"])
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_demo_leaves_nothing(tmp_path: Path, tiny_sd15: Path) -> None:
    arguments = ("demo", "-o", tmp_path / "shown", "--base", tiny_sd15, "--set", "fit.steps=2")
    printed = stopped(*arguments, stream="stderr", at="editing")
    assert printed == ([], ["stopped; nothing was written"])
    assert not any(tmp_path.iterdir())


def test_ctrl_c_waits_for_the_end_of_a_block() -> None:
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["the rest"]
