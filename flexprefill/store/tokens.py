"""A prompt's tokens as the caller has them: numbers to compare, and the text of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def check_token_texts(tokens: Sequence[str]) -> list[str]:
    """A prompt's text by token as a list; TypeError unless it is some strings, ValueError if there is none."""
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise TypeError(f"tokens must be a list of strings, one for each token, got {type(tokens).__name__}")
    for text in tokens:
        if not isinstance(text, str):
            raise TypeError(f"tokens must be strings, got {type(text).__name__}: decode each id by itself")
    if not tokens:
        raise ValueError("tokens must hold at least one token, got none")
    return list(tokens)


def check_tokens_fit(count: int, layer: int, sizes: Mapping[str, Any]) -> None:
    """Raises ValueError unless so many tokens are the one prompt of a layer of these sizes."""
    batch, _ = sizes["shape"]
    if batch != 1:
        raise ValueError(f"tokens are those of one prompt, but layer {layer} has {batch} batch entries")
    if count != sizes["kv_len"]:
        raise ValueError(f"tokens must be one for each key, {sizes['kv_len']} in layer {layer}, got {count}")
