"""Which inputs are measured, and at which density."""

from dataclasses import replace

import pytest
import torch

import flexprefill
from flexprefill import PrefillConfig
from flexprefill.bench import inputs
from flexprefill.bench.inputs import make_case, make_qkv
from flexprefill.bench.settings import DENSITIES, default_density

RULE = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=0)


@pytest.fixture
def searches(monkeypatch):
    """The configs that were searched."""
    seen = []

    def search(query, key, config):
        seen.append(config)
        return flexprefill.search_blocks(query, key, config)

    monkeypatch.setattr(inputs, "search_blocks", search)
    return seen


@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_alpha_is_found_for_a_density(density, searches):
    qkv = make_qkv(1000, 2, 1, 32, torch.float32, torch.device("cpu"))
    case = make_case(qkv, density, RULE)
    assert case.block_map.density().mean().item() == pytest.approx(density, abs=0.01)
    assert case.block_map == flexprefill.search_blocks(case.query, case.key, case.config)
    assert replace(case.config, alpha=RULE.alpha) == RULE and len(searches) <= 20


def test_the_nearest_map_is_taken_where_none_is_close(searches):
    # two blocks a side, of which the one off the diagonal is open: densities are 2/3 and 1
    ones = torch.ones(1, 1, 16, 32)
    qkv = torch.cat([ones, ones], 2), torch.cat([-ones, ones], 2), torch.cat([ones, ones], 2)
    settings = replace(RULE, sink_blocks=0)
    assert make_case(qkv, 0.7, settings).block_map.density().item() == pytest.approx(2 / 3)
    assert make_case(qkv, 0.97, settings).block_map.density().item() == 1
    assert len(searches) <= 40


def test_a_density_below_what_is_always_kept_is_not_bisected(searches):
    qkv = make_qkv(1000, 2, 1, 32, torch.float32, torch.device("cpu"))
    case = make_case(qkv, 0.1, replace(RULE, window_blocks=20))
    assert case.config.alpha == 1 and len(searches) == 1


def test_densities_between_the_known_are_straight_in_log_log():
    assert default_density("cuda", 4096) == 0.46 and default_density("cuda", 262144) == 0.017
    assert default_density("cuda", 2**12.5) == pytest.approx((0.46 * 0.25) ** 0.5)
    assert default_density("cuda", 1000) == 0.46 and default_density("cuda", 10**6) == 0.017
    assert {default_density("cpu", length) for length in (128, 3000, 10**6)} == {0.1}
    assert list(DENSITIES["cuda"]) == [4096 * 2**i for i in range(7)]
