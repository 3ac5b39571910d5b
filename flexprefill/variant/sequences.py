"""Sequences: which of the positions of a batch belong together, and which are padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill.config import check_whole, plain_number
from flexprefill.runtime.layout import layout_hint
from flexprefill.runtime.pytrees import register_node
from flexprefill.runtime.thread_state import is_fake
from flexprefill.runtime.tracing import is_tracing

PADDING = ("right", "left")
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a batch. A query sees only keys of its own sequence. Padding sees nothing and is not seen.

    `from_lengths` makes it for a padded batch, `from_cu_seqlens` for sequences packed in a row. It is data on the
    device. Making and using it waits for nothing. Other lengths compile nothing anew.

    Attributes:
        starts: For each position the first position of its sequence, S_kv in padding. int32 [1 or B, S_kv].
        ends: For each position the end of its sequence, one past the last position, 0 in padding. int32
            [1 or B, S_kv].
    """

    starts: Tensor
    ends: Tensor

    @classmethod
    def from_lengths(cls, seq_lengths: Tensor, kv_len: int, *, padding: str = "right") -> Sequences:
        """One sequence in each batch entry, padded to ``kv_len`` positions.

        Lengths on a GPU or in a graph are not checked, because that would wait for them. They are cut to 0 … kv_len.

        Args:
            seq_lengths: Tokens of each sequence, 0 … kv_len. int32 or int64 [B].
            kv_len: Positions of a batch entry.
            padding: The side of the padding, "right" or "left".

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A shape, name or value does not fit.
        """
        kv_len = _check_integers("seq_lengths", seq_lengths, kv_len)
        if padding not in PADDING:
            raise ValueError(f"padding must be one of {PADDING}, got {padding!r}")
        if _shows_values(seq_lengths) and not (0 <= seq_lengths.min() and seq_lengths.max() <= kv_len):
            raise ValueError(f"seq_lengths must be 0 … kv_len={kv_len}, got {seq_lengths.tolist()}")
        lengths = seq_lengths.clamp(0, kv_len)[:, None]
        position = torch.arange(kv_len, device=seq_lengths.device)
        start = torch.zeros_like(lengths) if padding == "right" else kv_len - lengths
        return cls._of(position, start, start + lengths)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, kv_len: int) -> Sequences:
        """Sequences that stand one behind the other in each batch entry, without padding between them.

        Values on a GPU or in a graph are not checked, because that would wait for them.

        Args:
            cu_seqlens: The start of each sequence, and then the end of the last one, as FlashAttention takes it. They
                ascend. Positions before the first and from the last on are padding. int32 or int64 [n + 1].
            kv_len: Positions of a batch entry.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A shape or value does not fit.
        """
        kv_len = _check_integers("cu_seqlens", cu_seqlens, kv_len)
        if cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must hold a start and an end at least, got {list(cu_seqlens.shape)}")
        if _shows_values(cu_seqlens) and not (
            (cu_seqlens.diff() >= 0).all() and 0 <= cu_seqlens[0] and cu_seqlens[-1] <= kv_len
        ):
            raise ValueError(f"cu_seqlens must ascend within 0 … kv_len={kv_len}, got {cu_seqlens.tolist()}")
        position = torch.arange(kv_len, device=cu_seqlens.device)
        cu_seqlens = cu_seqlens.to(position.dtype).contiguous()
        sequence = torch.searchsorted(cu_seqlens, position, right=True)  # 0 before the first, n + 1 behind the last
        last = cu_seqlens.shape[0] - 1
        start, end = cu_seqlens[(sequence - 1).clamp(min=0)], cu_seqlens[sequence.clamp(max=last)]
        return cls._of(position, start[None], end[None])

    @classmethod
    def _of(cls, position: Tensor, start: Tensor, end: Tensor) -> Sequences:
        inside = (position >= start) & (position < end)
        starts = torch.where(inside, start, position.shape[0]).to(torch.int32)
        return cls(starts, torch.where(inside, end, 0).to(torch.int32))

    @property
    def kv_len(self) -> int:
        """Positions of a batch entry."""
        return self.starts.shape[1]

    @property
    def padding(self) -> Tensor:
        """Which positions belong to no sequence: bool [1 or B, S_kv]."""
        return self.ends == 0

    def check_fits(self, key: Tensor) -> None:
        """Raises ValueError unless they have key's batch size, length and device."""
        if self.kv_len != key.shape[2]:
            raise ValueError(
                f"sequences must be of key's length S_kv={key.shape[2]}, got kv_len={self.kv_len}{layout_hint(key=key)}"
            )
        if self.starts.shape[0] not in (1, key.shape[0]):
            raise ValueError(f"sequences must be of key's batch size {key.shape[0]}, got {self.starts.shape[0]}")
        if self.starts.device != key.device:
            raise ValueError(f"sequences must be on key's device {key.device}, got {self.starts.device}")


register_node(Sequences, ("starts", "ends"), ())


def _shows_values(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values waits for nothing."""
    return tensor.device.type == "cpu" and not is_tracing() and not is_fake(tensor)


def _check_integers(name: str, tensor: Tensor, kv_len: int) -> int:
    """The length as Python's own int. Raises unless the tensor and it can say where sequences are."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of int32 or int64 on the attention's device, got {got}")
    if tensor.dim() != 1 or tensor.shape[0] == 0:
        raise ValueError(f"{name} must be of one dimension and not empty, got {list(tensor.shape)}")
    kv_len = plain_number(kv_len)
    check_whole("kv_len", kv_len, 1)
    return kv_len
