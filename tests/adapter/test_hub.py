"""The hub: what a push would send is shown first, and what was pushed opens again; on a stand-in folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import refused, run
from PIL import Image

from lora_unitune.adapter import hub
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.errors import HubError, SettingError


class StandIn:
    """Answers the calls of the hub's client from a folder."""

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


def test_a_dry_run_shows_everything_and_sends_nothing(
    stand_in: StandIn, adapter_file: Path, sample: Path
) -> None:
    arguments = ("push", adapter_file, "me/photo", "--licence", "cc0-1.0", "--picture", sample, "--dry-run")
    shown = run(*arguments).stdout
    for said in ("license: cc0-1.0", "consent", "can redraw the photo", "hub://me/photo", "sample-1.png",
                 Adapter.load(adapter_file).rare_tokens, "nothing was sent"):  # fmt: skip
        assert said in shown
    told = json.loads(run(*arguments, "--json").stdout)
    assert told["pushed"] is None and told["files"].keys() == {"photo.safetensors", "sample-1.png"}
    assert told["card"] in shown
    assert not stand_in.folder.exists()


def test_what_was_pushed_is_edited_by_its_address(
    stand_in: StandIn, adapter_file: Path, sample: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    pushed = run("push", adapter_file, "me/photo", "--picture", sample, "--private")
    assert pushed.exit_code == 0 and "hub/me/photo/commit/1" in pushed.stdout
    assert stand_in.private == {"me/photo": True}
    there = stand_in.folder / "me/photo"
    assert (there / "photo.safetensors").read_bytes() == adapter_file.read_bytes()
    assert (there / "README.md").read_text().startswith("---\nlicense: other\n")
    options = ("a fox", "--base", tiny_sd15, "--steps", "2", "-o")
    assert run("edit", "hub://me/photo", *options, tmp_path / "a.png").exit_code == 0
    assert run("edit", adapter_file, *options, tmp_path / "b.png").exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert stand_in.downloads == ["photo.safetensors"]


def test_a_repository_with_several_files_asks_which(stand_in: StandIn, adapter_file: Path) -> None:
    run("push", adapter_file, "me/photo")
    shutil.copy(adapter_file, stand_in.folder / "me/photo/other.safetensors")
    (stand_in.folder / "me/photo/pickle.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SettingError, match="other.safetensors, photo.safetensors; name one"):
        hub.download("hub://me/photo")
    assert hub.download("hub://me/photo/other.safetensors").name == "other.safetensors"
    for address, message in {"hub://me": "isn't an address", "hub://me/photo/pickle.bin": "isn't an address",
                             "hub://../x": "isn't an address"}.items():  # fmt: skip
        with pytest.raises(SettingError, match=message):
            hub.download(address)
    with pytest.raises(HubError, match=r"has no none\.safetensors"):
        hub.download("hub://me/photo/none.safetensors")
    with pytest.raises(HubError, match="you/none can't be read"):
        hub.download("hub://you/none")


def test_what_cannot_be_pushed_is_one_line(
    stand_in: StandIn, adapter_file: Path, sample: Path, tmp_path: Path
) -> None:
    wrong = {
        "owner/name": ("nowhere",),
        "identifier": ("me/photo", "--licence", "My Own!"),
        "up to 2": ("me/photo", *("--picture", sample) * 3),
        "isn't a PNG": ("me/photo", "--picture", adapter_file),
    }
    for message, arguments in wrong.items():
        assert message in refused("push", adapter_file, *arguments, folder=tmp_path)
    assert not stand_in.folder.exists()
    stand_in.folder.mkdir()
    (stand_in.folder / "me").write_text("in the way")
    assert "can't be pushed to" in refused("push", adapter_file, "me/photo", folder=tmp_path)


def test_a_card_is_not_broken_by_what_a_header_says(adapter_file: Path) -> None:
    described = {
        "path": "x.safetensors", "base": "a|b`c", "rare_tokens": 'q"`|w', "fingerprint": "0",
        "method": "lora", "ranks": {"unet": 2}, "recipe": {"fit": {"steps": 3}}, "resolution": 64, "bytes": 9,
        "photo_embedded": False,
    }  # fmt: skip
    card = hub.model_card(described, "me/photo", "mit", ["sample-1.png"])
    assert 'instance_prompt: "q\\"`|w"' in card and "| base | `abc`" in card and "base_model" not in card
    assert "![A sample](sample-1.png)" in card and "latents" not in card
    real = hub.model_card({**described, "base": "owner/model"}, "me/photo", "mit", [])
    assert 'base_model: "owner/model"' in real
