"""The floors: each part's work, and the rates of a card."""

import sys
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from flexprefill import BlockMap, FlexPrefillError, PrefillConfig
from flexprefill.bench import floors
from flexprefill.bench.inputs import Case, make_qkv

RATES = floors.Rates(matrix_flops=1e12, exponentials=1e9, bytes=1e10, cache_bytes=1000)


def test_the_slowest_of_a_works_rates_is_its_floor():
    assert floors.floor_of(floors.Work(2e9, 1e6, 1e7), RATES) == floors.Floor(2.0, "matrix")
    assert floors.floor_of(floors.Work(2e9, 3e6, 1e7), RATES) == floors.Floor(3.0, "exponentials")
    assert floors.floor_of(floors.Work(0.0, 0.0, 4e7), RATES) == floors.Floor(4.0, "bytes")


def test_bytes_that_the_cache_holds_bound_nothing():
    assert floors.floor_of(floors.Work(0.0, 0.0, 1000), RATES) is None
    assert floors.floor_of(floors.Work(0.0, 0.0, 1001), RATES).bound == "bytes"


def test_work_without_a_known_matrix_rate_has_no_floor():
    assert floors.floor_of(floors.Work(None, 1e6, 1e7), RATES) is None


def four_blocks(dtype):
    """4 blocks of 128, 4 query and 2 key heads, D 64; each row keeps its first block and the diagonal."""
    qkv = make_qkv(512, 4, 2, 64, dtype, torch.device("cpu"))
    config = PrefillConfig(alpha=1.0, sink_blocks=1, window_blocks=1, last_full_blocks=0)
    kept = torch.eye(4, dtype=torch.bool)
    kept[:, 0] = True
    block_map = BlockMap.from_dense(kept.expand(1, 4, 4, 4), q_len=512, kv_len=512, block_size=128)
    return Case(*qkv, config, block_map)


def test_each_parts_work_is_counted():
    case = four_blocks(torch.bfloat16)
    means = 2 * 4 * 64 * 2  # key heads, blocks, D, bytes
    words = 4 * 4 * 1 * 4
    assert floors.pooling_work(case) == floors.Work(0, 0, 2 * 512 * 64 * 2 + means)
    # the first two rows keep all whatever the scores; the others see 3 and 4 blocks, in each of 4 heads
    pairs = 4 * (3 + 4)
    query = 4 * 512 * 64 * 2
    assert floors.scoring_work(case) == floors.Work(2 * 64 * 128 * pairs, 128 * pairs, query / 2 + means + words)
    assert floors.lists_work(case) == floors.Work(0, 0, words + 2 * 4 * (4 * 4 * 4 + 4 * 4))
    traffic = 2 * query + 2 * (2 * 512 * 64 * 2)
    kept, causal = (4 * n * 128 * 128 for n in (1 + 2 + 2 + 2, 1 + 2 + 3 + 4))
    assert floors.sparse_attention_work(case) == floors.Work(4 * 64 * kept, kept, traffic)
    assert floors.dense_attention_work(case) == floors.Work(4 * 64 * causal, causal, traffic)
    parts = floors.pooling_work(case), floors.scoring_work(case), floors.sparse_attention_work(case)
    assert floors.whole_work(case) == floors.Work(*(sum(amounts) for amounts in zip(*map(astuple, parts), strict=True)))


def test_float32_has_no_matrix_floor():
    case = four_blocks(torch.float32)
    assert floors.scoring_work(case).matrix_flops is None and floors.dense_attention_work(case).matrix_flops is None
    assert floors.pooling_work(case).matrix_flops == 0 and floors.whole_work(case).matrix_flops is None


def make_card(monkeypatch, told, capability=(9, 0)):
    card = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=132, L2_cache_size=50 * 2**20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    driver = SimpleNamespace(active=SimpleNamespace(utils=SimpleNamespace(get_device_properties=lambda index: told)))
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=driver))


def test_rates_follow_from_what_the_driver_tells(monkeypatch):
    make_card(monkeypatch, {"sm_clock_rate": 1_980_000, "mem_clock_rate": 3_201_000, "mem_bus_width": 6144})
    rates = floors.read_rates(torch.device("cuda:0"))
    assert rates.matrix_flops == pytest.approx(1070.5e12, rel=1e-3)
    assert rates.exponentials == pytest.approx(4.18e12, rel=1e-3)
    assert rates.bytes == pytest.approx(4.917e12, rel=1e-3)
    assert rates.cache_bytes == 50 * 2**20


@pytest.mark.parametrize(
    "told, capability, message",
    [
        ({"sm_clock_rate": 0, "mem_clock_rate": 1, "mem_bus_width": 1}, (9, 0), "the driver does not tell its clocks"),
        ({}, (9, 0), "the driver does not tell its clocks: 'sm_clock_rate'"),
        ({}, (7, 5), "compute capability 7.5 are not known"),
    ],
)
def test_without_rates_the_reason_is_said(monkeypatch, told, capability, message):
    make_card(monkeypatch, told, capability)
    with pytest.raises(FlexPrefillError, match=message):
        floors.read_rates(torch.device("cuda:0"))
