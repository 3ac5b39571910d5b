"""The library's own exceptions."""


class FlexPrefillError(ValueError):
    """Base of the errors that a caller may want to catch as the library's own."""


class MaskFileError(FlexPrefillError):
    """A mask file that is missing, truncated, of another kind, of a newer format or inconsistent."""
