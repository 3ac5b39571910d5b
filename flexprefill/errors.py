"""The library's own exceptions. One more, NotEnoughMemoryError, is torch's as well: runtime/memory.py has it."""


class FlexPrefillError(Exception):
    """Base of the errors that a caller may want to catch as the library's own."""


class UnsupportedError(FlexPrefillError, ValueError):
    """Arguments that are right in themselves ask for what cannot be done here; the message says what can."""


class RanEagerlyError(FlexPrefillError):
    """FlexAttention was about to run without torch.compile, dense; torch.compile has to be switched on again."""


class MaskFileError(FlexPrefillError):
    """A mask file that is missing, truncated, of another kind, of a newer format or inconsistent."""
