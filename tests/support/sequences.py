"""Sequences in a batch, drawn at random, with what a search of them has to give."""

from itertools import pairwise

import torch
from hypothesis import strategies as st

from flexprefill import PrefillConfig, Sequences
from support.inputs import DEVICE, make_qkv

LEAN = PrefillConfig(block_size=16, alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1)


def layouts(kind, batch, kv_len, rng):
    """Sequences of a kind, and the same as lists: [B][S_kv] of starts and of ends."""
    if kind == "packed":
        cuts = sorted(
            int(x) for x in torch.randint(0, kv_len + 1, (int(torch.randint(2, 7, (), generator=rng)),), generator=rng)
        )
        sequences = Sequences.from_cu_seqlens(torch.tensor(cuts, dtype=torch.int32, device=DEVICE), kv_len)
        spans = [list(pairwise(cuts))] * batch
    else:
        lengths = torch.randint(0, kv_len + 1, (batch,), generator=rng)
        sequences = Sequences.from_lengths(lengths.to(DEVICE), kv_len, padding=kind)
        spans = [[(0, n) if kind == "right" else (kv_len - n, kv_len)] for n in lengths.tolist()]
    starts, ends = [[kv_len] * kv_len for _ in range(batch)], [[0] * kv_len for _ in range(batch)]
    for n, entries in enumerate(spans):
        for start, end in entries:
            for p in range(start, end):
                starts[n][p], ends[n][p] = start, end
    return sequences, starts, ends


@st.composite
def cases(draw, *, max_length=150, kinds=("right", "left", "packed"), max_group=2):
    kv_len = draw(st.integers(1, max_length))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, batch = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    query, key, value = make_qkv(
        draw(st.one_of(st.just(kv_len), st.integers(1, kv_len))),
        kv_len,
        batch=batch,
        heads=kv_heads * draw(st.integers(1, max_group)),
        kv_heads=kv_heads,
        head_dim=16,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**31)),
    )
    config = PrefillConfig(
        alpha=draw(st.floats(0.001, 1)),
        block_size=draw(st.sampled_from([16, 32])),
        sink_blocks=draw(st.integers(0, 2)),
        window_blocks=draw(st.integers(0, 2)),
        last_full_blocks=draw(st.integers(0, 2)),
        min_blocks=draw(st.sampled_from([0, 0, 1, 3])),
        mask_heads=draw(st.sampled_from(["query", "kv"])),
        score_rows=draw(st.sampled_from(["whole", "visible"])),
    )
    arguments = {"config": config, "last_chunk": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.3]))}
    return query, key, value, layouts(draw(st.sampled_from(kinds)), batch, kv_len, rng), arguments


def spoil(tensor, padding):
    """NaN in every position of padding [1 or B, S]."""
    return tensor.masked_fill(padding[:, None, -tensor.shape[2] :, None], torch.nan)


def assert_follows(block_map, keep, close):
    wrong = (block_map.to_dense().cpu() != keep) & ~close
    assert not wrong.any(), f"{int(wrong.sum())} of {keep.numel()} blocks, first at {wrong.nonzero()[0].tolist()}"
