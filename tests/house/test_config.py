import dataclasses
import json
import math

import numpy as np
import pytest

from flexprefill import AttentionVariant, BlockMap, PrefillConfig
from flexprefill.config import PUBLISHED


def test_defaults_are_those_of_the_design():
    assert PrefillConfig().to_dict() == {
        "alpha": 0.1,
        "block_size": 128,
        "sink_blocks": 2,
        "window_blocks": 4,
        "last_full_blocks": 2,
        "min_blocks": 0,
    }


def test_is_hashable_frozen_and_survives_a_dictionary():
    config = PrefillConfig(alpha=0.3, block_size=64, min_blocks=5)
    assert PrefillConfig.from_dict(config.to_dict()) == config
    assert len({config, PrefillConfig.from_dict(config.to_dict()), PrefillConfig()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.5
    assert PrefillConfig.from_dict({"alpha": 0.5}) == PrefillConfig(alpha=0.5)


def test_settings_are_written_only_where_they_are_used():
    for changes in (
        {"mask_heads": "kv"}, {"score_rows": "visible"}, {"scorer": "not registered here"}, {"mean_correction": True},
    ):  # fmt: skip
        config = PrefillConfig.from_dict(changes)
        assert (
            config.to_dict() == PrefillConfig().to_dict() | changes
            and PrefillConfig.from_dict(config.to_dict()) == config
        )


def test_dense_below_is_written_only_where_it_is_set():
    assert PrefillConfig().dense_below is None and "dense_below" not in PrefillConfig().to_dict()
    for tokens in (0, 4096):
        config = PrefillConfig(dense_below=tokens)
        assert config.to_dict()["dense_below"] == tokens and PrefillConfig.from_dict(config.to_dict()) == config
    assert PrefillConfig.from_dict({"dense_below": None}) == PrefillConfig()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"alpha": 0}, ValueError),
        ({"alpha": -0.1}, ValueError),
        ({"alpha": 1.0001}, ValueError),
        ({"alpha": math.nan}, ValueError),
        ({"alpha": "0.1"}, TypeError),
        ({"alpha": True}, TypeError),
        ({"block_size": 100}, ValueError),
        ({"block_size": 0}, ValueError),
        ({"block_size": 256}, ValueError),
        ({"block_size": 128.0}, TypeError),
        ({"sink_blocks": -1}, ValueError),
        ({"window_blocks": -1}, ValueError),
        ({"last_full_blocks": 1.5}, TypeError),
        ({"min_blocks": 2**31}, ValueError),
        ({"min_blocks": None}, TypeError),
        ({"dense_below": -1}, ValueError),
        ({"dense_below": 2.0}, TypeError),
        ({"dense_below": True}, TypeError),
        ({"mask_heads": "key"}, ValueError),
        ({"score_rows": None}, ValueError),
        ({"scorer": 3}, TypeError),
        ({"scorer": ""}, TypeError),
        ({"mean_correction": 1}, TypeError),
    ],
)
def test_a_bad_setting_is_named(settings, error):
    (name, got), *_ = settings.items()
    with pytest.raises(error, match=name) as raised:
        PrefillConfig(**settings)
    assert repr(got) in str(raised.value)


def test_unknown_names_in_a_dictionary_are_refused():
    with pytest.raises(ValueError, match="sinks"):
        PrefillConfig.from_dict({"sinks": 2})


@pytest.mark.parametrize(
    ("model", "alpha"),
    [
        ("Llama-3.1-8B", 0.18),
        ("meta-llama/Llama-3.1-8B-Instruct", 0.18),
        ("meta-llama/Meta-Llama-3.1-8B", 0.18),
        ("qwen/qwen2.5-7b-instruct-1m", 0.08),
        ("Qwen3-30B-A3B", 0.12),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 0.10),
        ("Qwen3-VL", 0.22),
    ],
)
def test_published_settings(model, alpha):
    assert PrefillConfig.published(model) == PrefillConfig(alpha=alpha)


def test_published_v2_and_unknown_models():
    assert PrefillConfig.published("FlashPrefill-V2") == PrefillConfig(alpha=0.1, last_full_blocks=8)
    with pytest.raises(ValueError, match="Mistral") as raised:
        PrefillConfig.published("Mistral-7B")
    assert all(name in str(raised.value) for name in PUBLISHED)


def test_numbers_of_numpy_are_taken_as_pythons():
    config = PrefillConfig(
        alpha=np.float32(0.5), block_size=np.int64(64), guard=np.float64(0.75), dense_below=np.int8(3)
    )
    assert config == PrefillConfig(alpha=0.5, block_size=64, guard=0.75, dense_below=3)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert {type(setting) for setting in (config.alpha, config.block_size, config.guard)} == {float, int}
    assert PrefillConfig(alpha=(np.float64(0.5), 0.25)).alpha == (0.5, 0.25)
    variant = AttentionVariant(sliding_window=np.int32(5), soft_cap=np.float32(2))
    assert variant == AttentionVariant(sliding_window=5, soft_cap=2.0)
    block_map = BlockMap.causal(1, 1, q_len=np.int64(100), kv_len=np.int64(120), block_size=np.int32(16))
    assert block_map == BlockMap.causal(1, 1, q_len=100, kv_len=120, block_size=16)
    for wrong in (np.bool_(True), np.array([64])):
        with pytest.raises(TypeError, match="block_size must be an int"):
            PrefillConfig(block_size=wrong)


def test_a_scorer_that_is_misspelt_is_refused_where_it_is_named():
    with pytest.raises(ValueError, match=r"scorer must be one of \['exact', .*got 'xatention'; register_scorer"):
        PrefillConfig(scorer="xatention")
    # a file may be read where its scorer is not registered
    assert PrefillConfig.from_dict({"scorer": "somebody's", "alpha": 0.3}).scorer == "somebody's"
