"""A prompt's tokens as the caller has them, to what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def token_tensor(token_ids: Tensor | Sequence[int]) -> Tensor:
    """A prompt's tokens on the CPU, of any shape; TypeError unless they are whole numbers."""
    import torch

    try:
        tokens = torch.as_tensor(token_ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"token_ids must be a tensor or list of whole numbers, got {type(token_ids).__name__}"
        ) from error
    # an empty list is of no dtype
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        raise TypeError(f"token_ids must be whole numbers, got {tokens.dtype}")
    return tokens
