"""A damaged, hostile or foreign file raises one clear line, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metadata_of
from safetensors.torch import load_file, save_file

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.describe import describe
from lora_unitune.adapter.header import PHOTO_KEY
from lora_unitune.errors import AdapterFileError


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str], dict[str, Any]], None]) -> Path:
    """Writes a changed copy of an adapter file.

    `change` modifies the tensors, the header entries, and the decoded lora_unitune entry.
    """
    tensors, metadata = load_file(path), metadata_of(path)
    own = json.loads(metadata["lora_unitune"])
    change(tensors, metadata, own)
    if "lora_unitune" in metadata and metadata["lora_unitune"].startswith("{"):
        metadata["lora_unitune"] = json.dumps(own)
    copy = path.with_name("changed.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, copy, metadata)
    return copy


A_KEY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
B_KEY = A_KEY.replace("lora_A", "lora_B")
CHANGES: dict[str, tuple[Callable[..., Any], str]] = {
    "missing tensor": (lambda tensors, metadata, own: tensors.pop(B_KEY), "to_q.lora_B.weight' is missing"),
    "missing part": (
        lambda tensors, metadata, own: [tensors.pop(key) for key in list(tensors) if key[0] == "t"],
        "tensors of its text_encoder are missing",
    ),
    "surplus tensor": (
        lambda tensors, metadata, own: tensors.update({"unet.other.weight": torch.ones(2)}),
        "'unet.other.weight' doesn't belong",
    ),
    "tensor of no target": (
        lambda tensors, metadata, own: tensors.update({"unet.proj.lora_A.weight": torch.ones(4, 4)}),
        "doesn't belong",
    ),
    "wrong rank": (
        lambda tensors, metadata, own: tensors.update({A_KEY: torch.ones(5, 32)}),
        "to_q.lora_A.weight' has shape .* not rank 4",
    ),
    "vector": (lambda tensors, metadata, own: tensors.update({A_KEY: torch.ones(4)}), "has shape"),
    "empty tensor": (lambda tensors, metadata, own: tensors.update({A_KEY: torch.ones(4, 0)}), "has shape"),
    "integers": (
        lambda tensors, metadata, own: tensors.update({A_KEY: torch.ones(4, 32, dtype=torch.int64)}),
        "is I64; allowed are",
    ),
    "nan": (
        lambda tensors, metadata, own: tensors[A_KEY].fill_(float("nan")),
        "to_q.lora_A.weight' isn't finite",
    ),
    "infinite photo": (
        lambda tensors, metadata, own: tensors[PHOTO_KEY].fill_(float("inf")),
        "photo_latents' isn't finite",
    ),
    "misshapen photo": (
        lambda tensors, metadata, own: tensors.update({PHOTO_KEY: torch.ones(4, 16, 16)}),
        "photo_latents' has shape",
    ),
    "header isn't JSON": (
        lambda tensors, metadata, own: metadata.update(lora_unitune="[" * 100_000),
        "isn't valid JSON",
    ),
    "newer format": (
        lambda tensors, metadata, own: own.update(format_version=4),
        "format version 4 .*upgrade",
    ),
    "version isn't a number": (lambda tensors, metadata, own: own.update(format_version="2"), "is wrong"),
    "no fingerprint": (lambda tensors, metadata, own: own.pop("fingerprint"), "'fingerprint' .* is missing"),
    "rare tokens aren't text": (lambda tensors, metadata, own: own.update(rare_tokens=3), "'rare_tokens'"),
    "terminal codes": (lambda tensors, metadata, own: own.update(base="\x1b[2J"), "'base' .* is wrong"),
    "width 0": (lambda tensors, metadata, own: own.update(size=[0, 32]), "'size' .* is wrong"),
    "one side": (lambda tensors, metadata, own: own.update(size=[32]), "'size' .* is wrong"),
    "no size": (lambda tensors, metadata, own: own.pop("size"), "'size' .* is missing"),
    "digest of another kind": (
        lambda tensors, metadata, own: own.update(photo_digest="A" * 32),
        "'photo_digest' .* is wrong",
    ),
    "photo of no size": (
        lambda tensors, metadata, own: own.update(photo_size=[0, 3]),
        "'photo_size' .* is wrong",
    ),
    "box that is none": (
        lambda tensors, metadata, own: own["recipe"]["photo"].update(box="1,2,3"),
        "recipe in its header is wrong: .*photo.box",
    ),
    "day that is none": (lambda tensors, metadata, own: own.update(date="yesterday"), "'date' .* is wrong"),
    "a later stage": (
        lambda tensors, metadata, own: tensors.update({f"stage_2.{A_KEY}": torch.ones(4, 32)}),
        "'stage_2.unet.* is of a later stage, and Stable Diffusion .* upgrade",
    ),
    "recipe of a part it doesn't have": (
        lambda tensors, metadata, own: own["recipe"]["lora"].update(text_encoder_3={"rank": 4}),
        "recipe in its header is wrong: .*no part 'text_encoder_3'",
    ),
    "seconds nan": (lambda tensors, metadata, own: own.update(seconds=float("nan")), "'seconds' .* is wrong"),
    "unknown recipe key": (
        lambda tensors, metadata, own: own["recipe"]["fit"].update(stepz=3),
        "recipe in its header is wrong: .*stepz",
    ),
    "recipe of another rank": (
        lambda tensors, metadata, own: own["recipe"]["lora"]["unet"].update(rank=8),
        "not rank 8",
    ),
    "lora tensors in a full adapter": (
        lambda tensors, metadata, own: own["recipe"]["fit"].update(method="full"),
        "doesn't belong",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tampered_file_is_one_line(saved: Path, name: str) -> None:
    change, message = CHANGES[name]
    path = rewritten(saved, change)
    with pytest.raises(AdapterFileError, match=message) as caught:
        Adapter.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_describe_refuses_the_same_headers(saved: Path) -> None:
    for name, (change, message) in CHANGES.items():
        if name not in ("nan", "infinite photo"):  # those need the values
            with pytest.raises(AdapterFileError, match=message):
                describe(rewritten(saved, change))


def test_files_that_arent_safetensors_are_one_line(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pt")
    bad = {
        "empty": (b"", "isn't a complete"),
        "short": (b"abc", "isn't a complete"),
        "text": (b"this is not an adapter file, it is a text", "isn't a complete"),
        "pickle": (pickle.dumps({"a": list(range(99))}), "pickle"),
        "zip": ((tmp_path / "zip.pt").read_bytes(), "pickle"),
        "cut in the header": (content[: header // 2], "isn't a complete"),
        "cut in the tensors": (content[:-10], "damaged or incomplete"),
        "too much": (content + b"0" * 10, "damaged or incomplete"),
        "broken header": (content[:20] + b"\xff\xfe" + content[22:], "damaged or incomplete"),
        "header said to be huge": (struct.pack("<Q", 2**60) + content[8:], "isn't a complete"),
        "header over the cap": (struct.pack("<Q", 17 * 2**20) + b" " * (18 * 2**20), "isn't a complete"),
        "endless nesting": (struct.pack("<Q", 100_000) + b"[" * 100_000, "damaged or incomplete"),
    }
    for name, (written, message) in bad.items():
        path = tmp_path / "bad.safetensors"
        path.write_bytes(written)
        with pytest.raises(AdapterFileError, match=message) as caught:
            Adapter.load(path)
        assert "\n" not in str(caught.value), name


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    path = tmp_path / "photo.safetensors"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(AdapterFileError, match="never loaded"):
        Adapter.load(path)
    assert not marker.exists()


def test_missing_files_and_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="doesn't exist"):
        Adapter.load(tmp_path / "missing.safetensors")
    with pytest.raises(AdapterFileError, match="has no adapter_config.json"):
        Adapter.load(tmp_path)
    with pytest.raises(AdapterFileError, match="can't be read"):
        describe("a\0b")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_x.alpha": torch.ones(1)}, "of a layer that Stable Diffusion"),
        ({"model.weight": torch.ones(2, 2)}, "a file with whole weights of layers"),
        ({"model.scales": torch.ones(2, 2)}, "doesn.t belong to a LoRA adapter"),
        ({"text_encoder.q_proj.lora_A.weight": torch.ones(2, 2)}, "is missing"),
        ({"unet.to_q.lora_A.weight": torch.ones(2, 2)}, "is missing"),
        ({"unet.to_q.lora_A.weight": torch.ones(2000, 2)}, "can't hold"),
        (
            {
                f"{start}.q_proj.lora_A.weight": torch.ones(2, 2)
                for start in ("text_encoder", "text_encoder.text_model")
            },
            "twice",
        ),
        ({"stage_2.unet.to_q.lora_A.weight": torch.ones(2, 2)}, "later stage"),
    ],
)
def test_another_tools_file_that_is_no_adapter_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(tmp_path / "foreign.safetensors")


def test_library_messages_about_a_file_are_safe_to_print(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    adapter.save(path)
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"F\x7f6"', 1))
    with pytest.raises(AdapterFileError, match=r"F\\x7f6") as caught:
        Adapter.load(path)
    assert str(caught.value).isprintable()


def test_wrong_offsets_in_a_header_are_refused_before_tensors_are_read(saved: Path) -> None:
    content = saved.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:end]), content[end:]
    first = min((key for key in header if key[0] != "_"), key=lambda key: header[key]["data_offsets"])
    start, stop = header[first]["data_offsets"]
    lies: dict[str, Any] = {
        "overlap": {"data_offsets": [start + 2, stop + 2]},
        "backwards": {"data_offsets": [stop, start]},
        "beyond": {"data_offsets": [start, 2**40]},
        "negative": {"data_offsets": [-2, stop]},
        "fractions": {"data_offsets": [0.0, stop]},
        "huge": {"shape": [2**62] * 8},
        "many axes": {"shape": [1] * 1000},
        "no shape": {"shape": None},
        "surplus": {"more": 1},
    }
    for name, lie in lies.items():
        text = json.dumps({**header, first: {**header[first], **lie}}).encode()
        saved.write_bytes(len(text).to_bytes(8, "little") + text + body)
        for opened in (describe, Adapter.load):
            with pytest.raises(AdapterFileError, match="damaged or incomplete"):
                opened(saved)
                pytest.fail(name)
    twice = json.dumps(header)[:-1].encode() + b', "__metadata__": {}}'
    saved.write_bytes(len(twice).to_bytes(8, "little") + twice + body)
    with pytest.raises(AdapterFileError, match="a duplicate name"):
        describe(saved)
