"""Writes a result to a file: all of it, or nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lora_unitune.errors import OutputError


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Checks, before long work begins, that its result can be written.

    Args:
        path: of the file.
        overwrite: whether a file that is there may be replaced.

    Raises:
        OutputError: it can't.
    """
    path = Path(path)
    if "\0" in str(path):
        raise OutputError(
            f"{str(path)!r} can't be written: its name has a null character; choose another name"
        )
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} isn't a file; give the path of a file to write")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} is there already; choose another name or pass overwrite=True")
        if not path.parent.is_dir():
            raise OutputError(f"{path} can't be written: there is no folder {path.parent}; create it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path} can't be written: its folder is read-only; choose another folder")
    except OutputError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error


def write_atomically(path: str | Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Writes a file beside its destination and then moves it there, so that nobody ever sees half of it.

    Args:
        path: of the file.
        write: writes the content to the path it is given.
        overwrite: whether a file that is there may be replaced.

    Raises:
        OutputError: the file is there already, or can't be written.
    """
    path = Path(path)
    check_output(path, overwrite)
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        temporary.touch()
        permissions = (
            temporary.stat().st_mode
        )  # those a new file gets; safetensors replaces it by a private one
        write(temporary)
        temporary.chmod(permissions)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    return OutputError(f"{path} can't be written ({reason}); choose another place or make room")
