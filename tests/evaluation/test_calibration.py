"""Alphas by head: the search with them, and their calibration to a recall."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device_calls import waits_are_errors
from support.inputs import DEVICE, make_qkv

from flexprefill import (
    FlexPrefillError,
    PrefillConfig,
    attention_recall,
    load_masks,
    read_mask_info,
    save_masks,
    search_blocks,
)
from flexprefill.cli import main
from flexprefill.config import save_layers
from flexprefill.evaluation import Decoder, ModelSizes, babble, calibrate, save_model
from flexprefill.evaluation.calibration import STEPS, calibrate_decoder, steps_of
from flexprefill.evaluation.methods import make_methods
from flexprefill.search.rule import Rule, log2_alphas_on

LEAN = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)
ALPHAS = (0.9, 0.01, 0.4, 1.0)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_each_head_is_searched_with_its_own_alpha(implementation):
    @settings(deadline=None, max_examples=20 if implementation == "reference" else 4)
    @given(st.integers(1, 150 if implementation == "reference" else 70), st.sampled_from([0, 3]), st.integers(0, 2**31))
    def check(length, min_blocks, seed):
        query, key, _ = make_qkv(length, heads=4, kv_heads=2, head_dim=16, batch=2, device=DEVICE, seed=seed)
        config = replace(LEAN, alpha=ALPHAS, min_blocks=min_blocks)
        found = search_blocks(query, key, config, implementation=implementation)
        for head, alpha in enumerate(ALPHAS):
            alone = search_blocks(query, key, replace(config, alpha=alpha), implementation=implementation)
            assert torch.equal(found.words[:, head], alone.words[:, head])

    check()


def test_a_search_with_alphas_is_traced():
    query, key, _ = make_qkv(200, heads=4, kv_heads=2, head_dim=16, device=DEVICE)
    config = replace(LEAN, alpha=ALPHAS)
    compiled = torch.compile(lambda *tensors: search_blocks(*tensors, config).words, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, key), search_blocks(query, key, config).words)


def test_heads_that_share_a_mask_share_an_alpha():
    query, key, _ = make_qkv(200, heads=4, kv_heads=2, head_dim=16, device=DEVICE)
    config = replace(LEAN, alpha=(0.9, 0.9, 0.05, 0.05), mask_heads="kv")
    for implementation in ("reference", "triton"):
        found = search_blocks(query, key, config, implementation=implementation)
        for head, alpha in ((1, 0.9), (2, 0.05)):
            alone = search_blocks(query, key, replace(config, alpha=alpha), implementation=implementation)
            assert torch.equal(found.words[:, head], alone.words[:, head])
    with pytest.raises(ValueError, match="must be the same for the 2 query heads that share a mask"):
        search_blocks(query, key, replace(config, alpha=ALPHAS))
    with pytest.raises(ValueError, match="one for each of the Hq=4 query heads, got 2"):
        search_blocks(query, key, replace(LEAN, alpha=(0.1, 0.2)))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, dtype", [(128, torch.bfloat16), (64, torch.float16), (96, torch.float32)])
def test_each_kernel_takes_an_alpha_for_each_head(head_dim, dtype):
    query, key, _ = make_qkv(5000, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, batch=2, device="cuda")
    found = search_blocks(query, key, PrefillConfig(alpha=ALPHAS))
    for head, alpha in enumerate(ALPHAS):
        assert torch.equal(found.words[:, head], search_blocks(query, key, PrefillConfig(alpha=alpha)).words[:, head])
    with waits_are_errors():
        search_blocks(query, key, PrefillConfig(alpha=ALPHAS))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = search_blocks(query, key, PrefillConfig(alpha=ALPHAS))
    graph.replay()
    assert captured == found
    # by the definition, but for blocks at the threshold
    if dtype == torch.float32:
        defined = search_blocks(query, key, PrefillConfig(alpha=ALPHAS), implementation="reference")
        assert (defined ^ found).density().max() < 1e-3


@pytest.mark.gpu
def test_alphas_reach_the_device_without_a_wait():
    # numbers that no other test has, of which nothing is kept yet
    rule = Rule.of(PrefillConfig(alpha=(0.123, 0.456)), scale=1.0, last_chunk=True)
    with waits_are_errors():
        found = log2_alphas_on(torch.device("cuda"), rule)
    assert torch.equal(found.cpu(), torch.tensor(rule.log2_alphas))


def test_alphas_are_checked_and_kept():
    for alpha, error, message in (
        ((), ValueError, r"alpha must be .* one for each query head, got \(\)"),
        ((0.1, 2), ValueError, r"alpha must be in \(0, 1\], got 2"),
        ((0.1, "x"), TypeError, "alpha must be a number .* got 'x'"),
    ):
        with pytest.raises(error, match=message):
            PrefillConfig(alpha=alpha)
    config = PrefillConfig(alpha=[0.25, 0.5])
    assert config.alpha == (0.25, 0.5) and hash(config) == hash(PrefillConfig(alpha=(0.25, 0.5)))
    assert PrefillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_file_of_masks_keeps_the_alphas(tmp_path):
    query, key, _ = make_qkv(200, heads=4, kv_heads=2, head_dim=16)
    path, config = tmp_path / "masks.safetensors", replace(LEAN, alpha=ALPHAS)
    masks = {0: search_blocks(query, key, config)}
    save_masks(path, masks, config=config)
    assert read_mask_info(path).config == config and load_masks(path, config=config) == masks
    with pytest.raises(FlexPrefillError, match="config"):
        load_masks(path, config=replace(config, alpha=ALPHAS[::-1]))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_callers_defaults_change_no_alpha(implementation):
    query, key, _ = make_qkv(200, heads=4, kv_heads=2, head_dim=16, device=DEVICE)
    query = 4 * query  # scores far apart, some of them between an alpha and its log2 in bfloat16
    # an alpha more each, so that nothing was kept of an earlier search
    others = (-4.016, -8.029) if implementation == "triton" else (-4.015, -8.028)
    config = replace(LEAN, alpha=tuple(2**log2 for log2 in (-8.031, -16.06, *others)))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            kept = log2_alphas_on(query.device, Rule.of(config, scale=1.0, last_chunk=True))
        found = search_blocks(query, key, config, implementation=implementation)
    finally:
        torch.set_default_dtype(torch.float32)
    assert kept.device == query.device and kept.dtype == torch.float32
    assert torch.equal(kept.cpu(), torch.tensor(config.log2_alphas))
    for head, alpha in enumerate(config.alpha):
        alone = search_blocks(query, key, replace(config, alpha=alpha), implementation=implementation)
        assert torch.equal(found.words[:, head], alone.words[:, head])


def inputs(seed, length=300):
    query, key, _ = make_qkv(length, heads=4, kv_heads=2, head_dim=16, device=DEVICE, seed=seed)
    return query * torch.tensor([0.5, 1.0, 2.0, 3.0], device=DEVICE)[:, None, None], key


@pytest.mark.parametrize("mask_heads", ["query", "kv"])
def test_calibrated_alphas_are_the_largest_that_keep_the_recall(mask_heads):
    texts, calls = [inputs(1), inputs(2)], []
    rule = replace(LEAN, mask_heads=mask_heads)
    (config,) = calibrate([texts], 0.8, rule, every=1, advance=calls.append)
    assert len(calls) == steps_of(1) == STEPS + 1

    def recall(alpha):
        rows = range(300 - 16)
        maps = (search_blocks(query, key, replace(config, alpha=alpha)) for query, key in texts)
        pairs = zip(texts, maps, strict=True)
        return torch.stack([attention_recall(*text, found, rows=rows).mean[0] for text, found in pairs]).amin(0)

    kept = recall(config.alpha)
    assert (kept >= 0.8).all() and len(set(config.alpha)) == (4 if mask_heads == "query" else 2)
    # an octave more, of a bisection that ends within less, is too much
    more = recall(tuple(min(1.0, 2 * alpha) for alpha in config.alpha))
    at_most = torch.tensor([alpha == 1 for alpha in config.alpha])
    if mask_heads == "kv":
        more = more.unflatten(0, (2, 2)).amin(1).repeat_interleave(2)
    assert ((more.cpu() < 0.8) | at_most).all()


def test_layers_are_kept_in_a_file(tmp_path):
    path, configs = tmp_path / "layers.json", [PrefillConfig(alpha=(0.1, 0.2)), PrefillConfig(alpha=0.3, min_blocks=2)]
    save_layers(path, configs, recall=0.9)
    assert PrefillConfig.load_layers(path) == dict(enumerate(configs))
    kinds = "[]", "{}", '""', "3", '{"0": {}}', "[[]]", '[{"alpha": [0.1, 2]}]', '[{"beta": 1}]'
    of_this_format = [f'{{"format": "flexprefill layers 1", "layers": {layers}}}' for layers in kinds]
    others = "{}", "[", "[" * 100_000, "3", '{"format": "flexprefill layers 9", "layers": [{}]}'
    for text in (*others, '{"format": "flexprefill layers 1"}', *of_this_format):
        path.write_text(text)
        with pytest.raises(FlexPrefillError, match="is no file of 'flexprefill layers 1'"):
            PrefillConfig.load_layers(path)
    with pytest.raises(ValueError, match="configs must be of one layer or more"):
        save_layers(path, [])


def test_eval_refuses_configs_that_do_not_fit_the_model(tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_model(Decoder(ModelSizes(width=32, layers=2, heads=2, kv_heads=1, hidden=32)), file)
    (tmp_path / "other").mkdir()
    fitting, fewer, wide = tmp_path / "fitting.json", tmp_path / "fewer.json", tmp_path / "wide.json"
    same_name = tmp_path / "other" / "fitting.json"
    for path, layers, heads in ((fitting, 2, 2), (fewer, 1, 2), (wide, 2, 3), (same_name, 2, 2)):
        save_layers(path, [PrefillConfig(alpha=(0.1,) * heads)] * layers)
    for paths, message in (
        ([fewer], "fewer must be of the model's 2 layers, got 1"),
        ([wide], "wide does not fit the model's layer 0: config.alpha .* Hq=2 query heads, got 3"),
        ([fitting, same_name], "must have another name: an earlier --config is named 'fitting' too"),
    ):
        options = [word for path in paths for word in ("--config", path)]
        with pytest.raises(SystemExit):
            main(["eval", *map(str, ["--model", file, "--device", "cpu", "--output", tmp_path, *options])])
        assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_the_command_calibrates_a_model_and_eval_takes_what_it_wrote(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = ModelSizes(width=64, layers=2, heads=2, kv_heads=1, hidden=64)
    model = Decoder(sizes)
    save_model(model, tmp_path / "model.safetensors", dtype=torch.float32)
    (tmp_path / "text").write_bytes(bytes(babble(5000).tolist()))
    written = tmp_path / "new" / "calibrated.json"
    options = ["--model", tmp_path / "model.safetensors", "--text", tmp_path / "text", "--device", "cpu"]
    asked = ["--length", "600", "--texts", "2", "--recall", "0.9", "--output", written]
    assert main(["calibrate", *map(str, options + asked)]) == 0
    assert "head 1" in capsys.readouterr().out
    configs = PrefillConfig.load_layers(written)
    assert len(configs) == 2 and all(len(config.alpha) == 2 for config in configs.values())
    methods = make_methods([0.1], ["dense"], calibrated={"mine": configs})
    assert methods[1].name == "calibrated mine" and methods[1].of_layer(1).config == configs[1]
    with pytest.raises(SystemExit):
        main(["calibrate", *map(str, [*options, "--length", "9000"])])
    assert "at least 9000 bytes, got 5000" in capsys.readouterr().err
    tokens = [babble(5000)[:300].long()[None]]
    assert len(calibrate_decoder(model, tokens, 0.5)) == 2


def test_what_calibrate_refuses():
    with pytest.raises(ValueError, match=r"recall must be in \(0, 1\), got 1"):
        calibrate([[inputs(0)]], 1)
    with pytest.raises(ValueError, match="at least one text each"):
        calibrate([[]], 0.5)
