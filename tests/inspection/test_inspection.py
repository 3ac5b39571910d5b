import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexprefill import BlockMap, PrefillConfig
from flexprefill.blockmap.geometry import visible_blocks
from flexprefill.inspection import PATTERNS, block_patterns, compare_maps, head_similarity, summarize_heads
from flexprefill.inspection.patterns import LINE_SHARE, MIN_LINE_BLOCKS, SLAB_ROWS, count_patterns

BLOCK = 16


def make_map(dense, *, q_len=None, kv_len=None):
    rows, columns = dense.shape[2:]
    return BlockMap.from_dense(dense, q_len=q_len or rows * BLOCK, kv_len=kv_len or columns * BLOCK, block_size=BLOCK)


def patterns_by_definition(block_map, batch, head, config):
    """The names of all blocks, in plain loops; None for a block that is not kept."""
    rows, columns = block_map.shape[2:]
    kept = block_map.to_dense()[batch, head].tolist()
    visible = visible_blocks(block_map.geometry, "cpu").tolist()
    first_last = rows - config.last_full_blocks
    last = [I >= first_last and sum(kept[I]) == visible[I] for I in range(rows)]
    lines = {}
    for I in range(rows):
        for J in range(config.sink_blocks, visible[I] - config.window_blocks):
            if not last[I]:
                for line in (("column", J), ("diagonal", I - J)):
                    lines.setdefault(line, []).append(kept[I][J])

    def share(line):
        free = lines.get(line, [])
        found = sum(free) / max(1, len(free))
        return found if len(free) >= MIN_LINE_BLOCKS and found >= LINE_SHARE else 0

    def name(I, J):
        if not kept[I][J]:
            return None
        if J < config.sink_blocks:
            return "sink"
        if J >= visible[I] - config.window_blocks:
            return "window"
        if last[I]:
            return "last"
        vertical, slash = share(("column", J)), share(("diagonal", I - J))
        if not vertical and not slash:
            return "scattered"
        return "vertical" if vertical >= slash else "slash"

    return [[name(I, J) for J in range(columns)] for I in range(rows)]


def draw_map(data, most):
    """A map [1, 2, M, N] with some lines, and settings; lengths that end within a block, offsets of no whole blocks."""
    rows = data.draw(st.integers(1, most))
    columns = rows + data.draw(st.integers(0, most // 2))
    q_len = rows * BLOCK - data.draw(st.integers(0, BLOCK - 1))
    kv_len = columns * BLOCK - data.draw(st.integers(0, BLOCK - 1))
    kv_len = max(q_len, kv_len)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dense = torch.rand(1, 2, rows, columns, generator=generator) < data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]))
    I, J = torch.arange(rows)[:, None], torch.arange(columns)
    for _ in range(data.draw(st.integers(0, 3))):
        dense |= data.draw(st.integers(0, columns)) == J
        dense |= I - J == data.draw(st.integers(-columns, rows))
    config = PrefillConfig(
        block_size=BLOCK,
        sink_blocks=data.draw(st.integers(0, columns + 2)),
        window_blocks=data.draw(st.integers(0, 4)),
        last_full_blocks=data.draw(st.integers(0, 3)),
    )
    dense[:, :, rows - config.last_full_blocks :] |= data.draw(st.booleans())
    dense[:, 1] |= data.draw(st.booleans())  # a head that keeps everything
    return make_map(dense, q_len=q_len, kv_len=kv_len), config


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_block_is_of_the_pattern_that_the_rule_names(data):
    block_map, config = draw_map(data, 24)
    for head in range(2):
        codes = block_patterns(block_map, head, config=config).tolist()
        names = [[PATTERNS[code - 1] if code else None for code in row] for row in codes]
        assert names == patterns_by_definition(block_map, 0, head, config)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_counted_patterns_are_those_of_the_blocks(data):
    # more blocks than a word and a group of rows have
    block_map, config = draw_map(data, 200)
    config = data.draw(st.sampled_from([config, None]))
    counted = count_patterns(block_map, config=config)
    assert counted.shape == (1, 2, len(PATTERNS)) and counted.dtype == torch.int64
    for head in range(2):
        codes = block_patterns(block_map, head, config=config)
        assert counted[0, head].tolist() == torch.bincount(codes.flatten(), minlength=7)[1:].tolist()


def test_patterns_are_counted_some_heads_at_a_time(monkeypatch):
    dense = torch.rand(2, 3, 70, 130, generator=torch.Generator().manual_seed(0)) < 0.5
    block_map = make_map(dense)
    whole = count_patterns(block_map)
    monkeypatch.setattr("flexprefill.inspection.patterns.WORDS_AT_A_TIME", 1)
    assert count_patterns(block_map).equal(whole)
    assert count_patterns(BlockMap(block_map.words[:, :1].expand(2, 3, -1, -1), *block_map.geometry)).equal(
        whole[:, :1].expand(2, 3, -1)
    )


def test_a_head_that_keeps_everything_is_dense():
    dense = torch.ones(1, 3, 40, 50, dtype=torch.bool)
    dense[0, 1, 39, 0] = False
    dense[0, 2] = dense[0, 2].tril(10)  # all but the causal future
    assert [summary.dense for summary in summarize_heads(make_map(dense))] == [True, False, True]
    assert [summary.to_dict()["dense"] for summary in summarize_heads(make_map(dense))] == [True, False, True]


def test_verticals_slashes_and_scattered_blocks_are_told_apart():
    size = 600  # more query blocks than are worked through at a time
    assert size > SLAB_ROWS
    I, J = torch.arange(size)[:, None], torch.arange(size)
    dense = (J < 2) | (I - J < 4) | (J == 40) | (I - J == 70) | (I >= size - 1)
    dense[500, 300] = True
    config = PrefillConfig(last_full_blocks=1)
    codes = block_patterns(make_map(dense[None, None]), 0, config=config)
    name = {None: 0, **{pattern: code for code, pattern in enumerate(PATTERNS, 1)}}
    expected = {
        (200, 1): "sink", (599, 0): "sink", (200, 197): "window", (599, 596): "window", (599, 40): "last",
        (599, 595): "last", (598, 40): "vertical", (44, 40): "vertical", (598, 528): "slash", (72, 2): "slash",
        (110, 40): "vertical", (500, 300): "scattered", (200, 100): None, (100, 200): None,
    }  # fmt: skip
    assert {place: codes[place].item() for place in expected} == {place: name[kind] for place, kind in expected.items()}
    # where the settings are not known, last rows are not
    assert name["last"] not in block_patterns(make_map(dense[None, None]), 0).unique()
    assert block_patterns(make_map(dense[None, None]), 0)[599, 300] == name["scattered"]


def test_a_last_row_that_does_not_keep_everything_is_none():
    dense = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    dense[..., 19, 10] = False
    codes = block_patterns(make_map(dense), 0, config=PrefillConfig(last_full_blocks=2))
    last = 1 + PATTERNS.index("last")
    assert (codes[18] == last).any() and not (codes[19] == last).any()


def test_summaries_are_of_their_heads():
    dense = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    dense[1, 1] = False
    block_map = make_map(dense, q_len=40 * BLOCK - 3, kv_len=50 * BLOCK - 5)
    config = PrefillConfig(sink_blocks=1, window_blocks=2, last_full_blocks=0)
    summaries = summarize_heads(block_map, config=config)
    kept = block_map.to_dense()
    assert [(summary.batch, summary.head) for summary in summaries] == [(b, h) for b in range(2) for h in range(3)]
    for summary in summaries:
        blocks = kept[summary.batch, summary.head]
        assert summary.kept == blocks.sum() and summary.counts.tolist() == blocks.sum(1).tolist()
        assert summary.density == pytest.approx(block_map.density()[summary.batch, summary.head].item())
        assert summary.patterns["sink"] == blocks[:, 0].sum()
        assert sum(summary.shares.values()) == pytest.approx(float(summary.kept > 0))
        read = json.loads(json.dumps(summary.to_dict()))
        assert read["counts"] == summary.counts.tolist() and read["patterns"] == summary.patterns


def test_differences_are_counted_by_head():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 40, 40, generator=generator).tril() > 0.5 for _ in range(2))
    first[0, 1] = second[0, 1] = False
    difference = compare_maps(make_map(first), make_map(second))
    assert difference.both.equal((first & second).sum((2, 3)))
    assert difference.only_first.equal((first & ~second).sum((2, 3)))
    assert difference.only_second.equal((second & ~first).sum((2, 3)))
    union = (first | second).sum((2, 3)).double()
    expected = torch.where(union > 0, (first & second).sum((2, 3)) / union, 1)
    torch.testing.assert_close(difference.iou, expected)
    assert not difference.equal and compare_maps(make_map(first), make_map(first)).equal
    read = json.loads(json.dumps(difference.to_dict()))
    assert not read["equal"] and read["heads"][5]["only_first"] == difference.only_first[1, 2]


def test_one_block_more_in_one_map_is_a_difference():
    dense = torch.zeros(1, 2, 40, 40, dtype=torch.bool)
    more = dense.clone()
    more[0, 1, 39, 39] = True
    assert not compare_maps(make_map(dense), make_map(more)).equal
    assert not compare_maps(make_map(more), make_map(dense)).equal


def test_similarity_is_of_all_pairs_of_heads():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, 3, 40, 40, generator=generator).tril() > 0.4
    second = torch.rand(2, 2, 40, 40, generator=generator).tril() > 0.6
    for other in (first, second):
        same = other is first
        found = head_similarity(make_map(first), None if same else make_map(other))
        shared = (first[:, :, None] & other[:, None]).sum((-1, -2))
        union = (first[:, :, None] | other[:, None]).sum((-1, -2))
        torch.testing.assert_close(found, shared.double() / union)
    assert head_similarity(make_map(torch.zeros(1, 2, 3, 3, dtype=torch.bool))).eq(1).all()


def test_what_cannot_be_inspected_is_refused():
    block_map = make_map(torch.ones(1, 2, 3, 3, dtype=torch.bool))
    longer = make_map(torch.ones(1, 2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="head must be one of 0 … 1, got 2"):
        block_patterns(block_map, 2)
    with pytest.raises(ValueError, match="batch must be one of 0 … 0, got -1"):
        block_patterns(block_map, 0, batch=-1)
    with pytest.raises(TypeError, match="config must be a PrefillConfig, got dict"):
        block_patterns(block_map, 0, config={})
    with pytest.raises(TypeError, match="block_map must be a BlockMap, got Tensor"):
        summarize_heads(torch.ones(1))
    with pytest.raises(TypeError, match="config must be a PrefillConfig, got dict"):
        summarize_heads(block_map, config={})
    with pytest.raises(TypeError, match="second must be a BlockMap, got NoneType"):
        compare_maps(block_map, None)
    with pytest.raises(ValueError, match="maps of one shape and length"):
        compare_maps(block_map, longer)
    with pytest.raises(ValueError, match="second must have first's q_len 48, got 64"):
        head_similarity(block_map, longer)


@pytest.mark.gpu
def test_maps_on_the_device_are_summarized_alike():
    first, second = (torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in range(2))
    sizes = {"q_len": 70 * BLOCK - 3, "kv_len": 90 * BLOCK - 5}
    maps = [make_map(dense, **sizes) for dense in (first, second)]
    there = [block_map.to("cuda") for block_map in maps]
    for here, found in zip(summarize_heads(maps[0]), summarize_heads(there[0]), strict=True):
        assert here.to_dict() == found.to_dict()
    assert compare_maps(*there).to_dict() == compare_maps(*maps).to_dict()
    assert head_similarity(*there).equal(head_similarity(*maps))
