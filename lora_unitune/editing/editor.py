"""Editing: base + adapter + prompt -> images (UniTune, arXiv 2210.09477, section 3)."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.cache import AdapterCache
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.adapter.suits import check_fits, checked_photo
from lora_unitune.editing.batches import in_batches
from lora_unitune.editing.failures import are_finite, not_finite
from lora_unitune.editing.finish import finished
from lora_unitune.editing.prompts import check_prompt, checked_text
from lora_unitune.editing.record import Edit, as_one, check_same, repeatable, to_image
from lora_unitune.editing.request import Request, requested
from lora_unitune.editing.sampling import conditions, doubt, sample_edit
from lora_unitune.editing.start import Start, check_starts_from_photo, chosen_settings
from lora_unitune.errors import SettingError
from lora_unitune.families import Base, BaseFiles, load_base
from lora_unitune.photo.details import restore
from lora_unitune.photo.opening import PhotoSource
from lora_unitune.photo.reading import Photo
from lora_unitune.settings import EditSettings, check_whole

F = TypeVar("F", bound=Callable[..., Any])

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
        photo: PhotoSource | Photo | Edit | None = None,
        mask: PhotoSource | None = None,
        then: str | Sequence[str] = (),
        seed: int = 0,
        **settings: Any,
    ) -> Edit:
        """Edits the adapter's photo according to a prompt.

        Args:
            adapter: Adapter of the photo, or the path of its file; None samples from the plain base, without
                rare tokens.
            prompt: Description of the edited image; the rare tokens are prepended.
            negative_prompt: Prompt of the unconditional prediction of guidance, instead of the empty prompt.
            photo: The photo to start from, instead of the one in the adapter file; the image has its size. Or an
                edit, to edit that.
            mask: An image of the photo's shape: white parts may change, gray ones partly, black ones don't.
            then: Prompts of further turns, each of which edits the edit before it.
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
        given: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "photo": photo,
            "mask": mask,
            "then": then,
        }
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
        photo: PhotoSource | Photo | Edit | None = None,
        mask: PhotoSource | None = None,
        then: str | Sequence[str] = (),
        batch_size: int = 1,
        **settings: Any,
    ) -> Iterator[list[Edit]]:
        """Yields the edits of each batch as soon as it is sampled; arguments and errors are those of `edits`."""
        if isinstance(seeds, int):
            raise SettingError(f"seeds = {seeds} isn't allowed; give a list, such as [{seeds}]")
        check_whole("batch_size", batch_size, 1)
        turns = [then] if isinstance(then, str) else list(then)
        for text in (prompt, *turns):
            check_prompt(text)
        arguments = (negative_prompt, mask, settings)
        request = self._requested(adapter, prompt, photo, *arguments)
        if turns:
            check_starts_from_photo(chosen_settings(self.base, request.adapter, True, settings))
        for batch in self._run(request, seeds, batch_size):
            yield [self._continued(edit, request, turns, *arguments) for edit in batch] if turns else batch

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
        ((edit,),) = self._run(self._requested(adapter, "", None, "", None, settings), [seed], trained=True)
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
            settings: Settings of the edit, from `Edit.settings` or `read_settings`; all of its turns are repeated.
            photo: Photo that the edit started from, if it wasn't the one in the adapter file.
            mask: Its mask, if it had one.

        Raises:
            SettingError: A setting is missing or wrong, or the edit was made with another base, adapter or
                photo.
            UnituneError: As for `edit`.
        """
        opened = self._opened(adapter)
        given = [name for name, value in (("photo", photo), ("mask", mask)) if value is not None]
        edits = list[Edit]()
        for turn in repeatable(settings, self.base.fingerprint, opened, given):
            chosen = {field.name: turn[field.name] for field in dataclasses.fields(EditSettings)}
            start = edits[-1] if edits else photo if turn["photo"] == "given" else None
            arguments = (turn["negative_prompt"], mask if turn["mask"] else None, chosen)
            words = checked_text("rare_tokens", turn["rare_tokens"])
            worded = opened and dataclasses.replace(opened, rare_tokens=words)
            request = self._requested(worded, turn["prompt"], start, *arguments)
            check_same(request.record, turn)
            trained = not turn["prompt"]  # only reconstructions have none
            ((edit,),) = self._run(request, [turn["seed"]], trained=trained)
            edits.append(edit)
        return as_one(edits)

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
        words = (adapter.rare_tokens if adapter else None) or ""
        conditional, source, empty = conditions(self.base, texts, words, negative_prompt, settings)
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

    def _requested(self, adapter: Adapter | str | Path | None, *arguments: Any) -> Request:
        """Returns what an edit is asked for, see `requested`, for one thread at a time."""
        opened = self._opened(adapter)
        with self._lock, torch.no_grad():
            return requested(self.base, opened, *arguments)

    def _run(
        self, request: Request, seeds: Sequence[int], batch_size: int = 1, trained: bool = False
    ) -> Iterator[list[Edit]]:
        """Samples in batches, and yields the edits of each."""
        sample = functools.partial(self._sampled, trained)
        return in_batches(request, seeds, batch_size, self.base.device.type == "cpu", sample)

    @_one_at_a_time
    def _sampled(self, trained: bool, request: Request, seeds: Sequence[int]) -> tuple[list[Edit], Tensor]:
        """Returns a batch's finite edits, without what is recorded of them, and which are finite, (b,) bool."""
        start, settings, texts = request.start, request.settings, [request.text] * len(seeds)
        arguments = (request.adapter, texts, request.negative_prompt, start, seeds, settings)
        images = self.pixels(*arguments, trained, checked=False)
        finite = are_finite(images)
        return finished(self.base, images[finite], request.text, start, settings), finite

    def _continued(self, first: Edit, request: Request, then: Sequence[str], *arguments: Any) -> Edit:
        """Returns an edit of an edit, and so on, a turn for each prompt, with its seed and its settings."""
        turns, seeds = [first], [first.settings["seed"]]
        for prompt in then:
            ((edit,),) = self._run(self._requested(request.adapter, prompt, turns[-1], *arguments), seeds)
            turns.append(edit)
        return as_one(turns)
