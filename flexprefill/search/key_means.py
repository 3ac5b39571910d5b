"""KeyMeans: what a search takes of a prompt's key blocks, kept from one chunk to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexprefill.runtime.layout import layout_hint
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search.operator import Sketch, sketch_keys
from flexprefill.search.page_means import PageMeans
from flexprefill.search.rule import Rule
from flexprefill.variant.paged_kv import PagedKV


class KeyMeans:
    """The means of one layer's key blocks, and their outlier keys, for a prompt that is searched chunk by chunk.

        means = KeyMeans()  # one for each layer and prompt
        for start in range(0, length, chunk):
            end = start + chunk
            seen = key[:, :, :end], value[:, :, :end]
            prefill_attention(query[:, :, start:end], *seen, config, last_chunk=end >= length, means=means)

    A search needs the means of all keys so far. With this object a chunk pools only its own keys, and the keys of a
    block that the last chunk left short. It holds one vector for each ``block_size`` keys, [B, Hkv, N, D] in key's
    dtype, and ``outlier_keys`` more where the config asks for them. The keys of earlier chunks must not change.

    Chunks of whole blocks give the map of a search in one go, bit for bit, if the last chunk has at least
    ``last_full_blocks`` query blocks. A search of an earlier chunk cannot know which blocks are the prompt's last.
    """

    def __init__(self) -> None:
        # what the means are of, the means and the keys' length: replaced together, so no thread sees half of it
        self._held: tuple[dict[str, Any], Sketch, int] | None = None

    @property
    def kv_len(self) -> int:
        """How many keys the means are of."""
        return 0 if self._held is None else self._held[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._held is None else sum(part.nbytes for part in self._held[1] if part is not None)

    def of_all(self, kv_len: int) -> Tensor | None:
        """The means of all blocks of kv_len keys, [B, Hkv, N, D]. None unless they are held."""
        return self._held[1].means if self._held is not None and self._held[2] == kv_len else None

    def extend(self, key: Tensor, rule: Rule, implementation: str) -> Sketch:
        """The sketch of all blocks of a key. Only those that are not known are pooled.

        Args:
            key: [B, Hkv, S_kv, D].
            rule: The settings of the call.
            implementation: "reference" or "triton".

        Returns:
            A Sketch in key's dtype.

        Raises:
            ValueError: key has fewer tokens than before, or another batch size, heads, dimension, dtype, device, block
                size, kind of sketch or implementation.
        """
        if is_tracing():
            raise ValueError("means cannot be used inside torch.compile, whose graphs keep no state: pass None there")
        batch, kv_heads, kv_len, head_dim = key.shape
        kind = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": key.dtype, "device": key.device}
        block_size = rule.block_size
        kind |= {"block_size": block_size, "implementation": implementation}
        kind |= {"outlier_keys": rule.outlier_keys, "means scored": rule.scores_means}
        held_kind, held, held_len = self._held or (kind, None, 0)
        for name, ours in held_kind.items():
            if kind[name] != ours:
                raise ValueError(
                    f"means is of keys with {name} {ours}, got {kind[name]}: it belongs to one layer and prompt"
                    f"{layout_hint(key=key)}"
                )
        if kv_len < held_len:
            raise ValueError(
                f"key must have all {held_len} tokens that means is of, got S_kv={kv_len}: "
                "a new prompt needs a new KeyMeans"
            )
        known = held_len // block_size
        if held is not None and known * block_size == kv_len:
            return held
        sketch = sketch_keys(key[:, :, known * block_size :], rule, implementation)
        if held is not None and known:
            pairs = zip(held, sketch, strict=True)
            sketch = Sketch(*(a if a is None or b is None else torch.cat([a[:, :, :known], b], 2) for a, b in pairs))
        self._held = kind, sketch, kv_len
        return sketch


def check_means(means: KeyMeans | PageMeans | None, key: Tensor | PagedKV) -> None:
    """Raises TypeError unless it is None or keeps means of keys like these: a KeyMeans, or a PageMeans of pages."""
    wanted = PageMeans if isinstance(key, PagedKV) else KeyMeans
    if not (means is None or isinstance(means, wanted)):
        of_pages = " with a PagedKV" if wanted is PageMeans else ""
        raise TypeError(f"means must be a {wanted.__name__}{of_pages}, got {type(means).__name__}")
