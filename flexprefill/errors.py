"""The library's own exceptions. One more, NotEnoughMemoryError, is torch's as well: runtime/memory.py has it."""


class FlexPrefillError(Exception):
    """Base of the library's own errors."""


class UnsupportedError(FlexPrefillError, ValueError):
    """The arguments are valid, but ask for something that cannot be done here. The message says what can."""


class RanEagerlyError(FlexPrefillError):
    """FlexAttention was about to run without torch.compile, and would be dense. Switch torch.compile on again."""


class MaskFileError(FlexPrefillError):
    """A mask file is missing, cut off, of another kind, of a newer format or inconsistent."""
