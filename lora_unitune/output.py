"""Writes a result to a file: all of it, or nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lora_unitune.errors import OutputError

PICTURES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""End of a picture's name -> its format."""


def check_ending(path: str | Path, *endings: str) -> None:
    """Checks the end of a file's name; a folder's is left to `check_output`.

    Args:
        path: Path of the file.
        endings: Allowed ends, such as ".png", in lower case.

    Raises:
        OutputError: The name ends otherwise.
    """
    if not str(path).lower().endswith(endings) and not Path(path).is_dir():
        raise OutputError(f"{str(path)!r} has to end in {' or '.join(endings)}")


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Checks that a file can be written, to be called before a long computation.

    Args:
        path: Path of the file.
        overwrite: Whether an existing file may be replaced.

    Raises:
        OutputError: The file can't be written.
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
            raise OutputError(f"{path} already exists; choose another name or pass overwrite=True")
        if not path.parent.is_dir():
            raise OutputError(f"{path} can't be written: folder {path.parent} doesn't exist; create it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path} can't be written: its folder is read-only; choose another folder")
    except OutputError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error


def write_atomically(path: str | Path, write: Callable[[Path], object], overwrite: bool = False) -> None:
    """Writes a temporary file next to the destination and renames it, so that no partial file is ever visible.

    Args:
        path: Path of the file.
        write: Function that writes the content to a path.
        overwrite: Whether an existing file may be replaced.

    Raises:
        OutputError: The file already exists, or can't be written.
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
    return OutputError(f"{path} can't be written ({reason}); choose another path or free disk space")
