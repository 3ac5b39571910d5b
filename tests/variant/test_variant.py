"""AttentionVariant: a value that is checked when it is made, compared, hashed, and taken apart by pytree functions."""

import pytest
import torch
from support.inputs import DEVICE, make_qkv
from torch.utils import _pytree as pytree

from flexprefill import AttentionVariant, PrefillConfig, Sequences, search_blocks

LEAN = PrefillConfig(block_size=16, alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1)


def full_variant():
    sequences = Sequences.from_cu_seqlens(torch.tensor([0, 90, 200], device=DEVICE), 200)
    slopes, sinks = torch.tensor([0.1, 0.2], device=DEVICE), torch.tensor([1.0, 2.0], device=DEVICE)
    return AttentionVariant(sequences, 64, 30.0, slopes, sinks)


def test_equal_parts_make_equal_variants():
    assert AttentionVariant() == AttentionVariant() and hash(AttentionVariant()) == hash(AttentionVariant())
    assert AttentionVariant(sliding_window=4) == AttentionVariant(sliding_window=4)
    assert hash(AttentionVariant(soft_cap=2)) == hash(AttentionVariant(soft_cap=2.0))
    assert AttentionVariant(sliding_window=4) != AttentionVariant(sliding_window=5) != 5
    first, second = full_variant(), full_variant()
    same = AttentionVariant(first.sequences, 64, 30.0, first.alibi_slopes, first.sinks)
    # tensors are the same or are not: what they hold may change
    assert first == same and hash(first) == hash(same) and first != second


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        AttentionVariant().sliding_window = 3


def test_its_tensors_are_leaves():
    variant = full_variant()
    leaves, spec = pytree.tree_flatten(variant)
    assert [leaf.shape for leaf in leaves] == [(1, 200), (1, 200), (2,), (2,)]
    assert pytree.tree_unflatten(leaves, spec).sinks is variant.sinks
    moved = pytree.tree_map(lambda leaf: leaf.to("meta"), variant)
    assert moved.sequences.starts.device.type == "meta" and (moved.sliding_window, moved.soft_cap) == (64, 30.0)
    assert pytree.tree_map(lambda leaf: leaf, AttentionVariant(sliding_window=3)) == AttentionVariant(sliding_window=3)


def test_it_goes_through_a_compiled_function_and_is_made_in_one():
    query, key, _ = make_qkv(200, heads=2, head_dim=16, device=DEVICE)
    variant = full_variant()

    @torch.compile(fullgraph=True, backend="eager")
    def given(query, key, variant):
        return search_blocks(query, key, LEAN, variant=variant).words

    @torch.compile(fullgraph=True, backend="eager")
    def made(query, key, slopes):
        return search_blocks(query, key, LEAN, variant=AttentionVariant(None, 64, 30.0, slopes)).words

    assert torch.equal(given(query, key, variant), search_blocks(query, key, LEAN, variant=variant).words)
    slopes = variant.alibi_slopes
    expected = search_blocks(query, key, LEAN, variant=AttentionVariant(None, 64, 30.0, slopes)).words
    assert torch.equal(made(query, key, slopes), expected)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"sequences": [0, 9]}, TypeError, "sequences must be made by Sequences.from_lengths.*got list"),
        ({"sliding_window": True}, TypeError, "sliding_window must be an int or None, got True"),
        ({"sinks": torch.ones(2, 2)}, ValueError, r"sinks must be \[Hq\], got \[2, 2\]"),
        ({"sinks": torch.ones(2, dtype=torch.int32)}, TypeError, "sinks must be a tensor of floats"),
    ],
)
def test_a_wrong_part_is_named_when_it_is_made(parts, error, message):
    with pytest.raises(error, match=message):
        AttentionVariant(**parts)


def test_what_is_no_variant_is_named():
    query, key, _ = make_qkv(64, device=DEVICE)
    with pytest.raises(TypeError, match="variant must be an AttentionVariant or None, got dict"):
        search_blocks(query, key, variant={"sliding_window": 3})
