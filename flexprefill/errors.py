"""The library's own exceptions."""

import torch


class FlexPrefillError(ValueError):
    """Base of the errors that a caller may want to catch as the library's own."""


class NotEnoughMemoryError(FlexPrefillError, torch.OutOfMemoryError):
    """A search, or the lists of a map, do not fit: nothing was begun, and the message says what would fit."""


class MaskFileError(FlexPrefillError):
    """A mask file that is missing, truncated, of another kind, of a newer format or inconsistent."""
