"""The house rules a machine can check: imports go one way, nothing heavy loads early, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_unitune

PACKAGE = Path(lora_unitune.__file__).resolve().parent
STOREYS = (
    {"errors", "recipe"},
    {
        "adapter_cache",
        "adapter_checks",
        "adapter_file",
        "adapter_header",
        "adapters",
        "convert",
        "eight_bit",
        "families",
        "guidance",
        "hub",
        "kohya",
        "objective",
        "optimizers",
        "output",
        "photo",
        "quantize",
    }
    | {"rare_tokens"},
    {"compress", "edit", "memory", "mount", "prepare", "sampling", "train"},
    {"pocket"},
    {"demo", "doctor", "score"},
    {"cli", "cli_files", "terminal"},
)
"""A room imports from its own storey and those before it."""

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
LONGEST_FILE = 400  # lines


def room_of(module: str) -> str:
    """Returns the room of a dotted module name: "families" for "lora_unitune.families.sd"."""
    return module.split(".")[1]


def imported_rooms(path: Path) -> set[str]:
    """Returns the rooms that a file imports anywhere in it; public names count as the rooms they live in."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {room_of(name.name) for name in node.names if name.name.startswith("lora_unitune.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "lora_unitune":
            names = {name.name for name in node.names if not name.name.startswith("__")}
            found |= {lora_unitune._ROOM_OF.get(name, name) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_unitune."):
            found.add(room_of(node.module or ""))
    return found


def imports_by_room() -> dict[str, set[str]]:
    """Returns the rooms that each room imports, itself left out."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        graph[room] = (graph.get(room, set()) | imported_rooms(path)) - {room}
    return graph


def test_every_room_has_a_storey() -> None:
    assert set(imports_by_room()) == set().union(*STOREYS)


def test_imports_go_one_way() -> None:
    storey_of = {room: index for index, storey in enumerate(STOREYS) for room in storey}
    for room, imported in imports_by_room().items():
        upward = {other for other in imported if storey_of[other] > storey_of[room]}
        assert not upward, f"{room} imports {upward}, which are above it"


def test_imports_form_no_circle() -> None:
    graph = imports_by_room()
    while graph:
        free = {room for room, imported in graph.items() if not imported & graph.keys()}
        assert free, f"these rooms import each other: {sorted(graph)}"
        graph = {room: imported for room, imported in graph.items() if room not in free}


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
