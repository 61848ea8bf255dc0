"""Adapters on the Hugging Face hub: model cards, uploads with a dry run, and downloads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_unitune.adapter.describe import describe
from lora_unitune.errors import AdapterFileError, HubError, SettingError, one_line
from lora_unitune.output import PICTURES

SCHEME = "hub://"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}", re.ASCII)
_MOST_PICTURES = 2
_SHOWN = [ending for ending, kind in PICTURES.items() if kind != "TIFF"]  # by browsers
_LARGEST_FILE = 2**30  # bytes
_ASK = "check its name, the network, and `hf auth login`"


@dataclass(frozen=True)
class Upload:
    """The content of a push.

    Attributes:
        repo: Repository on the hub, owner/name.
        card: The model card (README.md), Markdown with YAML front matter.
        files: Name in the repository -> content.
        private: Whether a new repository is private.
        url: URL of the commit, once it is pushed.
    """

    repo: str
    card: str
    files: dict[str, bytes]
    private: bool
    url: str = ""


def prepare_push(
    path: str | Path,
    repo: str,
    *,
    license: str = "other",
    pictures: Sequence[str | Path] = (),
    private: bool = False,
) -> Upload:
    """Prepares a push without sending anything.

    Args:
        path: Path of an adapter file.
        repo: Repository on the hub, owner/name.
        license: License identifier of the hub, such as "cc-by-4.0".
        pictures: Paths of up to two sample images (PNG, JPEG, WebP or AVIF) to show in the card.
        private: Whether a new repository is private.

    Raises:
        SettingError: The name, the license or a sample image is invalid.
        AdapterFileError: The file isn't an adapter that this package wrote.
    """
    if not _REPO.fullmatch(repo.removeprefix(SCHEME)):
        raise SettingError(f"{repo!r} isn't the name of a repository; give owner/name")
    if not _LICENSE.fullmatch(license):
        raise SettingError(
            f"license = {license!r} isn't an identifier of the hub; give one such as cc-by-4.0"
        )
    if len(pictures) > _MOST_PICTURES:
        raise SettingError(f"there are {len(pictures)} pictures; a card shows up to {_MOST_PICTURES}")
    described = describe(path)
    if described["format_version"] is None:
        raise SettingError(f"{path} is of another tool; push a file that lora-unitune fitted")
    if not Path(path).is_file():
        raise AdapterFileError(f"{path} isn't one file; convert it to diffusers' layout and push that")
    files = {Path(path).name: Path(path).read_bytes()}
    for number, picture in enumerate(pictures, 1):
        ending = Path(picture).suffix.lower()
        if ending not in _SHOWN or not Path(picture).is_file():
            raise SettingError(
                f"picture {picture} isn't a PNG, JPEG, WebP or AVIF file; give one that edit wrote"
            )
        files[f"sample-{number}{ending}"] = Path(picture).read_bytes()
    repo = repo.removeprefix(SCHEME)
    return Upload(repo, model_card(described, repo, license, [*files][1:]), files, private)


def model_card(described: dict[str, Any], repo: str, license: str, pictures: Sequence[str]) -> str:
    """Returns an adapter's model card.

    Args:
        described: The result of `describe`.
        repo: Repository on the hub, owner/name.
        license: License identifier of the hub.
        pictures: File names of the sample images in the repository.
    """
    base, tokens, name = described["base"], described["rare_tokens"], Path(described["path"]).name
    head = [f"license: {license}", "library_name: diffusers", "tags: [lora, text-to-image, lora-unitune]"]
    head += [f"instance_prompt: {json.dumps(tokens)}"]
    head += [f"base_model: {json.dumps(base)}"] if _REPO.fullmatch(base) else []
    steps = f", {described['steps']} steps" if described["steps"] is not None else ""
    named = "BASE" if base == "unknown" else _cell(base)
    photo = "" if described["photo_embedded"] else " --photo photo.png"
    ranks = ", ".join(f"{part} {rank}" for part, rank in described["ranks"].items())
    lines = ["---", *head, "---", "", f"# {repo.partition('/')[2]}", ""]
    lines += ["A LoRA adapter of one photo, fitted by lora-unitune (UniTune, arXiv 2210.09477).", ""]
    lines += [f"![A sample]({picture})" for picture in pictures] + ([""] if pictures else [])
    lines += [
        "| | |",
        "| --- | --- |",
        f"| trigger phrase | `{_cell(tokens)}` |",
        f"| base | `{_cell(base)}`, fingerprint `{_cell(described['fingerprint'])}` |",
        f"| method | {described['method']}, rank {ranks or 'full'}{steps} |",
        f"| resolution | {'x'.join(map(str, described['size']))} pixels |",
        f"| size | {described['bytes']} bytes |",
        "",
        "```",
        f'lora-unitune edit {SCHEME}{repo} "an edit in words" -o out.png --base {named}{photo}',
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
    """Creates the repository if it doesn't exist, uploads everything in one commit, and returns its URL.

    Raises:
        HubError: The hub can't be reached, or refuses the upload.
    """
    from huggingface_hub import CommitOperationAdd

    api = _client()
    contents = {**upload.files, "README.md": upload.card.encode()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        made = api.create_commit(upload.repo, operations, commit_message="Add an adapter of one photo")
    except Exception as error:  # network, authorisation and the hub's own errors have no common class
        raise HubError(f"{upload.repo} can't be pushed to ({one_line(error)}); {_ASK}") from error
    return str(made.commit_url)


def download(address: str) -> Path:
    """Downloads an adapter file from the hub into the cache of its client.

    Args:
        address: "hub://owner/name", or "hub://owner/name/file.safetensors" if it has several files.

    Raises:
        SettingError: The address is invalid, or the repository has several files.
        HubError: The hub can't be reached, or the repository has no safetensors file of up to 1 GiB.
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
    matches = sorted(
        file for file in sizes if file == wanted or (not wanted and file.endswith(".safetensors"))
    )
    if not matches:
        raise HubError(f"{repo} has no {wanted or 'safetensors file'}; check it on the hub")
    if len(matches) > 1:
        raise SettingError(
            f"{repo} has {', '.join(matches[:5])}; name one, as in {SCHEME}{repo}/{matches[0]}"
        )
    if sizes[matches[0]] > _LARGEST_FILE:
        raise HubError(
            f"{matches[0]} of {repo} is larger than 1 GiB, so it isn't an adapter; check it on the hub"
        )
    try:
        return Path(api.hf_hub_download(repo, matches[0]))
    except Exception as error:
        raise HubError(f"{matches[0]} of {repo} can't be downloaded ({one_line(error)}); {_ASK}") from error


def _client() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="lora-unitune")


def _cell(text: str) -> str:
    """Returns text without the characters that would end a table cell or its code span."""
    return re.sub(r"[`|\\]", "", text)
