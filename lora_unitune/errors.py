"""The exceptions of this package.

Every message is one complete line: the wrong value, what is allowed, and what to do next. Each class is a
ValueError or an OSError too, so that callers can catch these without importing this package.
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
    """A fit can't continue: its loss is no longer finite, or there isn't enough memory."""


class DeviceError(UnituneError, ValueError):
    """The device isn't available, or doesn't support what was requested."""


class OutputError(UnituneError, OSError):
    """The output can't be written to the requested path."""


class HubError(UnituneError, OSError):
    """The hub can't be reached, refuses the request, or has no such repository or file."""


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Returns a text or an error's message as one line of at most `limit` characters that are safe to print.

    Libraries quote the content of files in their messages, control characters included.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
