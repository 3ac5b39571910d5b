"""Terms: what a call adds to plain causal attention, for the search and the attention alike."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from flexprefill.sequences import Sequences, check_sequences


class Terms(NamedTuple):
    """Checked arguments of one call. ``sliding_window`` and ``soft_cap`` are 0 where there is none."""

    sequences: Sequences | None = None
    sliding_window: int = 0
    soft_cap: float = 0.0
    alibi_slopes: Tensor | None = None

    @classmethod
    def checked(
        cls,
        query: Tensor,
        key: Tensor,
        sequences: Sequences | None,
        sliding_window: int | None,
        soft_cap: float | None,
        alibi_slopes: Tensor | None,
    ) -> Terms:
        """Raises unless the arguments fit query and key."""
        check_sequences(sequences, key)
        if sliding_window is not None:
            if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
                raise TypeError(f"sliding_window must be an int or None, got {sliding_window!r}")
            if not 1 <= sliding_window < 2**31:
                raise ValueError(f"sliding_window must be at least 1 key and below 2**31, got {sliding_window}")
        if soft_cap is not None:
            if isinstance(soft_cap, bool) or not isinstance(soft_cap, (int, float)):
                raise TypeError(f"soft_cap must be a number or None, got {soft_cap!r}")
            if not 0 < soft_cap < math.inf:
                raise ValueError(f"soft_cap must be positive and finite, got {soft_cap}")
        if alibi_slopes is not None:
            check_per_head("alibi_slopes", alibi_slopes, query)
        return cls(sequences, sliding_window or 0, float(soft_cap or 0), alibi_slopes)

    @property
    def given(self) -> list[str]:
        """The names of the arguments that were given."""
        return [name for name, term in self._asdict().items() if isinstance(term, (Sequences, Tensor)) or term]


PLAIN = Terms()


def check_per_head(name: str, tensor: Tensor, query: Tensor) -> None:
    """Raises unless it holds a number for each query head, on query's device."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of floats [Hq], got {got}")
    if tensor.shape != query.shape[1:2]:
        raise ValueError(f"{name} must be [Hq] with Hq={query.shape[1]}, got {list(tensor.shape)}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
