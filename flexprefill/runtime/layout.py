"""The layout of a caller's tensors is [B, H, S, D]: hints where one looks as if it were [B, S, H, D]."""

from __future__ import annotations

import sys
import warnings

from torch import Tensor

from flexprefill.runtime.tracing import is_tracing

UNLIKELY_HEADS = 256  # fewer tokens than so many heads may be a short prompt


def layout_hint(**tensors: Tensor) -> str:
    """The end of an error about shapes: a hint for the first tensor that has more heads than tokens, or nothing."""
    for name, tensor in tensors.items():
        if tensor.dim() == 4 and tensor.shape[1] > tensor.shape[2]:
            return f"; if {name} {list(tensor.shape)} is [B, S, H, D], pass {name}.transpose(1, 2)"
    return ""


def has_unlikely_heads(query: Tensor) -> bool:
    """Whether it has more heads than a model has, and fewer tokens than heads."""
    return query.shape[1] > max(UNLIKELY_HEADS, query.shape[2])


def warn_of_layout(query: Tensor) -> None:
    """Warns where the shapes fit together, but a query has unlikely heads."""
    if is_tracing() or not has_unlikely_heads(query):
        return
    B, H, S, D = query.shape
    warnings.warn(
        f"query [B={B}, H={H}, S={S}, D={D}] has more heads than tokens{layout_hint(query=query)}",
        stacklevel=_frames_of_ours(),
    )


def _frames_of_ours() -> int:
    """The stacklevel for a warning of this function's caller: the first frame outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("flexprefill."):
        frame, level = frame.f_back, level + 1
    return level
