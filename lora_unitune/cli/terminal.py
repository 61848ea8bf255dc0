"""What the commands share: errors as one line, progress, and values written for a person."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from lora_unitune import UnituneError


class Commands(click.Group):
    """Turns the errors a user can meet into one line on standard error and exit code 2; Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was asked for."""
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # the libraries' notes to developers
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels for a CPU that it lacks
        gc.set_threshold(10_000)  # importing makes objects that stay: looking for garbage took a fifth of it
        try:
            return super().invoke(ctx)
        except UnituneError as error:
            message, code = f"error: {error}", 2
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else ctx.command_path
            message, code = f"error: {error.format_message()} See {path} --help", 2
        except KeyboardInterrupt:
            message, code = "stopped; nothing was written", 130
        click.echo(" ".join(message.splitlines()), err=True)
        ctx.exit(code)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar on standard error; where that isn't a terminal, a line whenever something else begins."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        stage = ""

        def tell(description: str, done: int, total: int) -> None:
            nonlocal stage
            begins = description.partition(",")[0] != stage
            stage = description.partition(",")[0]
            if begins:
                bar.reset(task)
            bar.update(task, description=description, completed=done, total=total)
            if not console.is_terminal and (begins or done == total):
                click.echo(f"{description}: {done} of {total}", err=True)

        yield tell


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


def size(count: int) -> str:
    return f"{count / 1000:.0f} KB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


def shown(value: Any) -> str:
    """Writes a described value for a person: "unet 8, text_encoder 4" rather than a dictionary."""
    if isinstance(value, dict):
        return ", ".join(f"{part} {shown(item)}" for part, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


base_option = click.option(
    "--base",
    metavar="NAME|FOLDER|HUB_ID",
    help="The base model the file was fitted on; needed unless that is pocket.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there already.")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
