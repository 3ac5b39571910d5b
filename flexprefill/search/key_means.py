"""KeyMeans: the block means of a prompt that comes in chunks, kept from one chunk to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.runtime.layout import layout_hint
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search import operator


class _Kind(NamedTuple):
    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    block_size: int
    implementation: str


class _Held(NamedTuple):
    kind: _Kind
    means: Tensor
    kv_len: int


class KeyMeans:
    """The means of one layer's key blocks, for a prompt that is searched chunk by chunk.

        means = KeyMeans()  # one for each layer and prompt
        for start in range(0, length, chunk):
            end = start + chunk
            seen = key[:, :, :end], value[:, :, :end]
            prefill_attention(query[:, :, start:end], *seen, config, last_chunk=end >= length, means=means)

    A search needs the means of all keys so far. With this object each chunk pools its own keys alone, and those of a
    block that the last chunk left short. It holds key's dtype [B, Hkv, N, D], one value for each ``block_size`` of
    the keys. The keys of earlier chunks must not change.

    Chunks of whole blocks give the map of a search in one go, bit for bit, if the last one has at least
    ``last_full_blocks`` query blocks: those of an earlier chunk were not known to be among the last.
    """

    def __init__(self) -> None:
        self._held: _Held | None = None  # replaced as a whole, so that no thread sees half of it

    @property
    def kv_len(self) -> int:
        """How many keys the means are of."""
        return 0 if self._held is None else self._held.kv_len

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._held is None else self._held.means.nbytes

    def extend(self, key: Tensor, block_size: int, implementation: str) -> Tensor:
        """The means of all blocks of ``key`` [B, Hkv, S_kv, D]: [B, Hkv, N, D], pooled where they are not known.

        Raises:
            ValueError: key has fewer tokens than before, or other heads, dimensions, dtype, device or block size.
        """
        if is_tracing():
            raise ValueError("means cannot be used inside torch.compile, whose graphs keep no state: pass None there")
        kind = _Kind(key.shape[0], key.shape[1], key.shape[3], key.dtype, key.device, block_size, implementation)
        held, kv_len, known = self._held, key.shape[2], 0
        if held is not None:
            for name, ours, got in zip(_Kind._fields, held.kind, kind, strict=True):
                if got != ours:
                    raise ValueError(
                        f"means is of keys with {name} {ours}, got {got}: it belongs to one layer and prompt"
                        f"{layout_hint(key=key)}"
                    )
            if kv_len < held.kv_len:
                raise ValueError(
                    f"key must have all {held.kv_len} tokens that means is of, got S_kv={kv_len}: "
                    "a new prompt needs a new KeyMeans"
                )
            known = held.kv_len // block_size
            if known * block_size == kv_len:
                return held.means
        means = operator.pool_keys(key[:, :, known * block_size :], block_size, implementation)
        if held is not None and known:
            means = torch.cat([held.means[:, :, :known], means], 2)
        self._held = _Held(kind, means, kv_len)
        return means


def check_means(means: KeyMeans | None) -> None:
    """Raises TypeError unless it is a KeyMeans or None."""
    if not (means is None or isinstance(means, KeyMeans)):
        raise TypeError(f"means must be a KeyMeans, got {type(means).__name__}")
