"""How fast a part could be at best: its matrix work, exponentials and bytes at the rates of the data sheet.

A floor is theoretical. Every multiprocessor does nothing else, at the highest clock that the driver names. No card
holds that clock under load. The reached share of the floor compares parts with each other, and one card with another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexprefill.bench.inputs import Case
from flexprefill.blockmap.geometry import causal_blocks, visible_blocks
from flexprefill.errors import FlexPrefillError
from flexprefill.search import reference
from flexprefill.search.rule import Rule

# dense bfloat16 or float16 operations a clock and multiprocessor, float32 sums; GeForce cards of 8.6 and 8.9 do half
MATRIX_FLOPS = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192}
EXPONENTIALS = 16  # a clock and multiprocessor, on all of these cards


@dataclass(frozen=True)
class Rates:
    """A GPU's rates at the highest clocks.

    Attributes:
        matrix_flops: Operations a second, of bfloat16 or float16.
        exponentials: Exponentials a second.
        bytes: Bytes a second, from and to memory.
        cache_bytes: Size of the L2 cache.
    """

    matrix_flops: float
    exponentials: float
    bytes: float
    cache_bytes: int


@dataclass(frozen=True)
class Work:
    """The work that a part cannot avoid. ``matrix_flops`` is None where no tensor core takes the dtype."""

    matrix_flops: float | None
    exponentials: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """The least time for a work, and what bounds it: "matrix", "exponentials" or "bytes"."""

    ms: float
    bound: str


def read_rates(device: torch.device) -> Rates:
    """A CUDA device's rates, as its driver reports them.

    Raises:
        FlexPrefillError: It is no NVIDIA GPU of a known kind, or the driver does not report them.
    """
    if device.type != "cuda" or torch.version.hip:
        raise FlexPrefillError("floors are known for NVIDIA GPUs only")
    card = torch.cuda.get_device_properties(device)
    per_clock = MATRIX_FLOPS.get((card.major, card.minor))
    if per_clock is None:
        raise FlexPrefillError(f"the rates of compute capability {card.major}.{card.minor} are not known here")
    try:
        from triton.runtime import driver

        index = torch.cuda.current_device() if device.index is None else device.index
        told = driver.active.utils.get_device_properties(index)
        clock, memory_clock, bus_bits = (told[name] for name in ("sm_clock_rate", "mem_clock_rate", "mem_bus_width"))
    except Exception as error:  # a driver may raise anything; the measurement goes on without floors
        raise FlexPrefillError(f"the driver does not tell its clocks: {error}") from error
    if not (clock and memory_clock and bus_bits):
        raise FlexPrefillError(f"the driver does not tell its clocks: {told}")
    clocks = 1e3 * clock * card.multi_processor_count  # both clocks come in kHz
    return Rates(
        matrix_flops=per_clock * clocks,
        exponentials=EXPONENTIALS * clocks,
        bytes=2 * 1e3 * memory_clock * bus_bits / 8,  # double data rate
        cache_bytes=card.L2_cache_size,
    )


def floor_of(work: Work, rates: Rates) -> Floor | None:
    """The floor of a work; None if its matrix work has no known rate, or nothing bounds it.

    Bytes that fit the cache do not count, because repeats need not fetch them from memory.
    """
    if work.matrix_flops is None:
        return None
    seconds = {
        "matrix": work.matrix_flops / rates.matrix_flops,
        "exponentials": work.exponentials / rates.exponentials,
        "bytes": work.bytes / rates.bytes if work.bytes > rates.cache_bytes else 0.0,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return Floor(1e3 * seconds[bound], bound) if seconds[bound] else None


def pooling_work(case: Case) -> Work:
    """Reads the keys and writes their blocks' means."""
    return Work(0.0, 0.0, _bytes(case.key) + _mean_bytes(case))


def scoring_work(case: Case) -> Work:
    """Products of every row with the means of the blocks that it chooses from, and as many exponentials.

    Rows that keep everything need no scores. A block on the diagonal counts whole.
    """
    _, heads, _, head_dim = case.query.shape
    block = case.config.block_size
    rule = Rule.of(case.config, scale=head_dim**-0.5, last_chunk=True)
    geometry = case.block_map.geometry
    causal = causal_blocks(geometry, "cpu")
    to_choose = (reference.always_kept(geometry, rule, "cpu") != causal).any(-1)
    pairs = heads * int(causal[to_choose].sum())
    query_bytes = _bytes(case.query) * to_choose.float().mean().item()
    return Work(
        _matrix_flops(case, 2 * head_dim * block * pairs),
        block * pairs,
        query_bytes + _mean_bytes(case) + _bytes(case.block_map.words),
    )


def lists_work(case: Case) -> Work:
    """Reads the words and writes two index lists and their counts."""
    _, heads, rows, columns = case.block_map.shape
    entry = torch.int32.itemsize
    return Work(0.0, 0.0, _bytes(case.block_map.words) + 2 * entry * heads * rows * (columns + 1))


def sparse_attention_work(case: Case) -> Work:
    """Attention over the kept blocks."""
    return _attention_work(case, int(case.block_map.counts().sum()))


def whole_work(case: Case) -> Work:
    """A search and the attention over what it keeps. The lists between them are no work that has to be."""
    parts = [work(case) for work in (pooling_work, scoring_work, sparse_attention_work)]
    flops = [part.matrix_flops for part in parts if part.matrix_flops is not None]
    return Work(
        sum(flops) if len(flops) == len(parts) else None,
        sum(part.exponentials for part in parts),
        sum(part.bytes for part in parts),
    )


def dense_attention_work(case: Case) -> Work:
    """Attention over all causal blocks."""
    visible = visible_blocks(case.block_map.geometry, "cpu")
    return _attention_work(case, case.query.shape[1] * int(visible.sum()))


def _attention_work(case: Case, blocks: int) -> Work:
    """Two products and an exponential for each element of these blocks. Blocks count whole; tensors move once."""
    elements = blocks * case.config.block_size**2
    flops = _matrix_flops(case, 4 * case.query.shape[3] * elements)
    return Work(flops, elements, 2 * _bytes(case.query) + _bytes(case.key) + _bytes(case.value))


def _matrix_flops(case: Case, flops: float) -> float | None:
    return None if case.query.dtype == torch.float32 else flops


def _mean_bytes(case: Case) -> int:
    _, kv_heads, _, head_dim = case.key.shape
    return kv_heads * case.block_map.shape[3] * head_dim * case.key.element_size()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
