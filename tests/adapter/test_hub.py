"""The hub: a dry run shows the upload, and pushed adapters can be loaded; on a fake client."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import run
from PIL import Image

from lora_unitune.adapter import hub
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.cache import AdapterCache
from lora_unitune.adapter.convert import convert
from lora_unitune.adapter.describe import describe
from lora_unitune.errors import AdapterFileError, HubError, SettingError


class StandIn:
    """A fake of the hub's client that stores repositories in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private, self.downloads = folder, dict[str, bool](), list[str]()

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        (self.folder / repo).mkdir(parents=True, exist_ok=exist_ok)
        self.private[repo] = private

    def create_commit(self, repo: str, operations: list[Any], *, commit_message: str) -> Any:
        for operation in operations:
            with operation.as_file() as content:
                (self.folder / repo / operation.path_in_repo).write_bytes(content.read())
        return SimpleNamespace(commit_url=f"hub/{repo}/commit/1")

    def model_info(self, repo: str, *, files_metadata: bool) -> Any:
        if not (self.folder / repo).is_dir():
            raise OSError("404 Client Error")
        files = sorted((self.folder / repo).iterdir())
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=file.name, size=file.stat().st_size) for file in files]
        )

    def hf_hub_download(self, repo: str, name: str) -> str:
        self.downloads.append(name)
        return str(self.folder / repo / name)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn(tmp_path / "hub")
    monkeypatch.setattr(hub, "_client", lambda: made)
    return made


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "out.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


@pytest.fixture
def file(adapter: Adapter, tmp_path: Path) -> Path:
    adapter.save(tmp_path / "photo.safetensors")
    return tmp_path / "photo.safetensors"


def test_the_command_lines_dry_run_shows_everything_and_sends_nothing(
    stand_in: StandIn, file: Path, sample: Path
) -> None:
    arguments = ("push", file, "me/photo", "--picture", sample, "--dry-run")
    shown = run(*arguments).stdout
    for said in ("license: other", "consent", "can redraw the photo", "hub://me/photo", "sample-1.png",
                 "zqrt ohwx", "nothing was sent"):  # fmt: skip
        assert said in shown
    answer = json.loads(run(*arguments, "--json").stdout)
    assert answer["files"].keys() == {"photo.safetensors", "sample-1.png"}
    assert answer["card"] in shown
    assert not stand_in.folder.exists()


def test_what_was_pushed_opens_by_its_address(stand_in: StandIn, file: Path, sample: Path) -> None:
    upload = hub.prepare_push(file, "me/photo", license="cc0-1.0", pictures=[sample], private=True)
    assert not stand_in.folder.exists() and hub.push(upload) == "hub/me/photo/commit/1"
    assert stand_in.private == {"me/photo": True}
    there = stand_in.folder / "me/photo"
    assert (there / "photo.safetensors").read_bytes() == file.read_bytes()
    assert (there / "README.md").read_text().startswith("---\nlicense: cc0-1.0\n")
    opened, cache = Adapter.load("hub://me/photo"), AdapterCache(2**20)
    assert opened.digest == Adapter.load(file).digest
    assert Adapter.load("hub://me/photo/photo.safetensors", "zqrt").rare_tokens == "zqrt"
    assert cache.open("hub://me/photo") is cache.open("hub://me/photo")
    assert describe("hub://me/photo") == {**describe(file), "path": "hub://me/photo"}
    assert set(stand_in.downloads) == {"photo.safetensors"}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_every_picture_that_edit_writes_is_shown(
    stand_in: StandIn, file: Path, sample: Path, tmp_path: Path, name: str
) -> None:
    ending = Path(name).suffix.lower()
    Image.open(sample).save(tmp_path / name)
    command = ("push", file, "me/photo", "--picture", tmp_path / name, "--picture", sample, "--dry-run")
    answer = json.loads(run(*command, "--json").stdout)
    assert answer["files"].keys() == {"photo.safetensors", f"sample-1{ending}", "sample-2.png"}
    for shown in (f"sample-1{ending}", "sample-2.png"):
        assert f"![A sample]({shown})" in answer["card"]


def test_an_adapter_in_memory_is_pushed_whole(stand_in: StandIn, adapter: Adapter, sample: Path) -> None:
    made = replace(adapter, date="2026-01-02")
    dry = made.push_to_hub("hub://me/photo", license="mit", pictures=[sample], dry_run=True)
    assert not stand_in.folder.exists() and dry.url == ""
    assert set(dry.files) == {"adapter.safetensors", "sample-1.png"} and "license: mit" in dry.card
    sent = made.push_to_hub("me/photo", license="mit", pictures=[sample], private=True)
    assert (sent.url, sent.card, sent.private) == ("hub/me/photo/commit/1", dry.card, True)
    assert sent.files.keys() == dry.files.keys()
    assert stand_in.private == {"me/photo": True}
    opened = Adapter.load("hub://me/photo")
    assert opened.digest == made.digest and opened.date == "2026-01-02"
    assert all(torch.equal(opened.tensors[key], t.half().float()) for key, t in made.tensors.items())
    for name in ("../up.safetensors", "pickle.bin", ""):
        with pytest.raises(SettingError, match="name = "):
            made.push_to_hub("me/photo", name=name)
    assert set(made.push_to_hub("me/photo", name="fox.safetensors", dry_run=True).files) == {
        "fox.safetensors"
    }


def test_a_repository_with_several_files_asks_which(stand_in: StandIn, file: Path) -> None:
    hub.push(hub.prepare_push(file, "me/photo"))
    shutil.copy(file, stand_in.folder / "me/photo/other.safetensors")
    (stand_in.folder / "me/photo/pickle.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SettingError, match="other.safetensors, photo.safetensors; name one"):
        Adapter.load("hub://me/photo")
    assert hub.download("hub://me/photo/other.safetensors").name == "other.safetensors"
    for address in ("hub://me", "hub://me/photo/pickle.bin", "hub://../x"):
        with pytest.raises(SettingError, match="isn't an address"):
            Adapter.load(address)
    with pytest.raises(HubError, match=r"has no none\.safetensors"):
        Adapter.load("hub://me/photo/none.safetensors")
    with pytest.raises(HubError, match="you/none can't be read"):
        describe("hub://you/none")


def test_what_cannot_be_pushed_is_one_line(
    stand_in: StandIn, adapter: Adapter, file: Path, sample: Path, tmp_path: Path
) -> None:
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "owner/name": ("nowhere", {}),
        "license = 'My Own!' isn't an identifier": ("me/photo", {"license": "My Own!"}),
        "up to 2": ("me/photo", {"pictures": [sample] * 3}),
        "isn't a PNG, JPEG, WebP or AVIF": ("me/photo", {"pictures": [file]}),
    }
    for message, (repo, options) in wrong.items():
        for push in (adapter.push_to_hub, lambda *args, **named: hub.prepare_push(file, *args, **named)):
            with pytest.raises(SettingError, match=message):
                push(repo, **options)
    with pytest.raises(SettingError, match="another tool"):
        replace(adapter, fingerprint="").push_to_hub("me/photo")
    convert(file, "peft", tmp_path / "peft")
    with pytest.raises(AdapterFileError, match="isn't one file"):
        hub.prepare_push(tmp_path / "peft", "me/photo")
    assert not stand_in.folder.exists()
    stand_in.folder.mkdir()
    (stand_in.folder / "me").write_text("in the way")
    with pytest.raises(HubError, match="can't be pushed to"):
        adapter.push_to_hub("me/photo")


def test_a_card_is_not_broken_by_what_a_header_says() -> None:
    described = {
        "path": "x.safetensors", "base": "a|b`c", "rare_tokens": 'q"`|w', "fingerprint": "0",
        "method": "lora", "ranks": {"unet": 2}, "steps": 3, "size": [96, 64], "bytes": 9,
        "photo_embedded": False,
    }  # fmt: skip
    card = hub.model_card(described, "me/photo", "mit", ["sample-1.png"])
    assert 'instance_prompt: "q\\"`|w"' in card and "| base | `abc`" in card and "base_model" not in card
    assert "![A sample](sample-1.png)" in card and "latents" not in card and "96x64 pixels" in card
    real = hub.model_card({**described, "base": "owner/model"}, "me/photo", "mit", [])
    assert 'base_model: "owner/model"' in real
