"""docs/file-format.md agrees with the files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.__main__ import FOLDER
from safetensors import safe_open

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.header import FORMAT_VERSION, METADATA_CHECKS, OPTIONAL_CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "file-format.md").read_text(encoding="utf-8")
FILES = sorted(FOLDER.glob("v*-diffusers.safetensors"))


def example() -> dict[str, Any]:
    """Runs the example code of the page and returns what it defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "torch" not in code and "lora_unitune import" not in code
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_pages_example_reads_every_golden_file(path: Path) -> None:
    tensors, photo, rare_tokens, recipe = example()["read"](path)
    adapter = Adapter.load(path)
    assert rare_tokens == adapter.rare_tokens and tensors.keys() == adapter.tensors.keys()
    assert all(np.array_equal(tensors[key], tensor.half()) for key, tensor in adapter.tensors.items())
    assert adapter.photo_latents is not None and np.array_equal(photo, adapter.photo_latents.half())
    assert recipe["edit"]["guidance"] == adapter.recipe.edit.guidance
    if not path.name.startswith("v1-"):
        layer = next(key for key in tensors if "to_q.lora_A" in key).removesuffix(".lora_A.weight")
        factors = (adapter.tensors[f"{layer}.lora_{side}.weight"] for side in "BA")
        b, a = (tensor.numpy() for tensor in factors)
        change = example()["change"](tensors, layer, recipe)
        assert np.abs(change - adapter.scale_of("unet") * b @ a).max() < 1e-2


def rows(heading: str) -> dict[str, list[str]]:
    """Returns the rows of the first table below a heading of the page, by their first cell."""
    lines = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")
    ]
    return {row[0].strip("` "): row[1:] for row in cells}


def test_the_page_has_every_field_of_the_header() -> None:
    table = rows("The entry lora_unitune")
    required = {name for name, row in table.items() if name in METADATA_CHECKS or name in OPTIONAL_CHECKS}
    assert required == METADATA_CHECKS.keys() | OPTIONAL_CHECKS.keys()
    assert all(table[name][1] == "yes" for name in METADATA_CHECKS)
    assert all(table[name][1] == "no" for name in OPTIONAL_CHECKS)
    assert table["format_version"][0] == str(FORMAT_VERSION)


def test_the_page_has_every_entry_that_is_written() -> None:
    table = rows("Container")
    known = [re.escape(name.strip("` ")).replace(r"\*", ".*") for row in table for name in row.split(",")]
    for path in FOLDER.glob(f"v{FORMAT_VERSION}-*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        for name in metadata if "image" not in path.name else ():
            assert any(re.fullmatch(pattern, name) for pattern in known), name
        if "lora_unitune" in metadata:
            assert (
                json.loads(metadata["lora_unitune"]).keys() <= METADATA_CHECKS.keys() | OPTIONAL_CHECKS.keys()
            )
