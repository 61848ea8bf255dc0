"""Rules of the code base: one-way imports, no early imports of heavy libraries, short files."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import token
import tokenize
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import lora_unitune

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

PACKAGE = Path(lora_unitune.__file__).resolve().parent
FOLDERS = (
    ("errors",),
    ("output", "settings", "recipe", "photo"),
    ("families", "pocket.world"),
    ("adapter",),
    ("training", "editing"),
    ("pocket.pretraining",),
    ("cli",),
)
"""The package's folders and single files in order: each imports from those before it and from itself."""

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
LONGEST_FILE = 400  # lines

FAMILY_WORDS = re.compile(
    "unet|text_encoder|alphas_cumprod|(?<![a-z])vae(?![a-z])|sdxl|sd15|stablediffusion|cliptext|hidden_states|"
    r"time_ids|attn2|(?<![a-z])to_k(?![a-z])|^[rbuf]*[\"']+sd[\"']+$",
    re.IGNORECASE,
)
"""The families' names, and words of their inside: parts, layers, classes, arguments."""


def folder_of(module: str) -> str:
    """Returns the folder of a module, named from the package down: "families" for "families.sd"."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "pocket" and rest else first


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """Returns a file's dotted name from the package down; that of the folder for an `__init__.py`."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(module: str, is_package: bool, source: str) -> set[str]:
    """Returns what a file imports of the package, anywhere in it, by dotted names from the package down.

    Args:
        module: Dotted name of the file.
        is_package: Whether the file is an `__init__.py`.
        source: Text of the file.
    """
    found: set[str] = set()
    here = ["lora_unitune", *module.split("."), *(["__init__"] if is_package else [])]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: -node.level] if node.level else []
            whole = ".".join([*start, *([node.module] if node.module else [])])
            names = {name.name for name in node.names}
            if whole == "lora_unitune":  # public names count as the modules they live in
                found |= {f"{whole}.{lora_unitune._MODULE_OF.get(name, name)}" for name in names}
            elif whole == "lora_unitune.pocket":
                found |= {f"{whole}.{name}" for name in names}
            else:
                found.add(whole)
    inside = {name.removeprefix("lora_unitune.") for name in found if name.startswith("lora_unitune.")}
    return {name for name in inside if not name.startswith("__")}


def upward_imports(module: str, is_package: bool, source: str) -> set[str]:
    """Returns the imports of a file that break the order of `FOLDERS`."""
    place = {folder: index for index, group in enumerate(FOLDERS) for folder in group}
    own = folder_of(module)
    folders = {folder_of(name) for name in imported_modules(module, is_package, source)} - {own, "pocket"}
    return {folder for folder in folders if place[folder] > place[own]}


def imports_by_folder() -> dict[str, set[str]]:
    """Returns the folders that each folder imports, itself left out."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        module = module_of(path)
        imported = {
            folder_of(name)
            for name in imported_modules(module, path.name == "__init__.py", path.read_text(encoding="utf-8"))
        }
        folder = folder_of(module)
        graph[folder] = (graph.get(folder, set()) | imported) - {folder, "pocket"}
    graph.pop("pocket", None)
    return graph


def test_every_folder_has_a_position_in_the_order() -> None:
    assert set(imports_by_folder()) <= {folder for group in FOLDERS for folder in group}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    if path == PACKAGE / "pocket" / "__init__.py":
        return
    source = path.read_text(encoding="utf-8")
    assert not upward_imports(module_of(path), path.name == "__init__.py", source)


@pytest.mark.parametrize(
    ("module", "is_package", "source", "broken"),
    [
        ("families.sd", False, "from ..editing.editor import Editor", {"editing"}),
        ("families", True, "from ..editing.editor import Editor", {"editing"}),
        ("families", True, "from .sd import load", set()),
        ("families.sd", False, "def f():\n    from .. import Editor", {"editing"}),
        ("families.sd", False, "from lora_unitune import Editor", {"editing"}),
        ("families.sd", False, "from .. import editing", {"editing"}),
        ("families.sd", False, "import lora_unitune.training.fit", {"training"}),
        ("families.sd", False, "from lora_unitune.errors import SettingError", set()),
        ("adapter.layers", False, "from ..families import Base", set()),
        ("pocket.world", True, "from ..pretraining import stage", {"pocket.pretraining"}),
        ("pocket.world.drawing", False, "from .. import pretraining", {"pocket.pretraining"}),
        ("pocket.pretraining.stage", False, "from ..world import sun", set()),
        ("errors", False, "from . import recipe", {"recipe"}),
    ],
)
def test_the_order_sees_every_kind_of_import(
    module: str, is_package: bool, source: str, broken: set[str]
) -> None:
    assert upward_imports(module, is_package, source) == broken


def test_folders_have_no_circular_imports() -> None:
    graph = imports_by_folder()
    while graph:
        free = {folder for folder, imported in graph.items() if not imported & graph.keys()}
        assert free, f"these folders import each other: {sorted(graph)}"
        graph = {folder: imported for folder, imported in graph.items() if folder not in free}


def test_every_lower_bound_is_what_the_smoke_test_installs() -> None:
    """`.ci/lowest` installs `lowest.txt`, so that every lower bound is one that was run."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (PACKAGE.parent / "lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {pin.name: pin.specifier for pin in map(Requirement, pins[1:])}
    bounds = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    assert lowest.keys() == bounds.keys()
    for name, bound in bounds.items():
        ((operator, version),) = [(each.operator, each.version) for each in bound]
        assert operator == ">=" and Version(version) in lowest[name], name


def test_nothing_imports_what_the_wheel_leaves_out() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    excluded = project["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
    left_out = {path.removeprefix("/lora_unitune/").replace("/", ".") for path in excluded}
    assert left_out == {"pocket.pretraining", "pocket.world"}
    for folder, imported in imports_by_folder().items():
        assert folder in left_out or not imported & left_out


def test_importing_the_package_and_the_command_line_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'peft', 'accelerate', 'rich'}"
    code = f"import sys, lora_unitune, lora_unitune.cli; print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in lora_unitune.__all__:
        assert getattr(lora_unitune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        lora_unitune.fitt  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_check_users_with_errors(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert "utils" not in path.stem
    asserts = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    assert not asserts, f"assert in lines {asserts}; raise an error that tells what to do"


def docstring_lines(source: str) -> set[int]:
    """Returns the first lines of all docstrings, including those of constants."""
    return {
        node.value.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def family_words(source: str) -> list[str]:
    """Returns the names and strings of a file's code that refer to one family, each after its line.

    Comments and docstrings may mention a family.
    """
    documented = docstring_lines(source)
    kinds = {token.NAME, token.STRING, getattr(token, "FSTRING_MIDDLE", token.STRING)}
    return [
        f"{piece.start[0]}: {piece.string}"
        for piece in tokenize.generate_tokens(io.StringIO(source).readline)
        if piece.type in kinds
        and FAMILY_WORDS.search(piece.string)
        and not (piece.type == token.STRING and piece.start[0] in documented)
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("unet = 1", ["1: unet"]),
        ("def f(text_encoder_rank): pass", ["1: text_encoder_rank"]),
        ("from diffusers import UNet2DConditionModel", ["1: UNet2DConditionModel"]),
        ("x = base.vae", ["1: vae"]),
        ("x = 'down.attn2.to_k'", ["1: 'down.attn2.to_k'"]),
        ("f(\n    'sd')", ["2: 'sd'"]),
        ("x = f'{y}_unet'", ["1: _unet" if sys.version_info >= (3, 12) else "1: f'{y}_unet'"]),
        ("x = f'{unet}'", ["1: unet" if sys.version_info >= (3, 12) else "1: f'{unet}'"]),
        ('"""The unet."""\nx = 1\n"""Of the vae."""', []),
        ('def f():\n    """The unet\n    and its vae."""\n    return 1', []),
        ("x = 1  # the unet", []),
        ("x = (\n    1,  # 'sd'\n)", []),
        ("usd = 'sdk'", []),
        ("total_to_keep, elevae = 'a sd card', 1", []),
    ],
)
def test_family_words_are_detected_in_code_only(source: str, found: list[str]) -> None:
    assert family_words(source) == found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_families_know_a_family(path: Path) -> None:
    module = module_of(path)
    if folder_of(module) in ("families", "pocket.pretraining"):  # the second trains one particular base
        return
    assert not family_words(path.read_text(encoding="utf-8"))
