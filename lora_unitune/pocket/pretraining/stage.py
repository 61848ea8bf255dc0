"""Shared by pocket's training stages: clock, log and checkpoints, and the moving average of the weights."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn


class Stage:
    """The bookkeeping of one training stage: its clock, learning rate, log and checkpoints."""

    def __init__(self, work: Path, name: str, minutes: float, peak_rate: float, decay_share: float) -> None:
        self.file, self.log_file = work / f"{name}.pt", work / f"{name}.jsonl"
        self.budget, self.peak_rate, self.decay_share = minutes * 60.0, peak_rate, decay_share
        self.used, self.step, self.pictures = 0.0, 0, 0
        self._first, self._minutes_before = 0, 0.0
        self._mark = self._saved = time.monotonic()

    def resume(self, things: dict[str, Any]) -> None:
        if self.file.exists():
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            self.used, self.step, self.pictures = state["used"], state["step"], state["pictures"]
            self._first, self._minutes_before = state.get("before", (0, 0.0))
            for name, thing in things.items():
                thing.load_state_dict(state[name])

    def continue_counting(self) -> None:
        """Continues the counts of the log's last row, for further training with a new optimizer and budget."""
        row = self._last_row()
        self.step, self.pictures = row["step"], row["pictures"]
        self._first, self._minutes_before = row["step"], row["minutes"]

    def _last_row(self) -> dict[str, Any]:
        row: dict[str, Any] = json.loads(self.log_file.read_text().splitlines()[-1])
        return row

    def save(self, things: dict[str, Any], every: float = 0.0) -> None:
        if time.monotonic() - self._saved < every:
            return
        state = {
            "used": self.used,
            "step": self.step,
            "pictures": self.pictures,
            "before": (self._first, self._minutes_before),
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state | {name: thing.state_dict() for name, thing in things.items()}, partial)
        partial.replace(self.file)
        self._saved = time.monotonic()

    def tick(self, optimizers: list[torch.optim.Optimizer], batch: int) -> bool:
        """Counts a step and sets its learning rate; returns False when the time is used up."""
        now = time.monotonic()
        self.used, self._mark = self.used + now - self._mark, now
        if self.used >= self.budget:
            return False
        self.step, self.pictures = self.step + 1, self.pictures + batch
        left = max(0.0, 1.0 - self.used / self.budget) / self.decay_share
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak_rate * min(1.0, (self.step - self._first) / 200, left + 0.01)
        return True

    def log(self, **values: float) -> None:
        """Adds a row, unless the last one is of this step already."""
        if self.log_file.exists() and self._last_row()["step"] == self.step:
            return
        minutes = round(self._minutes_before + self.used / 60, 2)
        row = {"step": self.step, "pictures": self.pictures, "minutes": minutes}
        row |= {k: round(v, 5) for k, v in values.items()}
        with self.log_file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        click.echo(f"{self.file.stem} {row}")


class Average:
    """Exponential moving average of modules' weights, with a faster decay at the start."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.live, self.decay, self.steps = modules, decay, 0
        self.kept = {
            name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        weight = 1.0 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, module in self.live.items():
            torch._foreach_lerp_(list(self.kept[name].parameters()), list(module.parameters()), weight)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "kept": {name: module.state_dict() for name, module in self.kept.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name, module in self.kept.items():
            module.load_state_dict(state["kept"][name])
