"""Adapters on the Hugging Face hub: a model card and an upload that shows first what it would send."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_unitune.adapter.adapter import describe
from lora_unitune.errors import HubError, SettingError
from lora_unitune.families import one_line

SCHEME = "hub://"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}", re.ASCII)
_MOST_PICTURES = 2
_LARGEST_FILE = 2**30  # bytes
_ASK = "check its name, the network, and `hf auth login`"


@dataclass(frozen=True)
class Upload:
    """What a push sends.

    Attributes:
        repo: owner/name.
        card: the README.md of the model, Markdown with a YAML head.
        files: name in the repository -> the local file.
        private: whether only its owner sees a new repository.
    """

    repo: str
    card: str
    files: dict[str, Path]
    private: bool


def prepare_push(
    path: str | Path,
    repo: str,
    *,
    licence: str = "other",
    pictures: Sequence[str | Path] = (),
    private: bool = False,
) -> Upload:
    """Puts together what a push would send; nothing leaves the machine.

    Args:
        path: of an adapter file.
        repo: owner/name on the hub.
        licence: its identifier there, such as "cc-by-4.0".
        pictures: up to two PNGs to show in the card.
        private: whether only its owner sees a new repository.

    Raises:
        SettingError: the name, the licence or the pictures can't be used.
        AdapterFileError: the file isn't an adapter that this package wrote.
    """
    if not _REPO.fullmatch(repo.removeprefix(SCHEME)):
        raise SettingError(f"{repo!r} isn't the name of a repository; give owner/name")
    if not _LICENCE.fullmatch(licence):
        raise SettingError(f"licence {licence!r} isn't an identifier of the hub; give one such as cc-by-4.0")
    if len(pictures) > _MOST_PICTURES:
        raise SettingError(f"{len(pictures)} pictures are given; a card shows up to {_MOST_PICTURES}")
    described = describe(path)
    if not described["rare_tokens"]:
        raise SettingError(f"{path} doesn't say its rare tokens; push a file that lora-unitune fitted")
    files = {Path(path).name: Path(path)}
    for number, picture in enumerate(pictures, 1):
        if Path(picture).suffix.lower() != ".png" or not Path(picture).is_file():
            raise SettingError(f"picture {picture} isn't a PNG file; give one that edit wrote")
        files[f"sample-{number}.png"] = Path(picture)
    repo = repo.removeprefix(SCHEME)
    return Upload(repo, model_card(described, repo, licence, [*files][1:]), files, private)


def model_card(described: dict[str, Any], repo: str, licence: str, pictures: Sequence[str]) -> str:
    """Returns an adapter's model card.

    Args:
        described: as `adapter_file.describe` returns it.
        repo: owner/name.
        licence: its identifier on the hub.
        pictures: names of the sample pictures in the repository.
    """
    base, tokens, name = described["base"], described["rare_tokens"], Path(described["path"]).name
    head = [f"license: {licence}", "library_name: diffusers", "tags: [lora, text-to-image, lora-unitune]"]
    head += [f"instance_prompt: {json.dumps(tokens)}"]
    head += [f"base_model: {json.dumps(base)}"] if _REPO.fullmatch(base) else []
    fit = described["recipe"]["fit"]
    ranks = ", ".join(f"{part} {rank}" for part, rank in described["ranks"].items())
    lines = ["---", *head, "---", "", f"# {repo.partition('/')[2]}", ""]
    lines += ["A LoRA adapter of one photo, fitted by lora-unitune (UniTune, arXiv 2210.09477).", ""]
    lines += [f"![A sample]({picture})" for picture in pictures] + ([""] if pictures else [])
    lines += [
        "| | |",
        "| --- | --- |",
        f"| trigger phrase | `{_cell(tokens)}` |",
        f"| base | `{_cell(base)}`, fingerprint `{_cell(described['fingerprint'])}` |",
        f"| method | {described['method']}, rank {ranks or 'full'}, {fit['steps']} steps |",
        f"| resolution | {described['resolution']} pixels |",
        f"| size | {described['bytes']} bytes |",
        "",
        "```",
        f'lora-unitune edit {SCHEME}{repo} "an edit in words" -o out.png --base {_cell(base)}',
        "```",
        "",
        f"In diffusers: `pipeline.load_lora_weights({repo!r}, weight_name={name!r})`, with the trigger",
        "phrase before the prompt.",
        "",
        "## Fair use",
        "",
        "This file can redraw the photo it was fitted on"
        + (", and holds it in the base's latents." if described["photo_embedded"] else "."),
        "Use it as you would use the photo. Edit pictures of people only with their consent, don't present",
        "an edited picture as a record of what happened, and say that it is edited.",
        "",
    ]
    return "\n".join(lines)


def push(upload: Upload) -> str:
    """Creates the repository if it isn't there, and sends everything in one commit; returns its address.

    Raises:
        HubError: the hub can't be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd

    api = _client()
    contents = {name: path.read_bytes() for name, path in upload.files.items()}
    contents["README.md"] = upload.card.encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        made = api.create_commit(upload.repo, operations, commit_message="Add an adapter of one photo")
    except Exception as error:  # network, authorisation and the hub's own errors have no common class
        raise HubError(f"{upload.repo} can't be pushed to ({one_line(error)}); {_ASK}") from error
    return str(made.commit_url)


def download(address: str) -> Path:
    """Brings an adapter file from the hub into its client's cache.

    Args:
        address: "hub://owner/name", or "hub://owner/name/file.safetensors" where there are several.

    Raises:
        SettingError: that isn't an address, or the repository has several files.
        HubError: the hub can't be reached, or the repository has no adapter of a size that can be one.
    """
    owner, _, rest = address.removeprefix(SCHEME).partition("/")
    name, _, wanted = rest.partition("/")
    repo = f"{owner}/{name}"
    if not _REPO.fullmatch(repo) or (wanted and not wanted.endswith(".safetensors")):
        raise SettingError(f"{address!r} isn't an address; write hub://owner/name, or with /file.safetensors")
    api = _client()
    try:
        siblings = api.model_info(repo, files_metadata=True).siblings or []
        sizes = {each.rfilename: each.size or 0 for each in siblings}
    except Exception as error:
        raise HubError(f"{repo} can't be read ({one_line(error)}); {_ASK}") from error
    found = sorted(file for file in sizes if file == wanted or (not wanted and file.endswith(".safetensors")))
    if not found:
        raise HubError(f"{repo} has no {wanted or 'safetensors file'}; check it on the hub")
    if len(found) > 1:
        raise SettingError(f"{repo} has {', '.join(found[:5])}; name one, as in {SCHEME}{repo}/{found[0]}")
    if sizes[found[0]] > _LARGEST_FILE:
        raise HubError(f"{found[0]} of {repo} is larger than a gibibyte, so it's no adapter; check it there")
    try:
        return Path(api.hf_hub_download(repo, found[0]))
    except Exception as error:
        raise HubError(f"{found[0]} of {repo} can't be downloaded ({one_line(error)}); {_ASK}") from error


def _client() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="lora-unitune")


def _cell(text: str) -> str:
    """Returns a header's text so that it stays inside a table cell and its backquotes."""
    return re.sub(r"[`|\\]", "", text)
