"""The mask function's answer: a mask for flexprefill's attention alone, which nobody can take for another mask.

transformers' own mask functions answer None for "causal". An attention that does not know this takes None for
"everything is seen". A PromptMask is an object instead. A model that computes its attention itself does arithmetic with
its mask, and gets an error that explains.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill.errors import UnsupportedError
from flexprefill.integrations.prompts import BLOCK_SIZE, Prompts

OWN_ATTENTION = (
    "attention_mask is flexprefill's, and the model does not hand it to flexprefill's attention: its class computes "
    "(a part of) its attention itself. flexprefill needs models whose attention goes through transformers' "
    "AttentionInterface, as in Llama, Qwen, Mistral, Gemma and most others. Load this one with "
    'attn_implementation="sdpa" or "eager"'
)


class NotOurAttentionError(UnsupportedError, AttributeError):
    """A PromptMask was used as a tensor."""


class PromptMask(BlockMask):
    """The mask of prompts, for the queries and keys that transformers counted. Only flexprefill's attention reads it.

    It is a BlockMask because transformers passes a mask made in advance on to the model if it is one. Its lists are
    made when somebody asks for them.

    Attributes:
        prompts: Where the prompts lie; also the mask_mod.
        shape: [B, 1, queries, keys]. The number of keys is the one that the cache announced.
    """

    def __init__(self, prompts: Prompts, q_len: int, kv_len: int) -> None:
        self.prompts = self.mask_mod = prompts
        self.seq_lengths = q_len, kv_len
        self.BLOCK_SIZE = BLOCK_SIZE, BLOCK_SIZE

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.prompts.batch, 1, *self.seq_lengths)

    @property
    def ndim(self) -> int:
        """The number of dimensions. Models tell a mask made from padding by it."""
        return 4

    def dim(self) -> int:
        """As ndim."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def to(self, device: torch.device | str, **_: Any) -> PromptMask:
        """Itself. Its parts are on the host, or on the device of a compiled graph's inputs."""
        return self

    def check_lengths(self, query: Tensor, key: Tensor) -> None:
        """Raises UnsupportedError unless query and key have the sizes that the mask was made for."""
        q_len, kv_len = self.seq_lengths
        if query.shape[2] != q_len or key.shape[2] != kv_len or query.shape[0] != self.prompts.batch:
            raise UnsupportedError(
                f"key must have the length that past_key_values told the mask: the mask is for a batch of "
                f"{self.prompts.batch}, {q_len} queries and {kv_len} keys, but attention got a batch of "
                f"{query.shape[0]}, {query.shape[2]} queries and {key.shape[2]} keys. A cache that records its past "
                "(activate_past_recording) has to be cropped after each call, crop(0) at least"
            )

    def __getitem__(self, index: Any) -> PromptMask:
        """Itself for slices of everything, as models take them. No smaller part is a mask."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) > 4 or not all(map(_is_everything, parts, self.shape)):
            _refuse()
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in BlockMask.__annotations__:
            _refuse()
        made = self.prompts.to_block_mask(self.seq_lengths[0])
        self.__dict__.update({**vars(made), **self.__dict__})
        return self.__dict__[name]

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        _refuse()

    def _arithmetic(self, *_: Any) -> NoReturn:
        _refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _arithmetic
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __neg__ = __lt__ = __gt__ = __le__ = __ge__ = _arithmetic

    def __eq__(self, other: object) -> bool:
        return _refuse() if isinstance(other, (int, float, Tensor)) else self is other

    __hash__ = object.__hash__
    __bool__ = __float__ = __int__ = __len__ = __iter__ = _arithmetic

    def __repr__(self) -> str:
        return f"PromptMask(shape={self.shape})"

    __str__ = __repr__


def _is_everything(part: Any, size: int) -> bool:
    return isinstance(part, slice) and len(range(*part.indices(size))) == size


def _refuse() -> NoReturn:
    raise NotOurAttentionError(OWN_ATTENTION)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that every attention reads alike: numbers to add to the scores, 0 for True, else the lowest number.

    An attention that adds its mask to the scores would take bools for numbers.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)
