"""The errors a user can meet.

Every message is one complete line: what was given, what is allowed, and what to do next. Each kind of error is
a ValueError or an OSError too, so that programs which know neither can still tell them apart.
"""

from __future__ import annotations


class UnituneError(Exception):
    """Base of every error this package raises on purpose; its message is one line for the user."""


class PhotoError(UnituneError, ValueError):
    """The photo can't be read, or can't be used with the base."""


class RecipeError(UnituneError, ValueError):
    """A recipe has an unknown key, a value out of range, or doesn't suit the base."""


class BaseModelError(UnituneError, ValueError):
    """The base model is unknown, broken, or of a kind that isn't supported."""


class AdapterFileError(UnituneError, ValueError):
    """An adapter file is damaged, isn't an adapter, or was made for another base."""


class PromptError(UnituneError, ValueError):
    """The prompt or the rare tokens can't be used with the base's tokenizer."""


class SettingError(UnituneError, ValueError):
    """A setting of a fit or an edit is impossible, alone or together with the others."""


class FitError(UnituneError, ValueError):
    """A fit can't go on: its loss is no longer finite, or memory doesn't suffice."""


class DeviceError(UnituneError, ValueError):
    """The device isn't there, or can't do what was asked of it."""


class OutputError(UnituneError, OSError):
    """The result can't be written where it was asked for."""


class HubError(UnituneError, OSError):
    """The hub can't be reached, refuses, or hasn't what was asked for."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Returns an error's message as one line of at most `limit` characters that are safe to print.

    Libraries quote what they found in a file, control characters included.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
