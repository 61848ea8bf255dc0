"""The edit: base + adapter + words -> images (UniTune, arXiv 2210.09477, section 3)."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from lora_unitune import __version__
from lora_unitune.adapter import layers
from lora_unitune.adapter.adapter import Adapter, check_fits
from lora_unitune.adapter.cache import AdapterCache
from lora_unitune.adapter.header import METADATA_KEY
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.editing.sampling import sample_edit
from lora_unitune.errors import AdapterFileError, OutputError, PromptError, RecipeError, SettingError
from lora_unitune.families import Base, load_base
from lora_unitune.output import write_atomically
from lora_unitune.photo.reading import load_photo, photo_to_tensor
from lora_unitune.recipe import EditSettings

_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Edit:
    """An edited image and every setting that made it.

    Attributes:
        image: RGB.
        prompt: the whole text that was sent, rare tokens included.
        settings: everything needed to repeat the edit, as values that JSON can hold.
        seconds: the edit took, without loading the base.
        notes: what a person may want to know about it, one sentence each.
    """

    image: Image.Image
    prompt: str
    settings: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the image as a PNG that carries the settings; `read_settings` gets them back.

        Args:
            path: of the file; its name ends in .png.
            overwrite: whether a file that is there may be replaced.

        Raises:
            OutputError: the file is there already, isn't a PNG by its name, or can't be written.
        """
        if Path(path).suffix.lower() != ".png":
            raise OutputError(f"{path} isn't the name of a PNG file; let it end in .png")
        information = PngImagePlugin.PngInfo()
        information.add_text(METADATA_KEY, json.dumps(self.settings))
        write_atomically(
            path, lambda temporary: self.image.save(temporary, format="PNG", pnginfo=information), overwrite
        )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings out of a PNG that `Edit.save` wrote.

    Args:
        path: of the PNG.

    Raises:
        SettingError: it isn't a PNG with settings in it.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            settings = json.loads(image.info[METADATA_KEY])
    except (OSError, SyntaxError, ValueError, KeyError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise SettingError(f"{path} has no settings of an edit in it; give a PNG that lora-unitune wrote")
    return settings


class Editor:
    """Keeps a base in memory and edits photos with one adapter after another.

    `open` reads adapter files and keeps the last ones. Adapters are exchanged in place. While an Editor holds
    a base, leave that base alone; `release` gives it back as it was, to the bit.
    """

    def __init__(self, base: str | Base = "pocket", device: str = "auto", cache: int = 2**28) -> None:
        """Loads the base, unless it is loaded already.

        Args:
            base: "pocket", a folder, a hub id, or a base in memory.
            device: where a base given by name goes: "auto", "cpu", "cuda" or "mps".
            cache: bytes of the adapters that `open` may keep in memory.

        Raises:
            BaseModelError: the base is unknown, broken, or of a kind that isn't supported.
            DeviceError: the device isn't there.
        """
        self.open = AdapterCache(cache).open
        self.base: Base = load_base(base, device) if isinstance(base, str) else base
        self._mount = Mount(self.base)

    def edit(
        self,
        adapter: Adapter | None,
        prompt: str,
        *,
        negative_prompt: str = "",
        photo: str | Path | Image.Image | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_start: float | None = None,
        guidance_stop: float | None = None,
        guidance_rescale: float | None = None,
        strength: float | None = None,
        adapter_scale: float | None = None,
        unconditional: str | None = None,
        residual: bool | None = None,
    ) -> Edit:
        """Edits the adapter's photo with words. Settings left None are those of the adapter's recipe.

        Args:
            adapter: of the photo; None draws with the plain base, without rare tokens.
            prompt: what the photo should become; the rare tokens are put before it.
            negative_prompt: what guidance moves away from, instead of the empty prompt.
            photo: to start from, instead of the one in the adapter file.
            seed: of the noise.
            steps: sampling steps of a full run.
            guidance: classifier-free guidance weight, from 1.
            guidance_start: share of a full run's denoising that goes without guidance at first, 0 to 1.
            guidance_stop: share of it after which guidance ends, 0 to 1.
            guidance_rescale: remedy against overexposure, 0 to 1.
            strength: how much noise the photo gets, above 0 to 1; 1 starts from noise alone.
            adapter_scale: of the adapter's effect, 0 to 4.
            unconditional: "adapter" or "base": the weights that predict the empty prompt.
            residual: sample the rare tokens alone too, and add to the photo only what the prompt changed.

        Raises:
            PromptError: the prompt is empty.
            SettingError: a setting is out of its range, or there is no photo to start from.
            AdapterFileError: the adapter was made for another base, or has the wrong tensors.
            PhotoError: the photo can't be read.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError("the prompt is empty; say in a few words what the photo should become")
        given = {
            "steps": steps,
            "guidance": guidance,
            "guidance_start": guidance_start,
            "guidance_stop": guidance_stop,
            "guidance_rescale": guidance_rescale,
            "strength": strength,
            "adapter_scale": adapter_scale,
            "unconditional": unconditional,
            "residual": residual,
        }
        return self._run(adapter, prompt, negative_prompt, photo, seed, given)

    def edit_many(
        self, adapter: Adapter | None, prompt: str, count: int, seed: int = 0, **settings: Any
    ) -> list[Edit]:
        """Makes several edits that differ in their noise.

        Args:
            adapter: as for `edit`.
            prompt: as for `edit`.
            count: how many; their seeds are `seed`, `seed` + 1, and so on.
            seed: of the first.
            **settings: the other settings of `edit`.

        Raises:
            UnituneError: as for `edit`.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SettingError(f"count = {count!r} isn't allowed; give a whole number from 1")
        _checked_seed(seed + count - 1 if isinstance(seed, int) else seed)
        return [self.edit(adapter, prompt, seed=seed + index, **settings) for index in range(count)]

    def reconstruct(
        self, adapter: Adapter, *, seed: int = 0, steps: int | None = None, adapter_scale: float = 1.0
    ) -> Edit:
        """Draws the photo again from noise and the rare tokens alone, without guidance: what the fit learned.

        Args:
            adapter: of the photo.
            seed: of the noise.
            steps: sampling steps.
            adapter_scale: of the adapter's effect, whatever the recipe sets for edits.

        Raises:
            UnituneError: as for `edit`.
        """
        given = {"steps": steps, "adapter_scale": adapter_scale, "guidance": 1.0, "strength": 1.0}
        return self._run(adapter, "", "", None, seed, given)

    def repeat(
        self, adapter: Adapter | None, settings: dict[str, Any], photo: str | Path | Image.Image | None = None
    ) -> Edit:
        """Makes an edit again.

        Args:
            adapter: the edit was made with.
            settings: of the edit, as `Edit.settings` or `read_settings` has them.
            photo: the edit started from, if it wasn't the one in the adapter file.

        Raises:
            SettingError: a setting is missing or wrong, or the edit was made with another base or adapter.
            UnituneError: as for `edit`.
        """
        names = [field.name for field in dataclasses.fields(EditSettings)]
        settings = {"residual": False, **settings}  # edits of before there was one
        needed = [*names, "prompt", "negative_prompt", "seed", "fingerprint", "adapter", "photo"]
        missing = [name for name in needed if name not in settings]
        if missing:
            raise SettingError(f"the settings lack {', '.join(missing)}; take them whole from an edit")
        ours = (self.base.fingerprint, adapter.digest if adapter else None)
        if (settings["fingerprint"], settings["adapter"]) != ours:
            raise SettingError("the edit was made with another base or adapter; repeat it with the same ones")
        if settings["photo"] == "given" and photo is None:
            raise SettingError("the edit started from a photo that was given with it; give that photo again")
        given = {name: settings[name] for name in names}
        prompt, negative_prompt, seed = (settings[name] for name in ("prompt", "negative_prompt", "seed"))
        return self._run(adapter, prompt, negative_prompt, photo, seed, given)

    @torch.no_grad()
    def photo_round_trip(self, adapter: Adapter) -> Image.Image:
        """Decodes the photo's latents: what the base's VAE makes of the photo, the best an edit can keep.

        Args:
            adapter: with the photo's latents in it.

        Raises:
            SettingError: the adapter has no photo in it.
            AdapterFileError: the adapter was made for another base.
        """
        check_fits(adapter, self.base)
        if adapter.photo_latents is None:
            raise SettingError("the adapter holds no photo; fit it again without --no-embed-photo")
        return _to_image(self.base.decode(self._checked_latents(adapter)))

    def release(self) -> None:
        """Gives the base back as it was before the first edit, to the bit."""
        self._mount.release()

    @torch.no_grad()
    def pixels(
        self,
        adapter: Adapter | None,
        texts: Sequence[str],
        negative_prompt: str,
        photo_latents: Tensor | None,
        seeds: Sequence[int],
        settings: EditSettings,
    ) -> Tensor:
        """Samples images together, with nothing added to the prompts and no default filled in.

        Args:
            adapter: None is the plain base.
            texts: the whole prompts, rare tokens included.
            negative_prompt: of the other branch of guidance.
            photo_latents: (1, c, h, w) scaled latents to start from; None when strength is 1.
            seeds: of the noise, one for each text.
            settings: the sampler's.

        Returns:
            (texts, 3, height, width) float32 in [0, 1].
        """
        self._mount.use(adapter, settings.adapter_scale)
        conditional = torch.cat([self._embed(text)[0] for text in texts])
        empty, _ = self._embed(negative_prompt)
        if settings.unconditional == "base":
            with layers.adapters_disabled(self.base):
                empty, _ = self._embed(negative_prompt)
        shape = self.base.latent_shape(adapter.resolution if adapter else 0)
        rare = self._embed(adapter.rare_tokens if adapter else "")[0] if settings.residual else None
        latents = sample_edit(self.base, shape, conditional, rare, empty, photo_latents, seeds, settings)
        return self.base.decode(latents)

    def _run(
        self,
        adapter: Adapter | None,
        prompt: str,
        negative_prompt: str,
        photo: str | Path | Image.Image | None,
        seed: int,
        given: dict[str, Any],
    ) -> Edit:
        """Checks the settings, samples, and puts the edit together."""
        started = time.perf_counter()
        if adapter is not None:
            check_fits(adapter, self.base)
            if not adapter.rare_tokens:
                raise PromptError("the adapter doesn't say its rare tokens; give the words with --tokens")
        settings = self._settings(adapter, photo is not None, given)
        _checked_seed(seed)
        text = " ".join(part for part in (adapter.rare_tokens if adapter else "", prompt) if part)
        notes = [*self._cut_note("prompt", text), *self._cut_note("negative prompt", negative_prompt)]
        if negative_prompt and settings.guidance == 1:
            notes.append("guidance is 1, so the negative prompt has no effect")
        latents, origin = self._start(adapter, photo, settings, notes)
        image = _to_image(self.pixels(adapter, [text], negative_prompt, latents, [seed], settings))
        record = {
            "lora_unitune": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "base": self.base.name,
            "fingerprint": self.base.fingerprint,
            "adapter": adapter.digest if adapter else None,
            "rare_tokens": adapter.rare_tokens if adapter else "",
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "photo": origin,
            "seed": seed,
            "resolution": image.width,
            **dataclasses.asdict(settings),
        }
        return Edit(image, text, record, time.perf_counter() - started, tuple(notes))

    def _settings(self, adapter: Adapter | None, has_photo: bool, given: dict[str, Any]) -> EditSettings:
        """Returns the settings of an edit: those that were given, then the recipe's."""
        defaults = adapter.recipe.edit if adapter else EditSettings(strength=0.95 if has_photo else 1.0)
        is_full = adapter is not None and adapter.recipe.fit.method == "full"
        if is_full:  # the base's own weights aren't there beside it
            defaults = dataclasses.replace(defaults, unconditional="adapter")
        chosen = {name: value for name, value in given.items() if value is not None}
        try:
            settings = dataclasses.replace(defaults, **chosen)
        except RecipeError as error:
            raise SettingError(str(error)) from error
        steps, most = settings.steps, len(self.base.alphas_cumprod)
        if steps > most:
            raise SettingError(f"edit.steps = {steps} isn't allowed; this base takes from 1 to {most}")
        if int(steps * settings.strength) < 1:
            raise SettingError(f"edit.strength = {settings.strength} leaves none of {steps} steps; raise one")
        if is_full and settings.unconditional == "base":
            raise SettingError(
                "edit.unconditional = 'base' needs an adapter of method 'lora', not 'full'; use 'adapter'"
            )
        return settings

    def _start(
        self,
        adapter: Adapter | None,
        photo: str | Path | Image.Image | None,
        settings: EditSettings,
        notes: list[str],
    ) -> tuple[Tensor | None, str | None]:
        """Returns the latents sampling starts from, and where they come from: "given", "adapter" or None."""
        if settings.strength == 1:
            return None, None
        if photo is not None:
            read = load_photo(photo, (adapter.resolution if adapter else 0) or self.base.resolution)
            notes.extend(f"the photo: {note}" for note in read.notes)
            mean, _ = self.base.encode_photo(photo_to_tensor(read))
            return mean, "given"
        if adapter is None or adapter.photo_latents is None:
            raise SettingError(
                f"edit.strength = {settings.strength:g} starts from the photo and there is none in the "
                "adapter; give the photo (--photo), or strength 1"
            )
        return self._checked_latents(adapter), "adapter"

    def _checked_latents(self, adapter: Adapter) -> Tensor:
        """Returns the photo's latents out of an adapter, on the base's device."""
        shape = (1, *self.base.latent_shape(adapter.resolution))
        if adapter.photo_latents is None or tuple(adapter.photo_latents.shape) != shape:
            found = None if adapter.photo_latents is None else tuple(adapter.photo_latents.shape)
            raise AdapterFileError(
                f"the photo's latents in the adapter have shape {found} instead of {shape}; fit it again"
            )
        return adapter.photo_latents.to(self.base.device, torch.float32)

    def _cut_note(self, name: str, text: str) -> list[str]:
        _, cut = self.base.tokenize(text)
        return [f"the {name} is too long for the base; this was left out: {cut!r}"] if cut else []

    def _embed(self, text: str) -> tuple[Tensor, str]:
        """Returns a text's embeddings (1, L, width), and what didn't fit."""
        ids, cut = self.base.tokenize(text)
        return self.base.embed(ids), cut


def _checked_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED:
        raise SettingError(f"seed = {seed!r} isn't allowed; give a whole number from 0 to 2**63 - 1")


def _to_image(pixels: Tensor) -> Image.Image:
    """Turns (1, 3, height, width) in [0, 1] into an image, rounded as diffusers rounds."""
    return Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().to("cpu", torch.uint8).numpy())
