from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lora_unitune

PACKAGE = Path(lora_unitune.__file__).resolve().parent
PRETRAINING = PACKAGE / "pocket" / "pretraining"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if PRETRAINING not in path.parents)


def names_imported(source: str) -> set[str]:
    """Returns every component of every imported name, anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            dotted = [name.name for name in node.names] + [getattr(node, "module", None) or ""]
            names |= {word for one in dotted for word in one.split(".")}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_imports_the_pretraining_which_no_wheel_carries(path: Path) -> None:
    assert "pretraining" not in names_imported(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "from ..pretraining.muon import Muon",
        "from .. import pretraining",
        "import lora_unitune.pocket.pretraining.stage",
        "def f():\n    from lora_unitune.pocket.pretraining import stage",
    ],
)
def test_every_kind_of_import_is_seen(source: str) -> None:
    assert "pretraining" in names_imported(source)
