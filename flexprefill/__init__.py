"""FlashPrefill block search for long prompts, as BlockMasks for PyTorch's FlexAttention.

The public names are those of ``flexprefill.api``. Python loads them, and torch, when the first one is asked for: a
command that only reads a file's header starts without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexprefill._version import __version__ as __version__

if TYPE_CHECKING:
    from flexprefill.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Makes all public names attributes, and returns this one (PEP 562)."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        api = importlib.import_module("flexprefill.api")  # from … import asks this function for api first
    except AttributeError as error:  # as of a torch that lacks something: Python would hide it behind this name
        raise ImportError(f"flexprefill cannot be loaded: {error}") from error
    names = globals()
    for public in ("__all__", *api.__all__):
        names.setdefault(public, getattr(api, public))  # what a caller put in its place stays
    if name not in names:  # nor a subpackage that is loaded by now
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return names[name]


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))
