"""Writes the golden files of this format version, once, when it is new: of a base of each family.

    cd tests && python -m golden

Files of released versions are never rewritten: users' files of these versions have to open.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from conftest import save_sd15, save_sdxl
from random_adapters import EDIT, LORA, changed, make_adapter
from safetensors.torch import save_file

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.convert import convert
from lora_unitune.adapter.header import FORMAT_VERSION
from lora_unitune.adapter.int8 import pack, unpack
from lora_unitune.editing.editor import Editor
from lora_unitune.editing.start import Start
from lora_unitune.families import load_base

FOLDER = Path(__file__).parent
SETTINGS = replace(EDIT, strength=0.9, guidance_rescale=0.5)
PROMPT = "zqrt ohwx a fox"
SIZE = (48, 32)
UNET = {"rank": 2, "targets": ("to_q", "conv1", "ff.net.2"), "weight": 0.5}


def main() -> None:
    for family, save in {"sd": save_sd15, "sdxl": save_sdxl}.items():
        if not list(FOLDER.glob(f"v{FORMAT_VERSION}-{family}-*")):
            write(family, save)


def write(family: str, save: Callable[[Path], Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(str(save(Path(folder) / f"tiny-{family}")), device="cpu")
    lora = changed(LORA, unet=UNET, text_encoder={"rank": 1})
    adapter = replace(make_adapter(base, lora, size=SIZE), date="2026-11-23", photo_digest="0123abcd" * 4)
    start = f"v{FORMAT_VERSION}-{family}"
    first = FOLDER / f"{start}-diffusers.safetensors"
    rounded = replace(adapter, tensors=unpack(pack(adapter.tensors)))  # so that 8 bits hold it all
    rounded.save(first)
    rounded.save(FOLDER / f"{start}-int8.safetensors", dtype=torch.int8)
    convert(first, "kohya", FOLDER / f"{start}-kohya.safetensors")
    convert(first, "peft", FOLDER / f"{start}-peft")
    again = Adapter.load(first)
    image = Editor(base).pixels(again, [PROMPT], "", Start(again.size, again.photo_latents), [3], SETTINGS)
    save_file({"image": image.to(torch.float16)}, FOLDER / f"{start}-image.safetensors")


if __name__ == "__main__":
    main()
