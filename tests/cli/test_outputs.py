"""Outputs: never one of the inputs, under a fitting name, and one line where the terminal can't take them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from command_line import QUICK, refused, run
from PIL import Image

from lora_unitune import Adapter, OutputError, convert, read_settings
from lora_unitune.adapter.convert import strip


def link(path: Path, kind: str) -> Path:
    """Returns another name of a file: by a symbolic or a hard link, or by its folder's parent."""
    other = path.with_name(f"{kind}{path.suffix}")
    if kind == "symlink":
        other.symlink_to(path)
    elif kind == "hardlink":
        os.link(path, other)
    return {"same": path, "around": path.parent / ".." / path.parent.name / path.name}.get(kind, other)


@pytest.mark.parametrize("kind", ["same", "around", "symlink", "hardlink"])
def test_no_command_writes_over_what_it_reads(
    tmp_path: Path, tiny_sd15: Path, photo: Path, adapter_file: Path, kind: str
) -> None:
    file = link(adapter_file, kind)
    base = ("--base", tiny_sd15)
    for command in (
        ("fit", photo, "-o", file, "--from", adapter_file, *base, *QUICK),
        ("strip", adapter_file, "-o", file),
        ("convert", adapter_file, "--to", "kohya", "-o", file),
        ("compress", adapter_file, "--keep", "0.9", "-o", file),
        ("edit", adapter_file, "a fox", "-o", link(photo, kind), "--photo", photo, *base),
    ):
        line = refused(*command, "--overwrite", folder=tmp_path)
        assert "which the command reads; choose another name" in line


def test_numbered_pictures_and_files_of_a_folder_that_is_read_are_kept(
    tmp_path: Path, tiny_sd15: Path, photo: Path, adapter_file: Path
) -> None:
    shutil.copy(photo, tmp_path / "out-1.png")
    edit = ("edit", adapter_file, "a fox", "--base", tiny_sd15, "--overwrite")
    command = (*edit, "-o", tmp_path / "out.png", "-n", "2", "--photo", tmp_path / "out-1.png")
    assert "out-1.png, which the command reads" in refused(*command, folder=tmp_path)
    peft = tmp_path / "peft"
    assert run("convert", adapter_file, "--to", "peft", "-o", peft).exit_code == 0
    inside = next(peft.glob("*.safetensors"))
    for command in (("convert", peft, "--to", "kohya"), ("strip", peft)):
        assert f"is inside, {peft}" in refused(*command, "-o", inside, "--overwrite", folder=tmp_path)


@pytest.mark.parametrize("name", ["a.ckpt", "a.png", "a", "a.safetensors.bin"])
def test_an_adapter_has_the_name_of_one(tmp_path: Path, photo: Path, adapter_file: Path, name: str) -> None:
    for command in (
        ("fit", photo),
        ("strip", adapter_file),
        ("convert", adapter_file, "--to", "kohya"),
        ("compress", adapter_file, "--keep", "0.9"),
    ):
        line = refused(*command, "-o", tmp_path / name, folder=tmp_path, code=2)
        assert "has to end in .safetensors" in line
    for write in (
        Adapter.load(adapter_file).save,
        partial(convert, adapter_file, "diffusers"),
        partial(strip, adapter_file),
    ):
        with pytest.raises(OutputError, match="has to end in .safetensors"):
            write(tmp_path / name)


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "a", "a.gif", "a.png.txt"])
def test_a_picture_has_the_name_of_one(tmp_path: Path, edit: list[str | Path], name: str) -> None:
    line = refused(*edit, "a fox", "-o", tmp_path / name, folder=tmp_path, code=2)
    assert "has to end in .png or .jpg" in line


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_a_jpeg_and_a_webp_hold_their_settings(
    tmp_path: Path, edit: list[str | Path], name: str, kind: str
) -> None:
    for out in ("a.png", name):
        assert run(*edit, "a café at night", "-o", tmp_path / out).exit_code == 0
    assert read_settings(tmp_path / name) == read_settings(tmp_path / "a.png")
    assert Image.open(tmp_path / name).format == kind
    command = (*edit, "a fox " * 15_000, "-o", tmp_path / f"long-{name}")
    assert "write a PNG instead" in refused(*command, folder=tmp_path)


def started(*arguments: str | Path, **more: str | int) -> subprocess.CompletedProcess[bytes]:
    """Runs a command in a process of its own, with other environment variables or another standard output."""
    stdout = more.pop("stdout", subprocess.PIPE)
    command = [sys.executable, "-c", "from lora_unitune.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, **more}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8"])
def test_output_that_isnt_utf8_is_written_with_escapes(
    tmp_path: Path, adapter_file: Path, encoding: str
) -> None:
    shutil.copy(adapter_file, tmp_path / "ネコ.safetensors")
    out = tmp_path / "out ネ.safetensors"
    command = ("strip", tmp_path / "ネコ.safetensors", "-o", out)
    result = started(*command, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert result.returncode == 0 and out.is_file(), result.stderr
    assert ("ネ" if encoding == "utf-8" else r"\u30cd") in result.stdout.decode(encoding)


def test_a_full_standard_output_is_one_true_line(tmp_path: Path, adapter_file: Path) -> None:
    out = tmp_path / "bare.safetensors"
    with Path("/dev/full").open("wb") as full:
        for command in (("strip", adapter_file, "-o", out), ("inspect", adapter_file), ("--help",)):
            result = started(*command, stdout=full.fileno())
            (line,) = result.stderr.decode().splitlines()
            assert result.returncode == 1
            assert line.startswith(
                "error: standard output can't be read or written (No space left on device)"
            )
            assert (f"; {out} is written" in line) == out.is_file() == (command[0] == "strip")
            out.unlink(missing_ok=True)


@pytest.mark.parametrize("stream", ["stdout", "stderr", "reader"])
def test_a_closed_stream_is_no_traceback(tmp_path: Path, adapter_file: Path, stream: str) -> None:
    """As `lora-unitune words >&-`, `2>&-` and `| true`."""
    code = "from lora_unitune.cli import main; main()"
    if stream != "reader":
        number = 1 if stream == "stdout" else 2
        code = f"import os, sys; os.close({number}); sys.{stream} = None; {code}"
    out = tmp_path / "bare.safetensors"
    for command in (("words",), ("--help",), ("inspect", adapter_file), ("strip", adapter_file, "-o", out)):
        arguments = [sys.executable, "-c", code, *map(str, command)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stderr is not None
        if stream == "reader":
            process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == (1 if stream == "reader" else 0)
        if stream != "reader":
            process.stdout.close()
        process.stderr.close()
    assert out.is_file()


def test_bytes_that_arent_utf8_are_one_line(tmp_path: Path, edit: list[str | Path]) -> None:
    out = ("-o", tmp_path / "out.png")
    for command in (
        ("a fox \udcff",),
        ("a fox", "--negative-prompt", "\udcff"),
        ("a fox", "--trigger", "\udcff"),
    ):
        line = refused(*edit, *command, *out, folder=tmp_path)
        assert "aren't UTF-8" in line or "--trigger" in command, line
    assert (
        run(*edit, "a fox, caf\udcc3\udca9", "-o", tmp_path / "c.png").exit_code == 0
    )  # LC_ALL=C, but UTF-8
    assert read_settings(tmp_path / "c.png")["prompt"] == "a fox, café"
