"""Writes README's table of measured edits from the results of the counterfactual benchmark.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "counterfactual" / "results.json"
BEGIN, END = "<!-- edits: written by python -m benchmarks.readme -->", "<!-- edits: end -->"
METHODS = {
    "lora": "**LoRA** (ours)",
    "full": "full fine-tuning",
    "no-fit": "ours without a fit",
    "ledits++": "LEDITS++",
    "flowedit": "FlowEdit",
    "ddim-inversion": "DDIM inversion",
    "sdedit": "SDEdit",
    "truth-vae": "ground truth through the autoencoder",
}
COLUMNS = {
    "known: success %": ("known", "success", 100),
    "known: PSNR, dB": ("known", "psnr_truth", 1),
    "unknown: success %": ("unknown", "success", 100),
    "unknown: same thing %": ("unknown", "same_thing", 100),
}


def table(results: dict[str, Any]) -> str:
    """The table in Markdown, of the methods that the results have; a list that they lack leaves empty cells."""
    rows = [["method", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name, title in METHODS.items():
        if any(name in results.get(which, {}) for which, _, _ in COLUMNS.values()):
            rows.append([title, *(_cell(results, name, *column) for column in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(results: dict[str, Any], name: str, which: str, measure: str, times: int) -> str:
    """Mean and interval of one measure on one list."""
    if name not in results.get(which, {}):
        return ""
    mean, low, high = (f"{times * value:.1f}" for value in results[which][name]["measures"][measure]["all"])
    return f"{mean} ({low} to {high})"


def with_table(readme: str, results: dict[str, Any]) -> str:
    """README with the table between its markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{table(results)}\n{END}", readme)


def main() -> None:
    file = ROOT / "README.md"
    file.write_text(
        with_table(file.read_text(encoding="utf-8"), json.loads(RESULTS.read_text())), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
