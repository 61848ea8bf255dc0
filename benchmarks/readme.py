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
    "ledits++": "LEDITS++",
    "flowedit": "FlowEdit",
    "ddim-inversion": "DDIM inversion",
    "sdedit": "SDEdit",
    "truth-vae": "ground truth through the autoencoder",
}
MEASURES = {
    "aligned %": ("aligned", 100),
    "preserved %": ("preserved", 100),
    "success %": ("success", 100),
    "PSNR to the truth, dB": ("psnr_truth", 1),
}


def table(results: dict[str, Any]) -> str:
    """The table in Markdown, of the methods that the results have."""
    rows = [["method", *MEASURES], ["---"] * (1 + len(MEASURES))]
    for name, title in METHODS.items():
        if name in results["methods"]:
            measured = results["methods"][name]["measures"]
            rows.append([title, *(_cell(measured[key]["all"], times) for key, times in MEASURES.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(values: list[float], times: int) -> str:
    mean, low, high = (f"{times * value:.1f}" for value in values)
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
