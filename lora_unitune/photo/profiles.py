"""Color profiles: a photo's own colors <-> sRGB, at 8 bits by Pillow and at 16 bits here."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from lora_unitune.photo.depth import strips

_LEVELS: NDArray[np.float64] = np.linspace(0, 1, 65_536)
_DECODED = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(
    np.float32
)
"""Linear value of each level of sRGB."""

PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, struct.error)
"""Exceptions on damaged profiles."""


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts an image of 8 bits to RGB in sRGB.

    Args:
        image: The image.
        profile: Its color profile; one of another kind of colors doesn't count, as in other programs.

    Raises:
        PROFILE_ERRORS: The profile is damaged.
    """
    if image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode == "LAB":
        return _transformed(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if profile:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = embedded.profile.xcolor_space.strip()
        if image.mode == "L" and space != "GRAY":
            image = image.convert("RGB")
        if space == {"L": "GRAY"}.get(image.mode, image.mode):
            return _transformed(image, embedded)
    return image.convert("RGB")


def in_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts an sRGB image of 8 bits to an RGB profile; raises PROFILE_ERRORS if it is damaged."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), own, outputMode="RGB")
    return converted or image


def _transformed(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Converts from a color profile to sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    # the optimized table darkens dark grays
    exact = ImageCms.Flags.NOOPTIMIZE if image.mode == "L" else ImageCms.Flags.NONE
    converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB", flags=exact)
    return image.convert("RGB") if converted is None else converted


def is_rgb(profile: bytes | None) -> bool:
    """Returns whether a color profile describes RGB colors."""
    return profile is not None and profile[16:20] == b"RGB "


class DeepProfile:
    """The conversion of 16-bit pixels, which Pillow doesn't do: by the curves and primaries of most profiles."""

    def __init__(self, profile: bytes) -> None:
        """Reads a profile of RGB or gray (ICC.1:2010, sections 8 to 10).

        Raises:
            ValueError: It has tables instead, or it is damaged.
        """
        tags = _tags(profile)
        if b"A2B0" in tags:
            raise ValueError("it has tables")
        self._curves = [_curve(tags, f"{color}TRC") for color in ("rgb" if is_rgb(profile) else "k")]
        self._matrix = np.eye(3, dtype=np.float32)
        if is_rgb(profile):
            srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
            self._matrix = np.linalg.solve(_primaries(_tags(srgb)), _primaries(tags))
        if abs(np.linalg.det(self._matrix)) < 1e-6:
            raise ValueError("it is damaged")

    def to_srgb(self, values: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Converts pixels of the profile, (height, width, 3), to sRGB; colors outside it are clipped."""
        out = np.empty_like(values)
        for rows in strips(*values.shape[:2]):
            linear = np.stack(
                [self._curves[i % len(self._curves)][values[rows][..., i]] for i in range(3)], -1
            )
            linear = (linear @ self._matrix.T).clip(0, 1)
            encoded = np.where(
                linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
            )
            out[rows] = (encoded * 65_535).round()
        return out

    def from_srgb(self, values: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Converts sRGB pixels, (height, width, 3), to the RGB profile; colors outside it are clipped."""
        out, back = np.empty_like(values), np.linalg.inv(self._matrix).T
        for rows in strips(*values.shape[:2]):
            linear = _DECODED[values[rows]] @ back
            for i, curve in enumerate(self._curves):
                out[rows][..., i] = (np.interp(linear[..., i], curve, _LEVELS) * 65_535).round()
        return out


def _tags(profile: bytes) -> dict[bytes, bytes]:
    """Returns the content of each tag of a profile."""
    try:
        (count,) = struct.unpack(">I", profile[128:132])
        entries = [struct.unpack(">4sII", profile[at : at + 12]) for at in range(132, 132 + 12 * count, 12)]
    except struct.error:
        raise ValueError("it is damaged") from None
    return {name: profile[start : start + size] for name, start, size in entries}


def _primaries(tags: Mapping[bytes, bytes]) -> NDArray[np.float32]:
    """Returns the matrix from linear colors to XYZ, relative to D50."""
    try:
        columns = [struct.unpack(">3i", tags[name][8:20]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    except (KeyError, struct.error):
        raise ValueError("it is damaged") from None
    return (np.array(columns).T / 65_536).astype(np.float32)


def _curve(tags: Mapping[bytes, bytes], name: str) -> NDArray[np.float32]:
    """Returns the linear value of each of 65,536 levels, by a tag of type "curv" or "para"; it has to rise."""
    try:
        values = _curve_values(tags[name.encode()])
    except (KeyError, ZeroDivisionError, OverflowError, struct.error):
        raise ValueError("it is damaged") from None
    if not np.isfinite(values).all() or (np.diff(values) < 0).any() or values[-1] <= values[0]:
        raise ValueError("its curves don't rise")
    curve: NDArray[np.float32] = values.clip(0, 1).astype(np.float32)
    return curve


def _curve_values(tag: bytes) -> NDArray[np.float64]:
    if tag[:4] == b"curv":
        (count,) = struct.unpack(">I", tag[8:12])
        table = np.array(struct.unpack(f">{count}H", tag[12 : 12 + 2 * count]), np.float64)
        if count == 1:
            return np.asarray(_LEVELS ** (table[0] / 256))
        places = np.linspace(0, 1, count)
        return np.asarray(np.interp(_LEVELS, places, table / 65_535)) if count else _LEVELS
    if tag[:4] != b"para":
        raise ValueError("its curves are of an unknown kind")
    forms: dict[int, Callable[..., tuple[float, ...]]] = {
        0: lambda g: (g, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        1: lambda g, a, b: (g, a, b, 0.0, -b / a, 0.0, 0.0),
        2: lambda g, a, b, c: (g, a, b, 0.0, -b / a, c, c),
        3: lambda g, a, b, c, d: (g, a, b, c, d, 0.0, 0.0),
        4: lambda *seven: seven,
    }
    (kind,) = struct.unpack(">H", tag[8:10])
    count = (1, 3, 4, 5, 7)[kind] if kind < 5 else 0
    numbers = struct.unpack(f">{count}i", tag[12 : 12 + 4 * count])
    g, a, b, c, d, e, f = forms[kind](*(number / 65_536 for number in numbers))
    values: NDArray[np.float64] = np.where(
        d <= _LEVELS, np.maximum(a * _LEVELS + b, 0) ** g + e, c * _LEVELS + f
    )
    return values
