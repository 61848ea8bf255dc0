"""Opens mutated adapter files: each is read, or refused with one line; never anything else.

python -m tests.fuzz [--count 200000] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save

import lora_unitune
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.describe import describe
from lora_unitune.errors import AdapterFileError
from lora_unitune.families import FAMILIES
from lora_unitune.recipe import Recipe
from lora_unitune.settings import LoraSettings

MOST_STEPS = 20_000  # for one file of these few layers; see `few_steps`
LARGEST_PEAK = (
    2**18
)  # bytes of Python objects while one file is opened, in addition to 4 for each byte of the file
LARGEST_GROWTH = 64 * 2**20  # bytes that the process may grow by, over all files

PACKAGE = str(Path(lora_unitune.__file__).parent)

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.5,
    float("nan"),
    float("inf"),
]
VALUES: list[Any] = [
    *NUMBERS, None, True, False, "", "x", "\x1b[2J", "\u202e", "é" * 5000, [], [[]], {}, {"a": 1}, [1] * 99,
    "F16", "I64",
]  # fmt: skip


LAYERS = {
    "sd": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ((2, 8), (8, 2)),
        "unet.up_blocks.0.resnets.1.conv1": ((2, 4, 3, 3), (4, 2, 1, 1)),
        "unet.mid_block.resnets.1.conv1": ((1, 4, 3, 3), (4, 1, 1, 1)),
        "text_encoder.encoder.layers.0.self_attn.q_proj": ((1, 8), (8, 1)),
    },
    "sdxl": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": ((2, 8), (8, 2)),
        "unet.up_blocks.0.resnets.1.conv1": ((2, 4, 3, 3), (4, 2, 1, 1)),
        "text_encoder.encoder.layers.0.self_attn.q_proj": ((1, 8), (8, 1)),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": ((1, 8), (8, 1)),
    },
}


def example(
    layout: Any, family: str, fingerprint: str = "0123456789abcdef", dtype: Any = torch.float16
) -> bytes:
    """Returns a small adapter file of each kind of tensor; without a fingerprint, as other tools write it."""
    lora = {part: LoraSettings(1) for part in FAMILIES[family].parts}
    lora["unet"] = LoraSettings(2, targets=("to_q", "to_k", "conv1"))
    shapes = LAYERS[family]
    sides = ("lora_A", "lora_B")
    tensors = {
        f"{layer}.{side}.weight": torch.ones(shape)
        for layer, pair in shapes.items()
        for side, shape in zip(sides, pair, strict=True)
    }
    adapter = Adapter(
        tensors=tensors,
        rare_tokens="zqrt ohwx",
        recipe=FAMILIES[family].complete(Recipe(lora=lora)),
        base="pocket",
        fingerprint=fingerprint,
        photo_latents=torch.ones(1, 4, 2, 2) if fingerprint else None,
        family=family,
        size=(96, 64),
        seed=1,
        seconds=2.0,
        date="2026-01-02",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.safetensors"
        adapter.save(path, layout=layout, dtype=dtype)
        return path.read_bytes()


ATTENTION = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_mid_block_resnets_0_conv1"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


def foreign() -> list[bytes]:
    """Returns small files of the kinds of tensors that only other tools write."""
    ones, half = torch.ones, torch.float16
    cores = {f"hada_t{n}": ones(2, 2, 3, 3) for n in (1, 2)}
    wide = {f"hada_w{n}_{side}": ones(2, 4) for n in (1, 2) for side in "ab"}
    loha = {f"hada_w{n}_{side}": ones((4, 2) if side == "a" else (2, 4)) for n in (1, 2) for side in "ab"}
    locon = {
        "lora_down.weight": ones(2, 4, 1, 1),
        "lora_mid.weight": ones(2, 2, 3, 3),
        "lora_up.weight": ones(4, 2),
    }
    pair = {"lora_A.weight": ones(2, 4), "lora_B.weight": ones(4, 2)}
    files: list[dict[str, torch.Tensor]] = [
        {f"{CONVOLUTION}.{end}": tensor for end, tensor in {**cores, **wide}.items()},
        {f"{CONVOLUTION}.{end}": tensor for end, tensor in locon.items()},
        {f"{ATTENTION}.{end}": tensor.to(half) for end, tensor in loha.items()},
        {
            f"{ATTENTION}.{end}": ones(2, n)
            for end, n in (("lora_down.weight", 2), ("lora_up.weight", 2), ("dora_scale", 1))
        },
        {f"base_model.model.{CLIP}.{end}": tensor for end, tensor in pair.items()},
        {f"text_encoder.{CLIP}.{end}": tensor for end, tensor in pair.items()},
    ]
    alphas = (torch.int64, torch.uint8, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    for tensors, dtype in zip(files, alphas, strict=True):
        layer = next(iter(tensors)).split(".hada_")[0].split(".lora_")[0]
        tensors |= {f"{layer}.alpha": torch.tensor(2).to(dtype), "bundle_emb.style.clip_l": ones(2, 4)}
    return [save(tensors, {"ss_base_model_version": "sd_v1"}) for tensors in files]


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns a file's header, and the bytes after it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def whole(header: Any, body: bytes) -> bytes:
    """Returns a file with a header, given as an object or as text."""
    text = header if isinstance(header, str) else json.dumps(header)
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + body


def as_version_1(content: bytes) -> bytes:
    """Returns a file with the equivalent header of version 1."""
    header, body = parts_of(content)
    own = json.loads(header["__metadata__"]["lora_unitune"])
    lora = own["recipe"]["lora"].items()
    own |= {"format_version": 1, "resolution": own.pop("size")[0]}
    own["recipe"]["photo"] = {"resolution": 0}
    own["recipe"]["lora"] = {
        f"{part}_{key}": settings[key] or 1.0
        for part, settings in lora
        for key in ("rank", "alpha", "targets")
    }
    own["recipe"]["fit"] |= {"unet_learning_rate": 4e-4, "text_encoder_learning_rate": 1e-4}
    header["__metadata__"]["lora_unitune"] = json.dumps(own)
    return whole(header, body)


def tensor_entries(content: bytes, rng: random.Random) -> bytes:
    """Mutates the header's entry of a tensor: name, dtype, shape or offsets."""
    header, body = parts_of(content)
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    choice = rng.randrange(7)
    if choice == 0:
        entry["dtype"] = rng.choice(
            ["F16", "F32", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "x", 3, None]
        )
    elif choice == 1:
        entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(6))]
    elif choice == 2:
        entry["data_offsets"] = [rng.choice([*NUMBERS, rng.randrange(len(body) + 9)]) for _ in range(2)]
    elif choice == 3:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[key], header[other] = header[other], header[key]
    elif choice == 4:
        del header[key]
    elif choice == 5:
        name = rng.choice(
            [key + ".x", key[:-3], key.upper(), "", "a" * 10**4, key.replace("lora_A", "lora_B")]
        )
        header[name] = header.pop(key)
    else:
        header[rng.choice(["dtype", "shape", key])] = rng.choice(VALUES)
    return whole(header, body)


def metadata_entries(content: bytes, rng: random.Random) -> bytes:
    """Mutates the header's `__metadata__`, or one value nested inside it."""
    header, body = parts_of(content)
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    choice = rng.randrange(5)
    if choice == 0:
        del metadata[key]
    elif choice == 1:
        metadata[key] = rng.choice([*VALUES, "[" * 10**5, '{"a":' * 10**4, "9" * 5000, metadata[key][:-3]])
    elif choice == 2:
        header["__metadata__"] = rng.choice(VALUES)
    else:
        try:
            decoded = json.loads(metadata[key])
        except ValueError:
            decoded = {}
        place, inner, name = decoded, decoded, ""
        while isinstance(inner, dict) and inner:
            place, name = inner, rng.choice(list(inner))
            inner = inner[name]
            if rng.random() < 0.3:
                break
        if isinstance(place, dict):
            place[name] = rng.choice(VALUES)
        metadata[key] = json.dumps(decoded)
    return whole(header, body)


def raw_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips bytes, truncates, duplicates or extends the file."""
    changed = bytearray(content)
    choice = rng.randrange(5)
    if choice < 2:
        for _ in range(rng.choice([1, 2, 8, 64])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif choice == 2:
        del changed[rng.randrange(len(changed)) :]
    elif choice == 3:
        changed[:8] = rng.choice(
            [0, 1, len(changed), max(0, len(changed) - 8), 2**63, rng.randrange(2**64)]
        ).to_bytes(8, "little")
    else:
        at = rng.randrange(len(changed))
        changed[at:at] = rng.randbytes(rng.choice([1, 8, 999]))
    return bytes(changed)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (tensor_entries, metadata_entries, raw_bytes)


@contextmanager
def few_steps(most: int = MOST_STEPS) -> Iterator[None]:
    """Counts the lines that run in this package and the Python functions that run anywhere.

    Raises:
        AssertionError: There are more than `most`; raised immediately, so that no loop is endless.
    """
    steps, before = 0, sys.gettrace()

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event in ("call", "line")
        assert steps <= most, f"more than {most} steps, the last in {frame.f_code.co_name}"
        return count if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    """Raises an AssertionError when the Python objects made inside come to more than `most` bytes at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= most, f"{peak} bytes of Python objects, more than {most}"


def open_as(opened: Callable[[Path], Any], path: Path) -> str:
    """Opens one file with one function.

    Returns:
        "read" or "refused".

    Raises:
        AssertionError: It took too many steps or too much memory, or the error isn't one printable line.
        Exception: Any error but this package's own.
    """
    size = path.stat().st_size
    try:
        with little_memory(LARGEST_PEAK + 4 * size), few_steps():
            found = opened(path)
    except AdapterFileError as error:
        assert "\n" not in str(error) and str(error).isprintable(), str(error)
        return "refused"
    if isinstance(found, Adapter):
        held = sum(tensor.nbytes for tensor in found.tensors.values())
        assert held <= 4 * size, f"{held} bytes of tensors out of a file of {size}"
    return "read"


def open_mutated(count: int, seed: int = 0) -> Counter[str]:
    """Opens mutated files.

    Args:
        count: Number of files.
        seed: Seed of the mutations.

    Returns:
        Numbers of files that were read and refused.

    Raises:
        AssertionError: One took too many steps, or the process grew too large.
        Exception: Any error but this package's own.
    """
    rng, found = random.Random(seed), Counter[str]()
    examples = [example(layout, family, fingerprint) for layout in ("diffusers", "kohya")
                for family in LAYERS for fingerprint in ("0123456789abcdef", "")]  # fmt: skip
    examples += [example("diffusers", family, dtype=torch.int8) for family in LAYERS]
    examples += [as_version_1(example("diffusers", family)) for family in LAYERS]
    examples += foreign()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.safetensors"
        for number in range(count):
            content = rng.choice(examples)
            for _ in range(rng.choice([1, 1, 2, 3])):
                try:
                    content = rng.choice(MUTATIONS)(content, rng)
                except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
                    break  # the mutation before left nothing to change
            path.write_bytes(content)
            for opened in (describe, Adapter.load):
                try:
                    found[open_as(opened, path)] += 1
                except Exception as error:
                    raise AssertionError(f"file {number} of seed {seed}: {error!r}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < LARGEST_GROWTH, f"the process grew by {grown} bytes"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(dict(open_mutated(arguments.count, arguments.seed)))
