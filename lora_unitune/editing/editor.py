"""Editing: base + adapter + prompt -> images (UniTune, arXiv 2210.09477, section 3)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lora_unitune.adapter import layers
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.cache import AdapterCache
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.adapter.suits import check_fits, checked_photo
from lora_unitune.editing.failures import are_finite, not_finite, out_of_memory
from lora_unitune.editing.finish import finished
from lora_unitune.editing.prompts import checked_text, complete_prompt, prompt_notes, settings_notes
from lora_unitune.editing.record import Edit, recorded, repeatable, to_image
from lora_unitune.editing.sampling import doubt, sample_edit
from lora_unitune.editing.start import Start, chosen_settings, starting_point
from lora_unitune.errors import PromptError, SettingError
from lora_unitune.families import Base, BaseFiles, Condition, joined, load_base
from lora_unitune.photo.details import restore
from lora_unitune.photo.opening import PhotoSource
from lora_unitune.settings import EditSettings, check_whole

F = TypeVar("F", bound=Callable[..., Any])

_CPU_BATCH_PIXELS = 2**18  # maximum number of pixels in a batch on a CPU
_RECONSTRUCTION = {"guidance": 1.0, "strength": 1.0, "residual": False, "details": False}


def _one_at_a_time(method: F) -> F:
    """Makes a method of an Editor wait while another thread is in one."""

    @functools.wraps(method)
    def waiting(self: Editor, *arguments: Any, **more: Any) -> Any:
        with self._lock:
            return method(self, *arguments, **more)

    return waiting  # type: ignore[return-value]


class Editor:
    """Keeps a base in memory and edits photos with one adapter after another.

    Adapters are hot-swapped in place. Threads may share an Editor; it samples for one at a time. While an
    Editor uses a base, nothing else may modify that base; `release`, or leaving the `with` block of `with
    Editor(...) as editor`, restores it bit for bit.
    """

    def __init__(
        self, base: str | Path | BaseFiles | Base = "pocket", device: str = "auto", cache: int = 2**28
    ) -> None:
        """Loads the base, unless it is passed in memory.

        Args:
            base: "pocket", a folder, a .safetensors file, a hub id, what `locate_base` found, or a base in memory.
            device: Device of a base that is loaded by name: "auto", "cpu", "cuda" or "mps".
            cache: Bytes of adapters that `open` may cache in memory.

        Raises:
            BaseModelError: The base is unknown, broken, or of a family that isn't supported.
            DeviceError: The device isn't available.
        """
        self._cache = AdapterCache(cache)
        self._lock = threading.RLock()
        self.base: Base = base if isinstance(base, Base) else load_base(base, device)
        self._mount = Mount(self.base)
        self._doubted: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def edit(
        self,
        adapter: Adapter | str | Path | None,
        prompt: str,
        *,
        negative_prompt: str | None = "",
        photo: PhotoSource | None = None,
        mask: PhotoSource | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Edit:
        """Edits the adapter's photo according to a prompt.

        Args:
            adapter: Adapter of the photo, or the path of its file; None samples from the plain base, without
                rare tokens.
            prompt: Description of the edited image; the rare tokens are prepended.
            negative_prompt: Prompt of the unconditional prediction of guidance, instead of the empty prompt.
            photo: The photo to start from, instead of the one in the adapter file; the image has its size.
            mask: An image of the photo's shape: white parts may change, gray ones partly, black ones don't.
            seed: Seed of the noise.
            **settings: Fields of `settings.EditSettings`, such as guidance=4 or strength=0.8; the
                others default to the adapter's recipe.

        Raises:
            PromptError: The prompt is empty.
            SettingError: A setting is unknown or out of its range, or there is no photo to start from.
            AdapterFileError: The adapter was made for another base, or has the wrong tensors.
            PhotoError: The photo can't be read.
            DeviceError: The device runs out of memory.
        """
        given: dict[str, Any] = {"negative_prompt": negative_prompt, "photo": photo, "mask": mask}
        return next(self.edits(adapter, prompt, [seed], **given, **settings))

    def edit_many(
        self,
        adapter: Adapter | str | Path | None,
        prompt: str,
        count: int,
        seed: int = 0,
        *,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Edit]:
        """Samples several edits with different noise.

        Args:
            adapter: As for `edit`.
            prompt: As for `edit`.
            count: Number of edits; their seeds are `seed`, `seed` + 1, and so on.
            seed: Seed of the first edit.
            batch_size: Maximum batch size, as for `edits`.
            **settings: The other arguments of `edit`.

        Raises:
            UnituneError: As for `edit`.
        """
        check_whole("count", count, 1)
        check_whole("seed", seed, 0)
        seeds = [seed + index for index in range(count)]
        return list(self.edits(adapter, prompt, seeds, batch_size=batch_size, **settings))

    def edits(
        self,
        adapter: Adapter | str | Path | None,
        prompt: str,
        seeds: Sequence[int],
        *,
        batch_size: int = 1,
        **settings: Any,
    ) -> Iterator[Edit]:
        """Yields an edit for each seed, each as soon as its batch is sampled.

        Args:
            adapter: As for `edit`.
            prompt: As for `edit`.
            seeds: Seeds of the noise, one for each edit.
            batch_size: Maximum batch size. Batches are faster than single samples, and may differ from them by
                one level of 255 in a few values. Reduced when memory runs out, and on a CPU for larger images,
                for which batching isn't faster.
            **settings: The other arguments of `edit`.

        Raises:
            UnituneError: As for `edit`; samples that aren't finite are named after the others are yielded.
        """
        for batch in self.batches(adapter, prompt, seeds, batch_size=batch_size, **settings):
            yield from batch

    def batches(
        self,
        adapter: Adapter | str | Path | None,
        prompt: str,
        seeds: Sequence[int],
        *,
        negative_prompt: str | None = "",
        photo: PhotoSource | None = None,
        mask: PhotoSource | None = None,
        batch_size: int = 1,
        **settings: Any,
    ) -> Iterator[list[Edit]]:
        """Yields the edits of each batch as soon as it is sampled; arguments and errors are those of `edits`."""
        if not checked_text("prompt", prompt).strip():
            raise PromptError("the prompt is empty; say in a few words what the photo should become")
        if isinstance(seeds, int):
            raise SettingError(f"seeds = {seeds} isn't allowed; give a list, such as [{seeds}]")
        check_whole("batch_size", batch_size, 1)
        yield from self._run(adapter, prompt, negative_prompt, photo, seeds, settings, batch_size, mask=mask)

    def reconstruct(
        self,
        adapter: Adapter | str | Path,
        *,
        seed: int = 0,
        steps: int | None = None,
        adapter_scale: float = 1.0,
    ) -> Edit:
        """Samples the photo from noise and the rare tokens alone, without guidance, to show what the fit learned.

        The adapter applies at the strength that was trained, whatever its weight in the file is.

        Args:
            adapter: Adapter of the photo.
            seed: Seed of the noise.
            steps: Sampling steps.
            adapter_scale: Factor of the trained strength, independent of the recipe's adapter_scale.

        Raises:
            UnituneError: As for `edit`.
        """
        settings = {"steps": steps, "adapter_scale": adapter_scale, **_RECONSTRUCTION}
        ((edit,),) = self._run(adapter, "", "", None, [seed], settings, trained=True)
        return edit

    def repeat(
        self,
        adapter: Adapter | str | Path | None,
        settings: dict[str, Any],
        photo: PhotoSource | None = None,
        mask: PhotoSource | None = None,
    ) -> Edit:
        """Repeats an edit exactly.

        Args:
            adapter: Adapter that the edit was made with.
            settings: Settings of the edit, from `Edit.settings` or `read_settings`.
            photo: Photo that the edit started from, if it wasn't the one in the adapter file.
            mask: Its mask, if it had one.

        Raises:
            SettingError: A setting is missing or wrong, or the edit was made with another base or adapter.
            UnituneError: As for `edit`.
        """
        adapter = self._opened(adapter)
        given = [name for name, value in (("photo", photo), ("mask", mask)) if value is not None]
        settings = repeatable(settings, self.base.fingerprint, adapter, given)
        chosen = {field.name: settings[field.name] for field in dataclasses.fields(EditSettings)}
        prompt, negative_prompt, seed = (settings[name] for name in ("prompt", "negative_prompt", "seed"))
        trained = not prompt  # only reconstructions have none
        run = self._run(adapter, prompt, negative_prompt, photo, [seed], chosen, trained=trained, mask=mask)
        ((edit,),) = run
        return edit

    @_one_at_a_time
    @torch.no_grad()
    def photo_round_trip(self, adapter: Adapter | str | Path) -> Image.Image:
        """Decodes the photo's latents in an adapter: the autoencoder's reconstruction, an upper bound for edits.

        Args:
            adapter: An adapter with its photo's latents.

        Raises:
            SettingError: The adapter doesn't hold its photo.
            AdapterFileError: The adapter was made for another base.
        """
        opened = self._opened(adapter)
        if opened is None or opened.photo_latents is None:
            raise SettingError("the adapter doesn't hold its photo; fit it again with embed_photo=True")
        check_fits(opened, self.base)
        return to_image(self.base.decode(checked_photo(opened, self.base))[0])

    @_one_at_a_time
    def release(self) -> None:
        """Restores the base as it was before the first edit, bit for bit."""
        self._mount.release()

    @_one_at_a_time
    def open(self, place: str | Path, trigger: str | None = None) -> Adapter:
        """Loads an adapter as `Adapter.load` does; recently used ones stay in memory."""
        return self._cache.open(place, trigger)

    def _opened(self, adapter: Any) -> Adapter | None:
        """Returns an adapter in memory; a path is loaded."""
        if isinstance(adapter, (str, Path)):
            return self.open(adapter)
        if adapter is None or isinstance(adapter, Adapter):
            return adapter
        raise SettingError(
            f"adapter = {type(adapter).__name__} isn't allowed; give what fit returns, or a file's path"
        )

    @_one_at_a_time
    @torch.no_grad()
    def pixels(
        self,
        adapter: Adapter | None,
        texts: Sequence[str],
        negative_prompt: str,
        start: Start | None,
        seeds: Sequence[int],
        settings: EditSettings,
        trained: bool = False,
        checked: bool = True,
    ) -> Tensor:
        """Samples a batch of images from complete prompts and settings, for one thread at a time.

        Args:
            adapter: The adapter; None for the plain base.
            texts: Complete prompts, including rare tokens.
            negative_prompt: Prompt of the unconditional prediction of guidance.
            start: The photo to start from, as `starting_point` returns it; None samples without one.
            seeds: Seeds of the noise, one for each prompt.
            settings: Sampling settings.
            trained: Whether adapter_scale is a factor of the trained strength, instead of that in the file.
            checked: Whether a sample that isn't finite is an error; otherwise its image is NaN.

        Returns:
            Images (len(texts), 3, height, width) float32 in [0, 1].
        """
        if start is None:
            start = Start(adapter.size_on(self.base) if adapter else self.base.size)
        size, photo, scale = start.size, start.photo, settings.adapter_scale
        doubted = self._doubt(photo, size) if settings.details and photo is not None else None
        self._mount.use(adapter, adapter.trained_scale(scale) if adapter and trained else scale)
        condition = functools.partial(self.base.condition, clip_skip=settings.clip_skip)
        once: dict[str, Condition] = {text: condition(text) for text in dict.fromkeys(texts)}
        conditional = joined(*(once[text] for text in texts))
        words = (adapter.rare_tokens if adapter else None) or ""
        needs_rare = settings.residual or settings.unconditional == "rare"
        rare = condition(words) if needs_rare else None
        if settings.unconditional == "rare" and rare is not None:
            empty = rare
        else:
            is_base = settings.unconditional == "base"
            with layers.adapters_disabled(self.base) if is_base else contextlib.nullcontext():
                empty = condition(negative_prompt)
        source = rare if settings.residual else None
        x0 = sample_edit(self.base, size, conditional, source, empty, photo, seeds, settings)
        images = self.base.decode(x0)
        finite = are_finite(images)
        if checked and not finite.all():
            raise not_finite([seeds[index] for index in (~finite).nonzero()], len(seeds))
        if doubted is not None and photo is not None:
            redraw = self.base.decode(photo)
            shown = redraw if start.pixels is None else start.pixels.to(redraw)
            images = restore(shown, redraw, images.nan_to_num(0, 0, 0), doubted)
        return images.masked_fill(~finite[:, None, None, None], torch.nan)

    def _doubt(self, photo: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns how wrong the plain base is about each place of a photo, cached for the last one."""
        if self._doubted is None or not torch.equal(self._doubted[0], photo):
            with self._mount.plain():
                self._doubted = photo, doubt(self.base, size, photo, self.base.condition(""))
        return self._doubted[1]

    def _run(
        self,
        adapter: Adapter | str | Path | None,
        prompt: str,
        negative_prompt: str | None,
        photo: PhotoSource | None,
        seeds: Sequence[int],
        chosen: dict[str, Any],
        batch_size: int = 1,
        trained: bool = False,
        mask: PhotoSource | None = None,
    ) -> Iterator[list[Edit]]:
        """Checks the settings, samples in batches, and yields the edits of each."""
        started = time.perf_counter()
        adapter = self._opened(adapter)
        if adapter is not None:
            check_fits(adapter, self.base)
        settings = chosen_settings(self.base, adapter, photo is not None, chosen)
        for seed in seeds:
            check_whole("seed", seed, 0)
        negative_prompt = checked_text("negative_prompt", negative_prompt)
        text = complete_prompt(adapter, prompt)
        notes = [f"the adapter: {note}" for note in adapter.notes] if adapter else []
        with self._lock:
            notes += prompt_notes(self.base, prompt=text, negative_prompt=negative_prompt)
            start = starting_point(self.base, adapter, photo, settings, mask)
        size, notes = start.size, [*notes, *settings_notes(settings, negative_prompt), *start.notes]
        record = recorded(self.base, adapter, prompt, negative_prompt, start, settings)
        failed, left = list[int](), list(seeds)
        if self.base.device.type == "cpu":
            batch_size = max(1, min(batch_size, _CPU_BATCH_PIXELS // (size[0] * size[1])))
        while left:
            batch = left[:batch_size]
            texts = [text] * len(batch)
            try:
                images = self.pixels(adapter, texts, negative_prompt, start, batch, settings, trained, False)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise out_of_memory(size) from None
                batch_size = len(batch) // 2
                continue
            finite = are_finite(images)
            failed += [seed for seed, is_finite in zip(batch, finite, strict=True) if not is_finite]
            kept = [{**record, "seed": seed} for seed in batch if seed not in failed]
            with self._lock:
                edits = finished(self.base, images[finite], text, start, settings)
            seconds = (time.perf_counter() - started) / len(batch)
            yield [edit.made(values, seconds, notes) for edit, values in zip(edits, kept, strict=True)]
            left, started = left[len(batch) :], time.perf_counter()
        if failed:
            raise not_finite(failed, len(seeds))
