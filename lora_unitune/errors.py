"""The errors a user can meet.

Every message is one complete line: what was given, what is allowed, and what to do next.
"""

from __future__ import annotations


class UnituneError(Exception):
    """Base of every error this package raises on purpose; its message is one line for the user."""


class PhotoError(UnituneError):
    """The photo can't be read, or can't be used at the base's resolution."""


class RecipeError(UnituneError):
    """A recipe has an unknown key, a value out of range, or doesn't suit the base."""


class BaseModelError(UnituneError):
    """The base model is unknown, broken, or of a kind that isn't supported."""


class AdapterFileError(UnituneError):
    """An adapter file is damaged, isn't an adapter, or was made for another base."""


class PromptError(UnituneError):
    """The prompt or the rare tokens can't be used with the base's tokenizer."""


class SettingError(UnituneError):
    """A setting of a fit or an edit is impossible, alone or together with the others."""


class OutputError(UnituneError):
    """The result can't be written where it was asked for."""


class HubError(UnituneError):
    """The hub can't be reached, refuses, or hasn't what was asked for."""


class DeviceError(UnituneError):
    """The device isn't there, or can't do what was asked of it."""
