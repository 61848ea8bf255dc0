"""Imports and output of the commands: no unused library, and no library's warnings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_unitune import fit

UNUSED = (
    "bitsandbytes matplotlib networkx pandas scipy.optimize scipy.stats sympy torch._dynamo torch._inductor"
)

RUN = """
import sys, torch
from lora_unitune.cli import main
try:
    main()
finally:
    from lora_unitune.cli.imports import _Name, _StandIn
    torchs = [m for n, m in list(sys.modules.items()) if n.startswith("torch.") and m]
    held = [m.__name__ for m in torchs for v in list(vars(m).values()) if isinstance(v, _Name)]
    print("loaded:", *sys.modules, file=sys.stderr)
    print("held:", *held, *[n for n, m in sys.modules.items() if isinstance(m, _StandIn)], file=sys.stderr)
"""

LATER = """
import sys, torch
from lora_unitune.cli.imports import load_libraries
load_libraries()
import diffusers.schedulers.scheduling_lms_discrete as lms
import transformers.loss.loss_rt_detr as loss
import transformers.modeling_utils
assert loss.linear_sum_assignment(torch.eye(2).numpy(), maximize=True)[1].tolist() == [0, 1]
assert lms.integrate.quad(lambda x: x, 0, 1)[0] == 0.5
assert lms.scipy.stats.beta.ppf(0.5, 1, 1) == 0.5
assert not isinstance(torch.ones(1), torch.distributed.tensor.DTensor)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DTensor as theirs
assert issubclass(DTensor, theirs)
"""


def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process, with Python's default warnings."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=kept, check=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imports") / "photo.safetensors"
    settings = ("fit.steps=1", "fit.batch_size=1")
    fit(Image.new("RGB", (64, 64), "teal"), overrides=settings, device="cpu").save(path)
    return path


def test_an_edit_loads_and_prints_nothing_that_it_does_not_use(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    done = run(RUN, "edit", file, "a fox", "-o", out, "--steps", "2", "--size", "base", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    *lines, loaded, held = done.stderr.splitlines()
    assert not set(UNUSED.split()) & set(loaded.split())
    assert held.strip() == "held:"
    assert lines == ["loading the base: 0 of 1", "editing: 0 of 1", "editing: 1 of 1"]
    assert done.stdout.startswith(f"{out}: ") and len(done.stdout.splitlines()) == 1


def test_a_fit_prints_no_library_warnings(file: Path, tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "photo.safetensors"
    Image.new("RGB", (64, 64), "teal").save(photo)
    settings = ["--set", "fit.steps=2", "--set", "fit.batch_size=1", "--device", "cpu"]
    done = run(RUN, "fit", photo, "-o", out, *settings)
    assert done.returncode == 0, done.stderr
    *lines, loaded, _ = done.stderr.splitlines()
    assert lines[0] == "loading the base: 0 of 1"
    assert all(line.startswith("fitting, loss ") for line in lines[1:])
    assert not {"bitsandbytes", "scipy.stats", "matplotlib"} & set(loaded.split())
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [str(out)] * 2


def test_help_and_inspect_print_nothing_on_standard_error(file: Path) -> None:
    for arguments in (["--help"], ["edit", "--help"], ["inspect", str(file)]):
        done = run("from lora_unitune.cli import main; main()", *arguments)
        assert done.returncode == 0 and done.stderr == "" and done.stdout


def test_deferred_packages_work_when_they_are_used() -> None:
    done = run(LATER)
    assert done.returncode == 0, done.stderr
