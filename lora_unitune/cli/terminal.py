"""Shared by the commands: one-line errors, interruption by Ctrl-C, progress, and human-readable values."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from lora_unitune import OutputError, UnituneError
from lora_unitune.cli.messages import in_options
from lora_unitune.cli.options import Place

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_WRITTEN = "lora_unitune.written"
"""Key in the context's `meta`: the paths written so far."""
_SECONDS_BETWEEN_LINES = 10.0
"""Of progress where there is no terminal."""
_MOST_NAMED = 4
"""For more files than this, the message after Ctrl-C names only the first and the last."""


class Failed(click.ClickException):
    """Failure of a command: one line on standard error, and the exit code."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(" ".join(self.message.splitlines()), file=file, err=True)


class WrongUse(Failed):
    """Wrong usage of a command."""

    exit_code = 2


class Stopped(Failed):
    """Interruption of a command by Ctrl-C."""

    exit_code = 130


class Command(click.Command):
    """A command whose errors name its options."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if isinstance(ctx.params.get("output"), str):
                check_apart(Path(ctx.params["output"]))
            return super().invoke(ctx)
        except UnituneError as error:
            done = f"; {_what_is_written(ctx)}" if ctx.meta.get(_WRITTEN) else ""
            raise Failed(f"error: {in_options(str(error), self, ctx.params)}{done}") from error


def check_apart(output: Path) -> None:
    """Checks that an output isn't one of the current command's inputs, by this or another name, or inside one.

    Raises:
        OutputError: It is one.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        is_input = isinstance(parameter.type, Place) and parameter.name != "output" and value != "pocket"
        for each in value if isinstance(value, tuple) else (value,) if value and is_input else ():
            if _is_or_holds(Path(each), output):
                raise OutputError(
                    f"{output} is, or is inside, {each}, which the command reads; choose another name"
                )


def _is_or_holds(place: Path, output: Path) -> bool:
    """Returns whether an existing output is the file, or is inside the folder, at a place."""
    with contextlib.suppress(OSError, ValueError):
        inside = place.is_dir() and place.resolve() in output.resolve().parents
        return output.exists() and (inside or output.samefile(place))
    return False


command = partial(click.command, cls=Command)
"""Decorator that makes a command."""


class Commands(click.Group):
    """The group of all commands; wrong usage, errors and Ctrl-C are reported as one line on standard error."""

    command_class = Command

    def main(self, *arguments: Any, **more: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # other characters than its encoding has
        return super().main(*arguments, **more)

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with _one_line():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # warnings meant for developers
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # about missing CPU kernels
        gc.set_threshold(
            10_000
        )  # imports create long-lived objects: garbage collection took a fifth of their time
        with _one_line():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise Stopped(f"stopped; {_what_is_written(ctx)}") from None


@contextmanager
def _one_line() -> Iterator[None]:
    """Reports wrong usage as one line; without any command the help is shown."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "lora-unitune"
        raise WrongUse(f"error: {error.format_message()} See {path} --help") from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has seen enough; click ends the program
            raise
        context = click.get_current_context(silent=True)
        with contextlib.suppress(OSError, ValueError):  # what is still in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        place = error.filename or "standard output"
        done = f"; {_what_is_written(context)}" if context else ""
        raise Failed(f"error: {place} can't be read or written ({error.strerror or error}){done}") from None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Records a file or a folder as written, unless writing fails; Ctrl-C is delayed until it is complete.

    Args:
        path: Path to name in the message after Ctrl-C.
    """
    with uninterrupted():
        yield
        context = click.get_current_context(silent=True)
        if context is not None:
            context.meta.setdefault(_WRITTEN, []).append(str(path))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not is_main or before is not signal.default_int_handler:
        yield
        return
    pressed = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _what_is_written(ctx: click.Context) -> str:
    """Returns the end of the message after Ctrl-C: the files written."""
    written: list[str] = ctx.meta.get(_WRITTEN, [])
    if not written:
        return "nothing was written"
    if len(written) == 1:
        return f"{written[0]} is written"
    if len(written) > _MOST_NAMED:
        return f"{len(written)} files, {written[0]} to {written[-1]}, are written"
    return f"{', '.join(written[:-1])} and {written[-1]} are written"


class Display:
    """The progress display of a command."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task, self._stage = bar, task, ""
        self._printed = 0.0

    def show(self, description: str, done: int, total: int) -> None:
        """Shows the progress of a stage.

        Args:
            description: Name of the stage; text after a comma may change from step to step.
            done: Completed steps.
            total: Total steps.
        """
        begins = description.partition(",")[0] != self._stage
        self._stage = description.partition(",")[0]
        if begins:
            self._bar.reset(self._task)
        self._bar.update(self._task, description=description, completed=done, total=total)
        is_due = begins or done == total or time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES
        if self._bar.disable and is_due:
            self._printed = time.monotonic()
            click.echo(f"{description}: {done} of {total}", err=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hides the bar while lines are printed."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()


@contextmanager
def progress() -> Iterator[Display]:
    """Shows a bar on standard error; if that isn't a terminal, a line for each new stage and every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    )
    with bar:
        yield Display(bar, bar.add_task("", total=None))


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


def bytes_text(count: int) -> str:
    return f"{count / 1000:.0f} KB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


def size_text(size: Sequence[int] | None) -> str:
    return f"{size[0]} x {size[1]} pixels" if size else "unknown"


def shown(value: Any) -> str:
    """Returns a human-readable value: "adamw 8, sgd 4" rather than a dictionary."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
