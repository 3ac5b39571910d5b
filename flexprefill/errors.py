"""The library's own exceptions."""

import torch


class FlexPrefillError(Exception):
    """Base of the library's own errors."""


class UnsupportedError(FlexPrefillError, ValueError):
    """Each argument is right, but together they cannot be done here. The message says what can be done."""


class RanEagerlyError(FlexPrefillError):
    """FlexAttention was about to run without torch.compile, so dense. Switch torch.compile on again."""


class NotEnoughMemoryError(FlexPrefillError, torch.OutOfMemoryError):
    """A search or the lists of a map do not fit into memory. Nothing was begun. The message says what would fit."""


class MaskFileError(FlexPrefillError):
    """A mask file is missing, cut off, of another kind, of a newer format or inconsistent."""
