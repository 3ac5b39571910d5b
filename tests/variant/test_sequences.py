from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, as_variant, make_qkv
from support.oracle import evaluate_cut_rule
from support.sequences import LEAN, assert_follows, cases, spoil

from flexprefill import AttentionVariant, BlockMap, KeyMeans, PrefillConfig, Sequences, search_blocks
from flexprefill.blockmap.masking import classify_blocks
from flexprefill.variant.visibility import blocks_from, first_keys


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_reference_follows_the_rule_for_each_rows_own_sequence(case):
    query, key, _, (sequences, starts, ends), arguments = case
    keep, close = evaluate_cut_rule(query, key, starts, ends, **arguments)
    padding = sequences.padding.cpu()
    query, key = (spoil(tensor, padding).to(DEVICE) for tensor in (query, key))
    found = search_blocks(query, key, implementation="reference", variant=AttentionVariant(sequences), **arguments)
    assert_follows(found, keep, close)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.booleans(), st.integers(0, 2**31), st.sampled_from(["query", "kv"]))
def test_a_right_padded_sequence_gets_the_mask_that_it_gets_alone(kv_len, offset, seed, mask_heads):
    rng = torch.Generator().manual_seed(seed)
    config = replace(LEAN, mask_heads=mask_heads, min_blocks=seed % 3)
    lengths = torch.randint(1, kv_len + 1, (3,), generator=rng)
    q_len = kv_len if offset else int(torch.randint(1, kv_len + 1, (), generator=rng))
    query, key, _ = make_qkv(q_len, kv_len, batch=3, heads=4, kv_heads=2, head_dim=16, seed=seed, device=DEVICE)
    sequences = Sequences.from_lengths(lengths.to(DEVICE), kv_len)
    dense = search_blocks(query, key, config, variant=AttentionVariant(sequences)).to_dense()
    for n, length in enumerate(lengths.tolist()):
        own_rows = length - (kv_len - q_len)
        rows, columns = -(-max(own_rows, 0) // 16), -(-length // 16)
        assert not dense[n, :, rows:].any() and not dense[n, :, :, columns:].any()
        if own_rows > 0:
            alone = search_blocks(query[n : n + 1, :, :own_rows], key[n : n + 1, :, :length], config)
            assert torch.equal(dense[n, :, :rows, :columns], alone.to_dense()[0])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 2**31), st.booleans())
def test_sequences_that_start_on_block_edges_get_the_masks_that_they_get_alone(blocks, seed, short_last):
    lengths = [16 * count for count in blocks]
    lengths[-1] += 5 if short_last or sum(lengths) == 0 else 0
    kv_len = sum(lengths)
    query, key, _ = make_qkv(kv_len, heads=2, head_dim=16, seed=seed, device=DEVICE)
    config = replace(LEAN, min_blocks=seed % 2, score_rows=("whole", "visible")[seed % 2])
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    variant = AttentionVariant(Sequences.from_cu_seqlens(bounds, kv_len))
    packed = search_blocks(query, key, config, variant=variant).to_dense()
    expected = torch.zeros_like(packed)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if start < end:
            part = slice(start, end)
            alone = search_blocks(query[:, :, part], key[:, :, part], config).to_dense()
            place = slice(start // 16, start // 16 + alone.shape[2])
            expected[:, :, place, place] = alone
    assert torch.equal(packed, expected)
    # the last of them alone, behind padding
    last = lengths[-1:]
    behind = Sequences.from_lengths(torch.tensor(last, device=DEVICE), kv_len, padding="left")
    left = search_blocks(query, key, config, variant=AttentionVariant(behind))
    if last[0]:
        place = slice((kv_len - last[0]) // 16, None)
        assert torch.equal(left.to_dense()[:, :, place, place], expected[:, :, place, place])


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Sequences.from_lengths(torch.tensor([n, n], device=DEVICE), n),
        lambda n: Sequences.from_cu_seqlens(torch.tensor([0, n], device=DEVICE), n),
    ],
)
@pytest.mark.parametrize("q_len", [200, 100, 1])
def test_one_whole_sequence_changes_nothing(make, q_len):
    query, key, _ = make_qkv(q_len, 200, batch=2, heads=2, head_dim=16, device=DEVICE)
    for config in (LEAN, replace(LEAN, score_rows="visible", min_blocks=2)):
        assert search_blocks(query, key, config, variant=AttentionVariant(make(200))) == search_blocks(
            query, key, config
        )


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([None, 1, 7, 40]))
def test_what_is_left_of_blocks_is_what_the_elements_say(case, window):
    query, key, _, (sequences, _, _), arguments = case
    q_len, kv_len = query.shape[2], key.shape[2]
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_size": arguments["config"].block_size, "device": DEVICE}
    block_map = BlockMap.causal(query.shape[0], 1, **sizes)
    for hiding in (sequences, None):
        first = first_keys(hiding, window, block_map.geometry, DEVICE)
        if first is None:
            continue
        rows = first.expand(query.shape[0], -1)
        by_elements = classify_blocks(lambda b, h, q, k: k >= rows[b, q], block_map.words, block_map.geometry)  # noqa: B023
        for fast, slow in zip(blocks_from(first, block_map.geometry), by_elements, strict=True):
            assert torch.equal(fast.expand_as(slow), slow)


def test_what_cannot_be_sequences_is_refused():
    lengths = torch.tensor([3, 5])
    for call, error, message in (
        (lambda: Sequences.from_lengths([3, 5], 8), TypeError, "seq_lengths must be a tensor of int32 or int64.*list"),
        (lambda: Sequences.from_lengths(lengths.float(), 8), TypeError, "seq_lengths must be.*float32"),
        (lambda: Sequences.from_lengths(lengths[None], 8), ValueError, r"one dimension.*\[1, 2\]"),
        (lambda: Sequences.from_lengths(lengths, 8, padding="middle"), ValueError, "padding must be one of.*'middle'"),
        (lambda: Sequences.from_lengths(lengths, 0), ValueError, "kv_len must be at least 1"),
        (lambda: Sequences.from_lengths(lengths, 8.0), TypeError, "kv_len must be an int"),
        (lambda: Sequences.from_lengths(torch.tensor([3, 9]), 8), ValueError, r"0 … kv_len=8, got \[3, 9\]"),
        (lambda: Sequences.from_lengths(torch.tensor([-1, 5]), 8), ValueError, r"0 … kv_len=8, got \[-1, 5\]"),
        (lambda: Sequences.from_cu_seqlens(torch.tensor([0, 6, 5]), 8), ValueError, r"ascend .* got \[0, 6, 5\]"),
        (lambda: Sequences.from_cu_seqlens(torch.tensor([0, 9]), 8), ValueError, r"within 0 … kv_len=8, got \[0, 9\]"),
        (lambda: Sequences.from_cu_seqlens(lengths[:1], 8), ValueError, "cu_seqlens must hold a start and an end"),
    ):
        with pytest.raises(error, match=message):
            call()
    query, key, _ = make_qkv(64, batch=2)
    sequences = Sequences.from_lengths(lengths, 64)
    for arguments, error, message in (
        ({"sequences": lengths}, TypeError, "sequences must be made by Sequences.from_lengths.*got Tensor"),
        ({"sequences": Sequences.from_lengths(lengths, 65)}, ValueError, "key's length S_kv=64, got kv_len=65"),
        ({"sequences": Sequences.from_lengths(lengths[[0, 0, 0]], 64)}, ValueError, "key's batch size 2, got 3"),
        ({"sequences": Sequences.from_lengths(lengths.to("meta"), 64)}, ValueError, "key's device cpu, got meta"),
        ({"sequences": sequences, "means": KeyMeans()}, ValueError, "means is of whole blocks.*pass None"),
        ({"sequences": sequences, "config": PrefillConfig(scorer="xattention")}, ValueError, "does not know of seq"),
    ):
        with pytest.raises(error, match=message):
            search_blocks(query, key, **as_variant(**arguments))


def test_other_lengths_compile_nothing_anew():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def search(query, key, lengths):
        return search_blocks(
            query, key, LEAN, variant=AttentionVariant(Sequences.from_lengths(lengths, key.shape[2]))
        ).words

    query, key, _ = make_qkv(200, batch=2, head_dim=16, device=DEVICE)
    for lengths in ([200, 100], [3, 0], [70, 71]):
        lengths = torch.tensor(lengths, device=DEVICE)
        expected = search_blocks(query, key, LEAN, variant=AttentionVariant(Sequences.from_lengths(lengths, 200)))
        assert torch.equal(search(query, key, lengths), expected.words)
    assert len(graphs) == 1


def scores_of(monkeypatch, query, key, config, **call):
    """A search's map, and the scores that its kernel compared: {(batch entry, head, query block): [blocks]}."""
    arrays = []

    def empty(*size, make=torch.empty, **options):
        array = make(*size, **options)
        arrays.append(array.fill_(torch.nan) if array.is_floating_point() else array)
        return array

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        found = search_blocks(query, key, config, implementation="triton", **as_variant(**call))
    scratch = arrays[-1]  # [programs, heads of a mask, query blocks of a program, blocks]
    programs, members, neighbours, _ = scratch.shape
    batch, heads, rows, columns = found.shape
    groups = -(-rows // neighbours)
    assert programs == groups * batch * heads // members, "each program has to have one tile"
    scores = {}
    for n, head, row in product(range(batch), range(heads), range(rows)):
        mask = (n * heads + head) // members
        tile = (groups - 1 - row // neighbours) * (batch * heads // members) + mask
        scores[n, head, row] = scratch[tile, head % members, row % neighbours, :columns]
    return found, scores


@pytest.mark.gpu
@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "settings"),
    [
        (128, torch.bfloat16, {}),  # alone by the Hopper kernel where there is one
        (64, torch.float16, {"score_rows": "visible"}),
        (96, torch.bfloat16, {"block_size": 64, "mask_heads": "kv"}),
        (128, torch.float32, {"min_blocks": 3}),
        (192, torch.bfloat16, {}),
    ],
)
def test_scores_are_equal_in_each_bit_alone_and_among_others(monkeypatch, head_dim, dtype, settings, modified):
    config = PrefillConfig(**{"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_full_blocks": 1} | settings)
    b, kv_len = config.block_size, 8300 * config.block_size // 128
    query, key, _ = make_qkv(kv_len, batch=2, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype, device="cuda")
    # no power of two in common with a tile of 64 blocks, and one sequence over several tiles
    bounds = torch.tensor([0, 3 * b, 16 * b, 17 * b, kv_len], device="cuda")
    layouts = {
        Sequences.from_lengths(torch.tensor([kv_len, kv_len // 2 + 77], device="cuda"), kv_len): [
            (0, 0, kv_len),
            (1, 0, kv_len // 2 + 77),
        ],
        Sequences.from_cu_seqlens(bounds, kv_len): [(n, *span) for n in range(2) for span in pairwise(bounds.tolist())],
    }
    terms = {"soft_cap": 20.0, "alibi_slopes": torch.tensor([0.5, 0.01], device="cuda")} if modified else {}
    compared = 0
    for sequences, spans in layouts.items():
        found, scores = scores_of(monkeypatch, query, key, config, sequences=sequences, **terms)
        dense = found.to_dense()
        for n, start, end in spans:
            part = slice(n, n + 1), slice(None), slice(start, end)
            alone, own_scores = scores_of(monkeypatch, query[part], key[part], config, **terms)
            first, (rows, columns) = start // b, alone.shape[2:]
            assert torch.equal(dense[n, :, first : first + rows, first : first + columns], alone.to_dense()[0])
            for (_, head, row), own in own_scores.items():
                if config.window_blocks < row < rows - config.last_full_blocks:  # else all is kept, and none compared
                    among = scores[n, head, first + row][first : first + row]
                    assert torch.equal(own[:row], among) and own[:row].isfinite().all()
                    compared += row
    assert compared > 1000
