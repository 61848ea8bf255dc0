"""Options shared by several commands, and options generated from a recipe's fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from lora_unitune.errors import OutputError
from lora_unitune.families import LOCATION_OPTIONS, BaseFiles
from lora_unitune.output import check_ending as check_name
from lora_unitune.recipe import available_recipes
from lora_unitune.settings import Section

F = TypeVar("F", bound=Callable[..., Any])


class Place(click.Path):
    """A path with shell completion; the library validates it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


class Text(click.ParamType[str]):
    """Text as UTF-8, whatever the locale says; the library refuses bytes that are none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


TEXT = Text()
FILE = Place()
FOLDER = Place(file_okay=False)


class Share(click.FloatRange):
    """A float in a range; NaN is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number in the range {self._describe_range()}.", param, ctx)
        return number


class SettingOption(click.Option):
    """An option for one field of a recipe.

    Attributes:
        setting: The field with its section, such as "edit.strength".
    """

    def __init__(self, *arguments: Any, setting: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.setting = setting


def settings_options(kind: type[Section], names: Iterable[str] = ()) -> Callable[[F], F]:
    """Returns a decorator that adds an option for each field of a section: its type, its range and its help.

    An unused option is None: the recipe's value is the default.

    Args:
        kind: The section's class.
        names: Names of the fields; none takes all.
    """
    chosen = [each for each in dataclasses.fields(kind) if not names or each.name in names]

    def add(command: F) -> F:
        for each in reversed(chosen):
            command = _setting_option(kind, each)(command)
        return command

    return add


def _setting_option(kind: type[Section], setting: dataclasses.Field[Any]) -> Callable[[F], F]:
    """Returns the decorator that adds one setting's option."""
    hint, name = get_type_hints(kind)[setting.name], setting.name.replace("_", "-")
    flags = f"--{name}/--no-{name}" if hint is bool else f"--{name}"
    add: Callable[[F], F] = click.option(
        flags,
        setting.name,
        cls=SettingOption,
        setting=f"{kind.section}.{setting.name}",
        type=None if hint is bool else _type_of(hint, setting.metadata),
        default=None,
        show_default=f"the recipe's, or {_shown_default(setting.default)}",
        metavar=setting.metadata.get("metavar") or {int: "N", float: "X", str: "TEXT"}.get(hint),
        help=setting.metadata["help"],
    )
    return add


def _shown_default(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value) or "none"


def _type_of(hint: Any, metadata: Any) -> click.ParamType[Any]:
    """Returns the option type that accepts the same values as a field."""
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if hint in (int, float):
        kind = click.IntRange if hint is int else Share
        return kind(metadata["low"], metadata["high"], min_open=metadata["above"])
    return click.STRING


def _complete_base(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the name of a base: a file or a folder, or the bundled one."""
    return [CompletionItem(incomplete, type="file"), *_beginning(["pocket"], incomplete)]


def _complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the name of a recipe: a file, or a bundled one."""
    return [CompletionItem(incomplete, type="file"), *_beginning(available_recipes(), incomplete)]


def _beginning(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _base_options(help: str, **more: Any) -> Callable[[F], F]:
    """Returns the decorator that adds --base and what else says where a base's files are; see `located`."""

    def add(command: F) -> F:
        for name, (metavar, text) in reversed(LOCATION_OPTIONS.items()):
            kind = click.Choice(metavar.split("|")) if metavar.islower() else FILE
            command = click.option(
                f"--{name}",
                expose_value=False,
                callback=_remember,
                type=kind,
                metavar=metavar,
                help=text,
            )(command)
        return click.option(
            "--base",
            type=FILE,
            metavar="NAME|FOLDER|FILE|HUB_ID",
            shell_complete=_complete_base,
            help=help,
            **more,
        )(command)

    return add


def _remember(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
    ctx.meta.setdefault(_LOCATION, {})[option.name] = value


_LOCATION = "lora_unitune.location"


def located(base: str) -> BaseFiles:
    """Returns the files of the base that the running command's options name.

    Args:
        base: Value of --base, or the base of the adapter.
    """
    from lora_unitune import locate_base

    return locate_base(base, **click.get_current_context().meta[_LOCATION])


fit_base_option = _base_options("The base model to fit.", default="pocket", show_default=True)
base_option = _base_options("The base model that the adapter was fitted on; needed unless it is pocket.")
recipe_option = click.option(
    "--recipe",
    type=FILE,
    metavar="NAME|FILE",
    shell_complete=_complete_recipe,
    help=f"A TOML file or a bundled recipe: {', '.join(available_recipes())}. Each base has a default.",
)
set_option = click.option(
    "--set",
    "overrides",
    type=TEXT,
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting of the recipe, such as fit.steps=50; may be repeated.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Random seed.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Device to run on; auto takes a GPU if one is available.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing files.")
_sign_cert = click.option(
    "--sign-cert",
    metavar="FILE",
    type=FILE,
    help="Sign each image by C2PA, with these certificates (PEM); without it, those in C2PA_SIGN_CERT, if any.",
)
_sign_key = click.option(
    "--sign-key",
    metavar="FILE",
    type=FILE,
    help="The private key (PEM) of --sign-cert; without it, that in C2PA_PRIVATE_KEY.",
)


def sign_options(command: F) -> F:
    """Adds the options for what signs an image."""
    return _sign_cert(_sign_key(command))


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
adapter_argument = click.argument("adapter", metavar="ADAPTER", type=FILE)


def check_ending(path: str, *endings: str) -> None:
    """Checks the end of an output's name, such as ".png".

    Raises:
        BadParameter: The name ends otherwise.
    """
    try:
        check_name(path, *endings)
    except OutputError as error:
        raise click.BadParameter(f"{error}.", param_hint="'-o'") from error


def output_option(metavar: str, help: str, *endings: str, **more: Any) -> Callable[[F], F]:
    """Returns the decorator that adds -o, the path of the file or the folder to write.

    Args:
        metavar: What stands for the path in the help.
        help: The option's help.
        *endings: Allowed ends of a file's name, such as ".png"; none allows every name.
        **more: Other arguments of the option.
    """

    def checked(ctx: click.Context, option: click.Parameter, value: str) -> str:
        if endings:
            check_ending(value, *endings)
        return value

    settings = {"required": True, "type": FILE, "callback": checked, **more}
    add: Callable[[F], F] = click.option("-o", "--output", metavar=metavar, help=help, **settings)
    return add
