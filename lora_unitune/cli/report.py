"""The commands that say what there is: this machine, and pocket's words."""

from __future__ import annotations

import json

import click

from lora_unitune.cli.options import device_option, json_option
from lora_unitune.cli.terminal import command, print_notes, shown


@command("doctor")
@device_option
@json_option
def doctor_command(device: str, as_json: bool) -> None:
    """Report the hardware and libraries of this machine, and the recipes that fit it.

    \b
    Examples:
      lora-unitune doctor
      lora-unitune doctor --json
    """
    from lora_unitune.cli.doctor import examine

    report = examine(device)
    if as_json:
        click.echo(json.dumps(report))
        return
    notes = report.pop("notes")
    for name in ("free", "total"):
        count = report.pop(f"{name}_bytes")
        report[f"{name}_memory"] = "unknown" if count is None else f"{count / 2**30:.1f} GiB"
    report["recipes"] = ", ".join(filter(None, report.pop("recipes").values()))
    for name, value in report.items():
        click.echo(f"{name.replace('_', ' '):<18}{shown(value)}")
    print_notes(notes)


@command("words")
@json_option
def words_command(as_json: bool) -> None:
    """List what prompts for pocket, the bundled base, can say, by kind.

    pocket learned these words alone; others change the picture at random.

    \b
    Examples:
      lora-unitune words
      lora-unitune words --json
    """
    from lora_unitune.cli.words import pocket_words

    kinds = pocket_words()
    if as_json:
        click.echo(json.dumps(kinds))
        return
    for kind, words in kinds.items():
        click.echo(f"{kind:<10}{', '.join(words)}")
