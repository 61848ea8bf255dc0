"""Cost of a fit and an edit on one machine, in one run.

    python -m benchmarks.cost steps --base pocket -o benchmarks/results/cost/steps-pocket.json
    python -m benchmarks.cost steps --base sd15 --size 256x256 --steps 3 --batch 1
    python -m benchmarks.cost reach
    python -m benchmarks.cost first-picture -o benchmarks/results/cost/first-picture.json
    python -m benchmarks.cost commands --other TREE -o benchmarks/results/cost/commands.json
    python -m benchmarks.cost growth -o benchmarks/results/cost/growth.json

`steps` compares this project's LoRA, full fine-tuning, and the training loops of diffusers' DreamBooth examples
("rival"). `reach` trains the rival until it has the same reconstruction. `first-picture` splits the time from
the start of a process to its first edit. `commands` times cold commands of this source tree and of another
alternately. `growth` varies size, batch, rank and number of samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lora_unitune.families.loading import resolve_device

from ..origin import origin
from .bases import NAMES
from .steps import METHODS, compare, measure
from .whole import cold_commands, first_picture, growth, reach

_device = click.option("--device", default="auto", show_default=True)
_output = click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False))


@click.group(help=__doc__)
def main() -> None:
    pass


def _report(device: str, output: Path | None, **results: Any) -> None:
    text = json.dumps({**origin(resolve_device(device)), **results}, indent=1)
    click.echo(text)
    if output:
        output.write_text(text + "\n")


@main.command("steps")
@click.option("--base", default="pocket", show_default=True, type=click.Choice(NAMES))
@click.option("--methods", default=",".join(METHODS), show_default=True, metavar="NAME,NAME")
@click.option(
    "--size", default="", metavar="WIDTHxHEIGHT", help="Size of the photo; the base's own by default."
)
@click.option("--steps", default=10, show_default=True, type=click.IntRange(2))
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1))
@click.option("--only", type=click.Choice(METHODS), help="Run only this method, once, in this process.")
@_device
@_output
def steps_command(
    base: str,
    methods: str,
    size: str,
    steps: int,
    batch: int,
    rounds: int,
    only: str | None,
    device: str,
    output: Path | None,
) -> None:
    """Steps of LoRA, full fine-tuning and the rival, alternating, each in its own process."""
    if only:
        click.echo(json.dumps(measure(base, only, size, steps, batch, device)))
        return
    settings = {"base": base, "size": size, "steps": steps, "batch": batch}
    arguments = [f"--{name}={value}" for name, value in {**settings, "device": device}.items()]
    names = [name for name in methods.split(",") if name in METHODS]
    _report(device, output, **settings, rounds=rounds, costs=compare(arguments, names, rounds))


@main.command("reach")
@click.option("--scenes", default=3, show_default=True, type=click.IntRange(1))
@click.option("--most", default=960, show_default=True, help="Maximum steps of the rival.")
@_device
@_output
def reach_command(scenes: int, most: int, device: str, output: Path | None) -> None:
    """Time to the same reconstruction of held-out scenes, against the rival."""
    _report(device, output, most=most, scenes=[reach(number, most, device) for number in range(scenes)])


@main.command("commands")
@click.option("--other", required=True, type=click.Path(exists=True, path_type=Path), help="The other tree.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--steps", default=2, show_default=True, type=click.IntRange(1), help="Of the fit.")
@_output
def commands_command(other: Path, rounds: int, steps: int, output: Path | None) -> None:
    """Cold inspect, edit and fit of this tree and of another, alternating."""
    _report("cpu", output, rounds=rounds, steps=steps, commands=cold_commands(rounds, str(other), steps))


def _plain(name: str, work: Callable[[int, str], Any], what: str, default: int) -> None:
    @main.command(name, help=what)
    @click.option("--count", default=default, show_default=True, type=click.IntRange(2))
    @_device
    @_output
    def command(count: int, device: str, output: Path | None) -> None:
        _report(device, output, count=count, found=work(count, device))


_plain(
    "first-picture",
    first_picture,
    "Time from the start of a process to its first edit; repeated this often.",
    3,
)
_plain("growth", growth, "Growth of step time and memory; this many steps of each setting.", 8)


if __name__ == "__main__":
    main()
