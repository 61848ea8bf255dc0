"""The command line."""

from lora_unitune.cli.commands import main as main
