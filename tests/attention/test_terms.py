"""Sliding windows, soft caps, ALiBi and sinks, alone, together and with sequences: the search and the attention."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device_calls import waits_are_errors
from support.inputs import DEVICE, as_variant, make_qkv
from support.oracle import evaluate_cut_rule, relative_error
from support.sequences import LEAN, assert_follows, cases, spoil

from flexprefill import (
    AttentionVariant,
    BlockMap,
    KeyMeans,
    PrefillConfig,
    Sequences,
    create_prefill_block_mask,
    explain_backend,
    prefill_attention,
    search_blocks,
)
from flexprefill.blockmap.block_mask import _to_dense
from flexprefill.blockmap.geometry import Geometry
from flexprefill.search.grid import Grid
from flexprefill.search.scorers import exact_scores, find_scorer

NOTHING = {"sliding_window": None, "soft_cap": None, "alibi_slopes": None}


@st.composite
def terms(draw):
    """What a call adds to plain causal attention, but for the sequences."""
    return {
        "sliding_window": draw(st.sampled_from([None, None, 1, 5, 16, 33, 64])),
        "soft_cap": draw(st.sampled_from([None, 0.5, 30.0])),
        "alibi_slopes": draw(st.sampled_from([None, (0.5, 0.01, 0.1, 0.0), (1.0, 0.2, 0.004, 0.03)])),
    }


def on_device(chosen, heads):
    slopes = chosen["alibi_slopes"]
    return {**chosen, "alibi_slopes": None if slopes is None else torch.tensor(slopes[:heads], device=DEVICE)}


def by_the_rule(case, chosen, with_sequences):
    """The case's sequences, or None, and which blocks the rule keeps and which are close to its threshold."""
    query, key, _, (sequences, starts, ends), arguments = case
    if not with_sequences:
        batch, kv_len = key.shape[0], key.shape[2]
        sequences, starts, ends = None, [[0] * kv_len] * batch, [[kv_len] * kv_len] * batch
    given_terms = {"window": chosen["sliding_window"], "soft_cap": chosen["soft_cap"], "slopes": chosen["alibi_slopes"]}
    keep, close = evaluate_cut_rule(query, key, starts, ends, **arguments, **given_terms)
    return sequences, keep, close


@settings(deadline=None, max_examples=80)
@given(cases(), terms(), st.booleans())
def test_the_reference_follows_the_rule_with_every_term(case, chosen, with_sequences):
    query, key, _, _, arguments = case
    sequences, keep, close = by_the_rule(case, chosen, with_sequences)
    call = {**arguments, **on_device(chosen, query.shape[1]), "sequences": sequences, "implementation": "reference"}
    assert_follows(search_blocks(query.to(DEVICE), key.to(DEVICE), **as_variant(**call)), keep, close)


@settings(deadline=None, max_examples=12 if DEVICE == "cpu" else 200)
@given(cases(max_length=110), terms(), st.booleans())
def test_the_kernel_follows_the_rule_with_every_term(case, chosen, with_sequences):
    query, key, _, _, arguments = case
    sequences, keep, close = by_the_rule(case, chosen, with_sequences)
    query, key = query.to(DEVICE), key.to(DEVICE)
    if with_sequences:
        query, key = spoil(query, sequences.padding), spoil(key, sequences.padding)
    call = {**arguments, **on_device(chosen, query.shape[1]), "sequences": sequences, "implementation": "triton"}
    assert_follows(search_blocks(query, key, **as_variant(**call)), keep, close)


@pytest.mark.parametrize(
    "more",
    [{}, {"alibi_slopes": (0.01, 0.3)}, {"soft_cap": 2.0}, {"sliding_window": 2200, "alibi_slopes": (0.01, 0.0)}],
)
def test_the_kernel_takes_tiles_that_every_row_sees_whole(more):
    query, key, _ = make_qkv(64, 2300, heads=2, kv_heads=1, head_dim=16, device=DEVICE)
    if "alibi_slopes" in more:
        more = more | {"alibi_slopes": torch.tensor(more["alibi_slopes"], device=DEVICE)}
    reference, kernel = (
        search_blocks(query, key, LEAN, **as_variant(**more), implementation=name) for name in ("reference", "triton")
    )
    assert reference == kernel and 0.05 < kernel.density().mean() < 0.98


@pytest.mark.parametrize(
    ("bounds", "q_len", "chosen"),
    [
        ((75, 400), 400, {}),  # one sequence for all rows of the later tiles, and padding before it
        ((3, 130, 390), 390, {"sliding_window": 200}),
        ((0, 141, 400), 290, {"soft_cap": 2.0, "alibi_slopes": (0.01,)}),
    ],
)
@pytest.mark.parametrize("rows", ["whole", "visible"])
def test_the_kernel_takes_tiles_of_one_sequence(bounds, q_len, chosen, rows):
    kv_len = bounds[-1]
    query, key, _ = make_qkv(q_len, kv_len, heads=1, head_dim=16, seed=2)
    key[:, :, : bounds[-2]] *= 4  # seen by mistake, another sequence's keys would have the best score
    chosen = NOTHING | chosen
    config = replace(LEAN, alpha=0.7, sink_blocks=0, last_full_blocks=0, score_rows=rows)
    positions = torch.arange(kv_len)
    of = torch.bucketize(positions, torch.tensor(bounds), right=True)
    edges = torch.tensor([kv_len, *bounds])
    starts = edges[of].tolist()
    ends = [0 if sequence == 0 else bounds[sequence] for sequence in of.tolist()]
    given_terms = {"window": chosen["sliding_window"], "soft_cap": chosen["soft_cap"], "slopes": chosen["alibi_slopes"]}
    keep, close = evaluate_cut_rule(query, key, [starts], [ends], config=config, scale=1.5, **given_terms)
    sequences = Sequences.from_cu_seqlens(torch.tensor(bounds, device=DEVICE), kv_len)
    padding = sequences.padding.cpu()
    query, key = (spoil(tensor, padding).to(DEVICE) for tensor in (query, key))
    call = {**on_device(chosen, 1), "sequences": sequences, "implementation": "triton", "scale": 1.5}
    assert_follows(search_blocks(query, key, config, **as_variant(**call)), keep, close)


def logits_of(query, key, scale, chosen, starts=None):
    """Scores and what is allowed, in float64: [B, Hq, S_q, S_kv]."""
    q_len, kv_len = query.shape[2], key.shape[2]
    products = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    logits = products * (query.shape[3] ** -0.5 if scale is None else scale)
    position = torch.arange(kv_len - q_len, kv_len, device=query.device)[:, None]
    k = torch.arange(kv_len, device=query.device)
    allowed = (k <= position).expand(query.shape[0], 1, -1, -1)
    if chosen["sliding_window"]:
        allowed = allowed & (position - k < chosen["sliding_window"])
    if starts is not None:
        allowed = allowed & (k >= torch.as_tensor(starts, device=query.device)[:, None, kv_len - q_len :, None])
    if chosen["soft_cap"]:
        logits = chosen["soft_cap"] * torch.tanh(logits / chosen["soft_cap"])
    if chosen["alibi_slopes"] is not None:
        slopes = torch.as_tensor(chosen["alibi_slopes"], device=query.device)[: query.shape[1], None, None]
        logits = logits - slopes.double() * (position - k)
    return logits, allowed


@settings(deadline=None, max_examples=40)
@given(cases(), terms())
def test_exact_scores_are_the_attention_mass_of_each_block_with_every_term(case, chosen):
    query, key, _, (sequences, starts, _), arguments = case
    b = arguments["config"].block_size
    slopes = on_device(chosen, query.shape[1])["alibi_slopes"]
    variant = AttentionVariant(sequences, chosen["sliding_window"], chosen["soft_cap"], slopes)
    grid = Grid(Geometry(query.shape[2], key.shape[2], b), 0.25, True, variant)
    query, key = query.to(DEVICE), key.to(DEVICE)
    found = exact_scores(query, key, grid).cpu()
    logits, allowed = logits_of(query, key, 0.25, chosen, starts)
    mass = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0).cpu()
    rows, columns = grid.rows * b - query.shape[2], grid.columns * b - key.shape[2]
    by_block = torch.nn.functional.pad(mass, (0, columns, 0, rows)).unflatten(3, (-1, b)).unflatten(2, (-1, b))
    by_block = by_block.sum((3, 5))
    scored = grid.scored("cpu" if DEVICE == "cpu" else DEVICE).cpu().expand_as(found)
    assert torch.equal(found.isfinite(), scored)
    assert (torch.exp2(found).double() - by_block).abs().max() <= 1e-4 * b


# of keys that score alike within their block the search's score is the exact mass: 2^L is proportional to it
@pytest.mark.parametrize(
    "chosen",
    [
        {"soft_cap": 2.0},
        {"alibi_slopes": (0.5, 0.05)},
        {"soft_cap": 2.0, "alibi_slopes": (0.5, 0.05), "sliding_window": 64},
    ],
)
def test_scores_with_terms_are_the_exact_mass_where_a_blocks_keys_are_alike(chosen):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 128, 16, generator=generator)
    key = 2 * torch.randn(1, 1, 8, 16, generator=generator).repeat_interleave(16, 2)
    slopes = torch.tensor(chosen["alibi_slopes"]) if "alibi_slopes" in chosen else None
    variant = AttentionVariant(None, chosen.get("sliding_window"), chosen.get("soft_cap"), slopes)
    grid = Grid(Geometry(128, 128, 16), 0.25, False, variant)
    found = find_scorer("flashprefill").log_scores(query, key[:, :, ::16], grid)
    logits, allowed = logits_of(
        query, key, 0.25, {"sliding_window": None, "soft_cap": None, "alibi_slopes": None, **chosen}
    )
    rows = grid.scoring_rows("cpu")
    for i, j in (~torch.isinf(found[0, 0])).nonzero().tolist():
        rows_of = rows[i, :, j] if rows.dim() == 3 else rows[0, 0, i, :, j]
        block = (slice(i * 16, (i + 1) * 16), slice(j * 16, (j + 1) * 16))
        mass = logits[0][(slice(None), *block)][:, rows_of].exp().sum((1, 2)) / 16
        assert allowed[0, 0][block][rows_of].all()
        assert torch.allclose(torch.log2(mass).float(), found[0, :, i, j], atol=1e-3)


def test_a_soft_cap_and_alibi_change_what_is_found_towards_the_mass_that_counts():
    query, key, _ = make_qkv(800, heads=4, kv_heads=2, head_dim=32)
    base = PrefillConfig(block_size=16, alpha=1.0, sink_blocks=0, window_blocks=1, last_full_blocks=0, min_blocks=6)
    for more in ({"soft_cap": 1.0}, {"alibi_slopes": torch.tensor([0.2, 0.05, 0.01, 0.002])}):
        chosen = {**NOTHING, **more}
        logits, allowed = logits_of(query, key, None, chosen)
        mass = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        recall = []
        for arguments in ({}, more):
            dense = search_blocks(query, key, base, **as_variant(**arguments)).to_dense()
            elements = dense.repeat_interleave(16, 2).repeat_interleave(16, 3)
            recall.append(((mass * elements).sum() / mass.sum()).item())
        assert recall[1] >= recall[0]
        assert "alibi_slopes" not in more or recall[1] > recall[0] + 0.02


def test_a_window_bounds_what_is_kept():
    query, key, _ = make_qkv(2000, head_dim=16, device=DEVICE)
    config = replace(LEAN, alpha=1e-6, sink_blocks=3, last_full_blocks=2)
    dense = search_blocks(query, key, config, variant=AttentionVariant(sliding_window=100)).to_dense()
    distance = torch.arange(125, device=DEVICE)[:, None] - torch.arange(125, device=DEVICE)
    # a block's first row sees 100 keys: its own and 99 before it
    assert not dense[:, :, distance > 7].any() and dense[:, :, (distance >= 0) & (distance <= 5)].all()
    assert search_blocks(query, key, config, variant=AttentionVariant(sliding_window=2000)) == search_blocks(
        query, key, config
    )


def expected_attention(query, key, value, block_map, chosen, starts=None, sinks=None, score=None):
    """Dense attention in float64 under the map, the terms and a boolean mask. Zeros for a row that sees nothing."""
    logits, allowed = logits_of(query, key, None, chosen, starts)
    size = block_map.block_size
    blocks = block_map.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
    allowed = allowed & blocks[:, :, : query.shape[2], : key.shape[2]]
    logits = (logits if score is None else score(logits)).masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(*logits.shape[:3], 1)], 3)
    weights = logits.softmax(-1).nan_to_num(0)[..., : key.shape[2]]
    return weights @ value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)


TOLERANCE = 1e-5 if DEVICE == "cpu" else 2e-3  # a GPU's float32 products may be tf32


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([None, 1, 50, 100]))
def test_the_block_mask_says_of_every_element_what_the_mask_says(case, window):
    query, key, _, (sequences, starts, _), arguments = case
    query, key = query.to(DEVICE), key.to(DEVICE)
    variant = AttentionVariant(sequences, window)
    block_map = search_blocks(query, key, **arguments, variant=variant)
    mask = create_prefill_block_mask(query, key, **arguments, variant=variant)
    _, allowed = logits_of(query, key, None, {**NOTHING, "sliding_window": window}, starts)
    q_len, kv_len, size = query.shape[2], key.shape[2], block_map.block_size

    def elements(blocks):
        return blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :q_len, :kv_len]

    index = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in (*query.shape[:2], q_len, kv_len)), indexing="ij")
    lists = (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)
    partial, full = (_to_dense(*pair, block_map.shape[3]) for pair in lists)
    found = elements(full) | (elements(partial) & mask.mask_mod(*index))
    assert torch.equal(found, allowed & elements(block_map.to_dense()))
    assert not (partial & full).any() and BlockMap.from_block_mask(mask) == block_map


def test_attention_with_every_term_equals_dense_attention():
    chosen = {"sliding_window": 150, "soft_cap": 3.0, "alibi_slopes": (0.1, 0.01, 0.001, 0.0)}
    config = replace(LEAN, dense_below=0)
    learned = torch.tensor([0.5, -2.0, 3.0, 0.0], device=DEVICE)
    for q_len, kv_len in ((300, 500), (301, 555)):
        query, key, value = make_qkv(q_len, kv_len, heads=4, kv_heads=2, head_dim=32, device=DEVICE)
        bounds = torch.tensor([0, 210, 333, kv_len - 40], device=DEVICE)
        sequences = Sequences.from_cu_seqlens(bounds, kv_len)
        terms = {**on_device(chosen, 4), "sequences": sequences}
        block_map = search_blocks(query, key, config, **as_variant(**terms))

        def bias(score, b, h, q_idx, kv_idx):
            return score + 0.1 * (kv_idx % 3)

        def dense_bias(logits):
            return logits + 0.1 * (torch.arange(logits.shape[3], device=DEVICE) % 3)

        for sinks in (learned, None):
            spoilt = (spoil(tensor, sequences.padding) for tensor in (query, key, value))
            output = prefill_attention(*spoilt, config, **as_variant(**terms, sinks=sinks), score_mod=bias)
            assert not output[:, :, -40:].any()
            starts = sequences.starts.tolist()
            expected = expected_attention(query, key, value, block_map, chosen, starts, sinks, dense_bias)
            assert relative_error(output, expected) <= TOLERANCE


def test_sinks_alone_scale_the_output():
    query, key, value = make_qkv(300, heads=4, kv_heads=2, device=DEVICE)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], device=DEVICE)
    config = replace(LEAN, dense_below=0, block_size=128)
    block_map = search_blocks(query, key, config)
    expected = expected_attention(query, key, value, block_map, NOTHING, None, sinks)
    assert (
        relative_error(prefill_attention(query, key, value, config, variant=AttentionVariant(sinks=sinks)), expected)
        <= TOLERANCE
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1 and"),
        ({"sliding_window": 4.0}, TypeError, "sliding_window must be an int or None, got 4.0"),
        ({"soft_cap": 0}, ValueError, "soft_cap must be positive and finite, got 0"),
        ({"soft_cap": np.nan}, ValueError, "soft_cap must be positive and finite, got nan"),
        ({"soft_cap": "30"}, TypeError, "soft_cap must be a number or None, got '30'"),
        ({"alibi_slopes": [0.1, 0.2]}, TypeError, r"alibi_slopes must be a tensor of floats \[Hq\], got list"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must be \[Hq\] with Hq=2, got \[3\]"),
        ({"alibi_slopes": torch.ones(2, device="meta")}, ValueError, "alibi_slopes must be on query's device"),
    ],
)
def test_a_wrong_term_is_named(changes, error, message):
    query, key, value = make_qkv(64, device=DEVICE)
    with pytest.raises(error, match=message):
        search_blocks(query, key, **as_variant(**changes))
    with pytest.raises(error, match=message):
        prefill_attention(query, key, value, **as_variant(**changes))


def test_what_cannot_go_together_says_so():
    query, key, value = make_qkv(64, device=DEVICE)
    with pytest.raises(ValueError, match=r"sinks must be \[Hq\] with Hq=2, got \[1\]"):
        prefill_attention(query, key, value, variant=AttentionVariant(sinks=torch.ones(1, device=DEVICE)))
    for name, term in (("sliding_window", 9), ("soft_cap", 2.0), ("alibi_slopes", torch.ones(2, device=DEVICE))):
        with pytest.raises(ValueError, match=f"{name} cannot be combined with mean_correction"):
            prefill_attention(query, key, value, PrefillConfig(mean_correction=True), **as_variant(**{name: term}))
        with pytest.raises(ValueError, match=f"'xattention' does not know of {name}: 'flashprefill' and 'exact' do"):
            search_blocks(query, key, PrefillConfig(scorer="xattention"), **as_variant(**{name: term}))
        assert not explain_backend(
            query, key, value, PrefillConfig(dense_below=1000), **as_variant(**{name: term})
        ).dense
    for name in ("soft_cap", "alibi_slopes"):
        term = 2.0 if name == "soft_cap" else torch.ones(2, device=DEVICE)
        # the means are of keys alone
        assert search_blocks(query, key, LEAN, **as_variant(**{name: term}), means=KeyMeans()) == search_blocks(
            query, key, LEAN, **as_variant(**{name: term})
        )


def test_the_cost_of_a_window_grows_with_the_window():
    """By counting the products that the search makes: of queries and means, in elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                self.elements += result.numel()
            return result

    def cost(length, window):
        query, key, _ = make_qkv(length, heads=1, head_dim=16)
        grid = Grid(Geometry(length, length, 16), 0.25, False, AttentionVariant(sliding_window=window))
        means = find_scorer("flashprefill").pool(key, 16)
        with Count() as count:
            find_scorer("flashprefill").log_scores(query, means, grid)
        return count.elements

    assert cost(4096, 64) <= 2.1 * cost(2048, 64)  # and not 4 times
    assert 1.5 * cost(4096, 64) <= cost(4096, 128) <= 2.5 * cost(4096, 64)
    assert cost(4096, 64) * 10 < cost(4096, None)


@pytest.fixture
def without_code(compile_with):
    """Compiles to no code for a device: fast, and FlexAttention is then dense under its mods, the map beside it."""
    compile_with("eager")


@pytest.mark.eager_flex
@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("window", [None, 20])
def test_a_step_of_decoding_is_dense_under_its_terms(window):
    chosen = {"sliding_window": window, "soft_cap": 3.0, "alibi_slopes": (0.1,)}
    query, key, value = make_qkv(1, 90, batch=2, heads=1, head_dim=16, device=DEVICE)
    sequences = Sequences.from_lengths(torch.tensor([60, 90], device=DEVICE), 90, padding="left")
    terms = as_variant(**on_device(chosen, 1), sequences=sequences)
    assert explain_backend(query, key, value, LEAN, **terms).dense
    everything = BlockMap.causal(2, 1, q_len=1, kv_len=90, block_size=16, device=DEVICE)
    expected = expected_attention(query, key, value, everything, chosen, sequences.starts.tolist())
    assert relative_error(prefill_attention(query, key, value, LEAN, **terms), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.eager_flex
def test_terms_trace_into_one_graph_for_all_lengths():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def attend(query, key, value, lengths, slopes):
        sequences = Sequences.from_lengths(lengths, key.shape[2])
        variant = AttentionVariant(sequences, 90, 3.0, slopes)
        mask = create_prefill_block_mask(query, key, LEAN, variant=variant)
        return mask.kv_indices, mask.full_kv_indices, prefill_attention(query, key, value, LEAN, variant=variant)

    slopes = torch.tensor([0.1, 0.01], device=DEVICE)
    with torch.no_grad():
        for length in (300, 500, 401):
            query, key, value = make_qkv(length, batch=2, head_dim=16, device=DEVICE)
            lengths = torch.tensor([length, length - 100], device=DEVICE)
            sequences = Sequences.from_lengths(lengths, length)
            mask = create_prefill_block_mask(query, key, LEAN, variant=AttentionVariant(sequences, 90, 3.0, slopes))
            indices, full, output = attend(query, key, value, lengths, slopes)
            assert torch.equal(indices, mask.kv_indices) and torch.equal(full, mask.full_kv_indices)
            assert output.shape == query.shape
    assert len(graphs) <= 2


def test_the_block_mask_of_sequences_and_a_window_is_their_mask():
    query, key, _ = make_qkv(200, 300, batch=2, head_dim=16, device=DEVICE)
    sequences = Sequences.from_lengths(torch.tensor([300, 171], device=DEVICE), 300, padding="left")
    mask = create_prefill_block_mask(query, key, LEAN, variant=AttentionVariant(sequences, 77))
    found = search_blocks(query, key, LEAN, variant=AttentionVariant(sequences, 77))
    # what is searched keeps no block that is empty
    assert BlockMap.from_block_mask(mask) == found
    b, h, q, k = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in (2, 1, 200, 300)), indexing="ij")
    start = torch.tensor([0, 129], device=DEVICE)[b]
    expected = (k <= q + 100) & (k > q + 100 - 77) & (k >= start) & (q + 100 >= start)
    assert torch.equal(mask.mask_mod(b, h, q, k), expected)
    # blocks that the window and the start leave whole stay full
    assert mask.full_kv_num_blocks.sum() > 0


@pytest.mark.gpu
def test_terms_wait_for_nothing():
    query, key, value = make_qkv(2000, batch=2, heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    lengths, slopes = torch.tensor([2000, 1111], device="cuda"), torch.tensor([0.1, 0.01, 0.5, 0.0], device="cuda")
    bounds = torch.tensor([0, 500, 1300, 2000], device="cuda")
    mask = BlockMap.causal(2, 1, q_len=2000, kv_len=2000, block_size=128, device="cuda").with_mask(
        lambda b, h, q, k: k % 7 > 0
    )

    def run():
        for sequences in (
            Sequences.from_lengths(lengths, 2000),
            Sequences.from_lengths(lengths, 2000, padding="left"),
            Sequences.from_cu_seqlens(bounds, 2000),
        ):
            search_blocks(query, key, variant=AttentionVariant(sequences))
            search_blocks(query, key, variant=AttentionVariant(sequences, 300, 20.0, slopes))
            create_prefill_block_mask(query, key, variant=AttentionVariant(sequences, 300))
            prefill_attention(query, key, value, variant=AttentionVariant(sequences, 300, 20.0, sinks=slopes))
        search_blocks(query, key) & mask

    run()
    torch.cuda.synchronize()
    with waits_are_errors():
        run()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dtype", "layout", "window", "modified", "settings"),
    [
        (128, torch.bfloat16, "right", None, False, {}),
        (128, torch.bfloat16, "left", None, False, {}),
        (128, torch.bfloat16, "packed", None, False, {}),
        (128, torch.bfloat16, None, 1000, False, {}),
        (128, torch.bfloat16, None, 4096, True, {}),
        (64, torch.float16, "packed", 1000, True, {"mask_heads": "kv", "score_rows": "visible"}),
        (128, torch.bfloat16, "packed", None, True, {"block_size": 64, "min_blocks": 4}),
        (192, torch.bfloat16, "packed", None, False, {"score_rows": "visible"}),
        (128, torch.float32, "left", 4096, False, {"mask_heads": "kv"}),
        (192, torch.float32, "left", None, False, {"mask_heads": "kv", "score_rows": "visible", "min_blocks": 2}),
        (64, torch.float32, "packed", None, True, {"block_size": 64}),
    ],
)
def test_the_kernel_equals_the_reference_at_length(head_dim, dtype, layout, window, modified, settings):
    query, key, _ = make_qkv(9000, batch=2, heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    call = {"sliding_window": window}
    if layout == "packed":
        bounds = torch.tensor([0, 1, 40, 700, 3000, 3100, 3105, 8990], device="cuda")
        call["sequences"] = Sequences.from_cu_seqlens(bounds, 9000)
    elif layout:
        call["sequences"] = Sequences.from_lengths(torch.tensor([9000, 5555], device="cuda"), 9000, padding=layout)
    if modified:
        call |= {"soft_cap": 5.0, "alibi_slopes": 2.0 ** -torch.arange(1, 9, device="cuda", dtype=torch.float32)}
    config = PrefillConfig(alpha=0.3, window_blocks=1, **settings)
    reference, kernel = (
        search_blocks(query, key, config, **as_variant(**call), implementation=name) for name in ("reference", "triton")
    )
    assert 0 < reference.counts().sum()
    assert (reference ^ kernel).counts().sum() <= 1e-3 * reference.counts().sum()
