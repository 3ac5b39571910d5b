"""The plug-in for vLLM without vLLM: planner, settings, refusals, pages, figures, recordings. Nothing is compiled."""

import copy
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexprefill import BlockMap, FlexPrefillError, PrefillConfig, load_masks, read_mask_info, search_blocks
from flexprefill.attention.dense import dense_attention
from flexprefill.attention.tail import TAIL_SPLIT_FROM
from flexprefill.config import save_layers
from flexprefill.integrations.vllm import record_request, report
from flexprefill.integrations.vllm.attend import ServedLayer, Sizes, attend_prompt, lengths_to_warm, warm_up
from flexprefill.integrations.vllm.figures import Figures, line_of
from flexprefill.integrations.vllm.layers import Model, layer_number, own_heads
from flexprefill.integrations.vllm.pages import gather_pages, gather_pages_of_cpu
from flexprefill.integrations.vllm.parts import part_of
from flexprefill.integrations.vllm.planner import Plan, Prompt, Run, plan_batch
from flexprefill.integrations.vllm.recording import Served
from flexprefill.integrations.vllm.refusals import against_batch, against_layer, against_parallelism
from flexprefill.integrations.vllm.settings import (
    DEFAULT_MIN_KEYS,
    DEFAULT_MIN_QUERIES,
    TWO_SIDED_MIN_KEYS,
    Settings,
)
from flexprefill.variant.variant import PLAIN

LIMITS = {"min_keys": 256, "min_queries": 128}


def test_a_mixed_batch_is_taken_apart():
    # two steps of decoding, a long prompt, a short one, a chunk behind a cache, and two requests that fill the batch up
    starts, lengths = [0, 1, 2, 1002, 1052, 1308, 1308, 1308], [700, 9000, 1000, 50, 4352, 0, 0]
    assert plan_batch(starts, lengths, **LIMITS) == Plan(
        prompts=(Prompt(2, 2, 1000, 1000), Prompt(4, 1052, 256, 4352)),
        runs=(Run((0, 2), (0, 2), 1, 9000), Run((3, 4), (1002, 1052), 50, 50)),
    )
    assert plan_batch([0, 1, 2], [9000, 9000], **LIMITS) is None
    assert plan_batch([0, 1000], [1000], **LIMITS) == Plan((Prompt(0, 0, 1000, 1000),), ())
    assert plan_batch([0, 127, 382], [9000, 255], **LIMITS) is None


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 400)), min_size=1, max_size=8))
def test_each_request_is_in_one_part(sizes):
    starts = [0, *itertools.accumulate(q_len for q_len, _ in sizes)]
    lengths = [q_len + cached for q_len, cached in sizes]
    plan = plan_batch(starts, lengths, **LIMITS) or Plan((), (Run((0, len(sizes)), (0, starts[-1]), 0, 0),))
    rows = [range(*run.rows) for run in plan.runs] + [[prompt.row] for prompt in plan.prompts]
    tokens = [range(*run.tokens) for run in plan.runs]
    tokens += [range(prompt.first, prompt.first + prompt.q_len) for prompt in plan.prompts]
    assert sorted(itertools.chain(*tokens)) == list(range(starts[-1]))
    assert len(list(itertools.chain(*rows))) == len(set(itertools.chain(*rows)))
    for row, (q_len, cached) in enumerate(sizes):
        is_long = q_len >= 128 and q_len + cached >= 256
        assert any(prompt.row == row for prompt in plan.prompts) == is_long


@pytest.mark.parametrize(
    ("starts", "lengths", "limits", "said"),
    [
        ([0, 1], [5, 5], {}, "starts must be one more than the requests, got 2 for 2"),
        ([5, 1], [5], {}, "starts must ascend, got 5 before 1"),
        ([0, 500], [400], {}, r"lengths\[0\] must be its 500 tokens in the batch or more, got 400"),
        ([0, 500], [500], {"min_queries": 1}, "min_queries must be 2 or more"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(starts, lengths, limits, said):
    with pytest.raises(ValueError, match=said):
        plan_batch(starts, lengths, **LIMITS | limits)


def common_metadata(**changes):
    """As much of vLLM's CommonAttentionMetadata as the plug-in reads, of requests of 1, 3 and 2 tokens."""
    known = {
        "query_start_loc": torch.tensor([0, 1, 4, 6]),
        "query_start_loc_cpu": torch.tensor([0, 1, 4, 6]),
        "seq_lens": torch.tensor([7, 3, 9]),
        "seq_lens_cpu_upper_bound": torch.tensor([7, 3, 9]),
        "block_table_tensor": torch.arange(6).view(3, 2),
        "slot_mapping": torch.arange(6),
        "positions": None,
        "causal": True,
        "num_reqs": 3,
        "num_actual_tokens": 6,
        "max_query_len": 3,
        "max_seq_len": 9,
        "_num_computed_tokens_cache": torch.tensor([6, 0, 7]),
        "mm_req_doc_ranges": None,
    }
    return SimpleNamespace(**known | changes)


def test_metadata_is_cut_by_requests_and_tokens():
    whole = common_metadata(positions=torch.arange(18).view(3, 6))
    before = copy.deepcopy(whole)
    part = part_of(whole, Run((1, 3), (1, 6), 3, 9))
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist() == [0, 3, 5]
    assert part.seq_lens.tolist() == [3, 9] and part.block_table_tensor.tolist() == [[2, 3], [4, 5]]
    assert part.slot_mapping.tolist() == [1, 2, 3, 4, 5] and part.positions.shape == (3, 5)
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len, part.max_seq_len) == (2, 5, 3, 9)
    assert part._num_computed_tokens_cache is None
    for name, was in vars(before).items():  # it is shared by all groups of layers
        assert torch.equal(getattr(whole, name), was) if isinstance(was, torch.Tensor) else getattr(whole, name) == was


@pytest.mark.parametrize(
    ("changes", "prefix", "said"),
    [
        ({}, 0, None),
        ({}, 256, "cascade"),
        ({"causal": False}, 0, "not causal"),
        ({"causal": torch.tensor([True])}, 0, "not causal"),
        ({"mm_req_doc_ranges": {0: [(1, 5)]}}, 0, "image"),
        ({"rswa_prefix_lens": torch.tensor([3])}, 0, "sliding-window"),
        ({"seq_lens_cpu_upper_bound": None}, 0, "lengths"),
    ],
)
def test_batches_that_stay_with_vllm(changes, prefix, said):
    reason = against_batch(common_metadata(**changes), prefix)
    assert reason is None if said is None else said in reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"logits_soft_cap": 30.0}, None),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"sliding_window": 128}, "sliding window"),
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "fp8_e4m3"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "shares"),
        ({"head_size": 512}, "512"),
    ],
)
def test_layers_that_stay_with_vllm(changes, said):
    arguments = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2, "attn_type": "decoder"}
    reason = against_layer(arguments | {"kv_cache_dtype": "auto"} | changes)
    assert reason is None if said is None else said in reason


def test_spread_keys_stay_with_vllm():
    assert against_parallelism(SimpleNamespace()) is None
    assert "decode context" in against_parallelism(SimpleNamespace(dcp_world_size=2))
    assert "prefill context" in against_parallelism(SimpleNamespace(dcp_world_size=1, pcp_world_size=2))


def test_nothing_is_asked_of_most_processes():
    code = "import sys; from flexprefill.integrations.vllm import plugin; plugin(); print('torch' in sys.modules)"
    without = {name: text for name, text in os.environ.items() if not name.startswith("FLEXPREFILL")}
    for switch in ({}, {"FLEXPREFILL": "off"}):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without | switch)
        assert done.stdout.strip() == "False", done.stderr
    assert Settings.read({}) is None and Settings.read({"FLEXPREFILL": "0"}) is None


def test_settings_are_read_from_the_environment(tmp_path):
    on = {"FLEXPREFILL": "On"}
    assert Settings.read(on) == Settings()
    assert Settings.read(on | {"FLEXPREFILL_CONFIG": "meta-llama/Llama-3.1-8B-Instruct"}).config.alpha == 0.18
    assert Settings.read(on | {"FLEXPREFILL_CONFIG": "recommended"}).config == PrefillConfig.recommended()
    inline = Settings.read(on | {"FLEXPREFILL_CONFIG": '{"alpha": 0.3}', "FLEXPREFILL_MIN_KEYS": "4096"})
    assert inline.config == PrefillConfig(alpha=0.3) and inline.keys_from == 4096
    file = tmp_path / "config.json"
    file.write_text('{"config": {"alpha": 0.2, "dense_below": 5000}, "layers": {"0": null, "3": {"alpha": 0.5}}}')
    mixed = Settings.read(on | {"FLEXPREFILL_CONFIG": str(file), "FLEXPREFILL_MIN_QUERIES": "77"})
    assert mixed.layers == {0: None, 3: PrefillConfig(alpha=0.5)} and (mixed.keys_from, mixed.min_queries) == (5000, 77)
    save_layers(file, [PrefillConfig(alpha=0.1), PrefillConfig(alpha=(0.2, 0.3))])
    assert Settings.read(on | {"FLEXPREFILL_CONFIG": str(file)}).layers[1].alpha == (0.2, 0.3)


def test_settings_reach_other_processes_whole():
    for settings in (
        Settings(),
        Settings(PrefillConfig(alpha=(0.25, 0.5), mask_heads="kv", guard=0.9), {2: None, 0: PrefillConfig()}, 300, 20),
    ):
        environment = {"FLEXPREFILL_MIN_KEYS": "1"}
        settings.write(environment)
        assert Settings.read(environment) == settings


@pytest.mark.parametrize(
    ("name", "text", "error", "said"),
    [
        ("FLEXPREFILL", "maybe", ValueError, "FLEXPREFILL must be one of on.*'maybe'"),
        ("FLEXPREFILL_CONFIG", "Llama-9", ValueError, "FLEXPREFILL_CONFIG must be a file that exists.*'Llama-9'"),
        ("FLEXPREFILL_CONFIG", '{"alfa": 1}', ValueError, "FLEXPREFILL_CONFIG must be the settings.*alfa"),
        ("FLEXPREFILL_CONFIG", '{"config": {}, "more": 1}', ValueError, r"beside config and layers it has \['more'\]"),
        ("FLEXPREFILL_CONFIG", "no/such.json", FileNotFoundError, "no/such.json"),
        ("FLEXPREFILL_MIN_KEYS", "many", ValueError, "FLEXPREFILL_MIN_KEYS must be a number of tokens, got 'many'"),
        ("FLEXPREFILL_MIN_QUERIES", "1", ValueError, "min_queries must be at least 2"),
    ],
)
def test_variables_that_say_nothing_known_are_refused(name, text, error, said):
    with pytest.raises(error, match=said):
        Settings.read({"FLEXPREFILL": "on", name: text})


def test_settings_of_a_wrong_kind_are_refused():
    for arguments, said in (
        ({"config": 0.1}, "config must be a PrefillConfig"),
        ({"layers": [PrefillConfig()]}, "layers must map"),
        ({"layers": {"0": None}}, "layers' index must be an int"),
        ({"layers": {0: 0.1}}, r"layers\[0\] must be a PrefillConfig or None"),
    ):
        with pytest.raises(TypeError, match=said):
            Settings(**arguments)


def test_thresholds_have_an_order():
    assert Settings().keys_from == DEFAULT_MIN_KEYS and Settings().min_queries == DEFAULT_MIN_QUERIES
    two_sided = PrefillConfig.recommended()
    assert Settings(two_sided).keys_from == Settings(layers={1: None, 2: two_sided}).keys_from == TWO_SIDED_MIN_KEYS
    assert Settings(replace(two_sided, dense_below=100)).keys_from == 100
    assert Settings(PrefillConfig(dense_below=0)).keys_from == 0
    assert Settings(PrefillConfig(dense_below=0), min_keys=9).keys_from == 9


def test_each_layer_has_its_settings():
    arguments = {"num_heads": 2, "scale": 0.125, "logits_soft_cap": 0}
    settings = Settings(None, {0: None, 1: PrefillConfig(alpha=(0.1, 0.2, 0.3, 0.4))})
    model = Model(settings, PrefillConfig.published("Qwen2.5-7B"), 4096, rank=1)
    assert model.layer(0, arguments) is None
    assert model.layer(1, arguments).config.alpha == (0.3, 0.4)  # of the second process's heads
    assert model.layer(7, arguments).config.alpha == 0.08
    assert model.layer(7, arguments).variant == PLAIN
    assert model.layer(7, arguments | {"logits_soft_cap": 30.0}).variant.soft_cap == 30
    assert len(model.kinds(arguments)) == 2  # a number, and one for each head
    assert (
        len(
            Model(Settings(None, {0: PrefillConfig(), 1: PrefillConfig(alpha=0.9)}), PrefillConfig(), 9).kinds(
                arguments
            )
        )
        == 1
    )
    shares = {number: replace(PrefillConfig.recommended(), probe_share=0.1 / (1 + number)) for number in range(3)}
    (kind,) = Model(Settings(PrefillConfig.recommended(), shares), PrefillConfig(), 9).kinds(arguments)
    assert kind.config.alpha is None and kind.config.two_sided  # what is compiled is what is served
    with pytest.raises(ValueError, match="one for each query head of the model, 3 of them in each process, got 4"):
        own_heads(PrefillConfig(alpha=(0.1, 0.2, 0.3, 0.4)), 3, 0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PrefillConfig(), None),
        (PrefillConfig.recommended(), "probes and outliers attend plainly"),
        (PrefillConfig(guard=0.9), "guard"),
        (PrefillConfig(scorer="xattention"), "xattention"),
    ],
)
def test_a_soft_cap_that_a_setting_cannot_search_stays_with_vllm(config, said):
    capped = {"num_heads": 2, "scale": 0.125, "logits_soft_cap": 30.0}
    model = Model(Settings(config, {1: None}), PrefillConfig(), 4096)
    assert model.against(1, capped) is None and model.against(0, capped | {"logits_soft_cap": 0.0}) is None
    if said is None:
        assert model.against(0, capped) is None and model.layer(0, capped).variant.soft_cap == 30
    else:
        assert said in model.against(0, capped) and model.layer(0, capped) is None and not model.kinds(capped)


def test_layers_are_numbered_by_their_names():
    assert [layer_number(name) for name in ("model.layers.31.self_attn.attn", "h.4", "attn")] == [31, 4, 0]


def pages_of(key, value, page, *, for_cpu):
    """A cache with shuffled pages that hold [Hkv, S, D], and the request's pages."""
    heads, length, dim = key.shape
    count = -(-length // page)
    order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(0))
    cache = torch.full((count + 3, heads, page, 2 * dim), torch.nan)
    for place in range(count):
        held = slice(place * page, min((place + 1) * page, length))
        keys, values = (torch.full((heads, page, dim), torch.nan) for _ in range(2))
        keys[:, : held.stop - held.start], values[:, : held.stop - held.start] = key[:, held], value[:, held]
        if for_cpu:
            whole = torch.cat([keys.transpose(1, 2).flatten(1), values.flatten(1)], 1)
            cache[order[place]] = whole.view(heads, page, 2 * dim)
        else:
            cache[order[place]] = torch.cat([keys, values], 2)
    return cache, order[: count + 2].to(torch.int32)


@pytest.mark.parametrize("length", [32, 33, 150, 160])
@pytest.mark.parametrize("gather", [gather_pages, gather_pages_of_cpu])
def test_pages_are_gathered_in_one_layout(gather, length):
    key, value = torch.randn(2, 3, length, 16)
    cache, pages = pages_of(key, value, 32, for_cpu=gather is gather_pages_of_cpu)
    stored = [cache, cache.transpose(1, 2).contiguous().transpose(1, 2)] if gather is gather_pages else [cache]
    for memory in stored:  # heads before tokens, and tokens before heads
        gathered = gather(memory, pages, length)
        assert all(torch.equal(got[0], wanted) for got, wanted in zip(gathered, (key, value), strict=True))
        width = 32 if gather is gather_pages else 16
        assert {got.stride() for got in gathered} == {(length * 3 * width, width, 3 * width, 1)}


def test_warming_up_meets_each_kind():
    on_cpu, on_gpu = list(lengths_to_warm(False, 8192)), list(lengths_to_warm(True, 131_072))
    assert len(on_cpu) == 4 and len(on_gpu) == 15 and set(on_cpu) < set(on_gpu)
    for at_offset, ragged in itertools.product((False, True), repeat=2):
        kind = [(q, kv) for q, kv in on_gpu if (q < kv, kv % 128 > 0) == (at_offset, ragged)]
        assert len(kind) >= 2 and len({q for q, _ in kind}) >= 2 and len({kv for _, kv in kind}) >= 2
    assert any(q == kv >= TAIL_SPLIT_FROM for q, kv in on_gpu), "a whole prompt whose tail is split"
    multiples = {(kv % 16 > 0, -(-kv // 128) % 16 > 0) for _, kv in on_gpu}
    assert multiples == set(itertools.product((False, True), repeat=2))
    assert max(kv for _, kv in lengths_to_warm(True, 4000)) <= 4000 and len(list(lengths_to_warm(False, 100))) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("last_full_blocks", [0, 2])
def test_no_prompt_compiles_on_a_warm_gpu(last_full_blocks, monkeypatch):
    import triton
    from torch._dynamo.callback import on_compile_start

    config, device = PrefillConfig(alpha=1e-30, last_full_blocks=last_full_blocks), torch.device("cuda")
    layer, sizes = ServedLayer(config, 128**-0.5), Sizes(8, 2, 128, torch.bfloat16, device, 131_072)
    compiled = []

    def note(fn, **others):
        compiled.append(fn.name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)  # Triton's own kernels
    with torch.inference_mode():
        warm_up(layer, sizes, gather_pages)
        compiled.clear()
        on_compile_start(compiled.append)
        for q_len, kv_len in (
            (2048, 2048),
            (1500, 1500),
            (1100, 9000),
            (2048, 8192),
            (3000, 40_000),
            (8192, 65_536),
            (2000, 100_000),
            (20_000, 20_000),
        ):
            key, value = torch.randn(2, 2, kv_len, 128, dtype=torch.bfloat16)
            cache, pages = pages_of(key, value, 16, for_cpu=False)
            query = torch.randn(q_len, 8, 128, dtype=torch.bfloat16, device=device)
            gathered = gather_pages(cache.nan_to_num().to(device, torch.bfloat16), pages.to(device), kv_len)
            output, kept = attend_prompt(layer, query, *gathered)
            assert kept.density().min() == 1
            heads_first = query[None].transpose(1, 2)
            exact = dense_attention(heads_first, *gathered, scale=layer.scale, kernel="dense-sdpa")
            assert (output - exact[0].transpose(0, 1)).abs().max() < 0.05
    assert compiled == []


def chunk(q_len, kv_len, *, row=0, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, heads, length, 16, generator=generator) for length in (q_len, kv_len))
    kept = search_blocks(query, key, PrefillConfig(alpha=1.0, block_size=16))
    return Prompt(row, 0, q_len, kv_len), kept


def note(figures, layer, prompt, kept, page=3):
    figures.note(Served(layer, prompt, torch.tensor([page, 8])), kept, PrefillConfig(block_size=16))


def test_a_report_adds_up_what_processes_wrote(tmp_path):
    assert str(report(tmp_path)) == "no prompt went through the search"
    first, second, other = chunk(96, 96), chunk(64, 160), chunk(96, 96, row=1, seed=1)
    for rank in range(2):
        figures = Figures(None if rank else tmp_path, rank)
        for layer in range(2):
            for prompt, kept in (first, second, other):
                note(figures, layer, prompt, kept)
        figures.folder = tmp_path
        figures.write()
    told = report(tmp_path)
    assert (told.requests, told.chunks, told.tokens) == (2, 3, 256)
    kept = sum(int(kept.counts().sum()) for _, kept in (first, second, other))
    causal = (BlockMap.causal(1, 2, q_len=k.q_len, kv_len=k.kv_len, block_size=16) for _, k in (first, second, other))
    share = kept / sum(int(visible.counts().sum()) for visible in causal)
    assert told.density == {0: pytest.approx(share), 1: pytest.approx(share)}
    assert str(told).startswith("2 prompts, 3 chunks, 256 tokens went through the search\nlayer 0: ")
    assert f"{share:.1%}" in line_of(figures.to_dict())


def test_the_next_long_prompt_is_recorded_and_no_other(tmp_path):
    file = record_request(tmp_path / "masks.safetensors", tmp_path)
    first, second, other = chunk(96, 96), chunk(64, 160), chunk(64, 160, row=1, seed=1)
    figures = Figures(tmp_path, 0)
    for layer in range(2):
        note(figures, layer, *first)
    figures.write()
    assert load_masks(file)[1] == first[1]
    for layer in range(2):
        note(figures, layer, *other, page=4)
        note(figures, layer, *second)
    figures.write()
    whole = BlockMap.from_chunks([first[1], second[1]])
    assert load_masks(file) == {0: whole, 1: whole} and read_mask_info(file).config == PrefillConfig(block_size=16)
    record_request(tmp_path / "again.safetensors", tmp_path)
    note(figures, 0, *other, page=4)
    figures.write()
    assert load_masks(tmp_path / "again.safetensors") == {0: other[1]} and load_masks(file)[0] == whole


def test_a_chunk_within_a_block_ends_the_recording(tmp_path, caplog):
    file = record_request(tmp_path / "masks.safetensors", tmp_path)
    figures, first = Figures(tmp_path, 0), chunk(90, 90)
    note(figures, 0, *first)
    note(figures, 0, *chunk(64, 154))
    note(figures, 0, *chunk(64, 218))
    figures.write()
    assert load_masks(file) == {0: first[1]}
    assert caplog.text.count("ends at token 90, where a chunk does not begin on a block's edge") == 1


def test_other_processes_record_into_other_files(tmp_path):
    record_request(tmp_path / "masks.safetensors", tmp_path)
    figures = Figures(tmp_path, 1)
    note(figures, 0, *chunk(96, 96))
    figures.write()
    assert [path.name for path in tmp_path.glob("masks*")] == ["masks-rank1.safetensors"]


def test_a_server_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("FLEXPREFILL_FOLDER", raising=False)
    with pytest.raises(FlexPrefillError, match="no server is known"):
        report()
    with pytest.raises(FlexPrefillError, match="is not there"):
        report(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="path must be a file name"):
        record_request(3, tmp_path)


def test_a_broken_ticket_stops_nothing(tmp_path):
    (tmp_path / "record.json").write_text("{")
    figures = Figures(tmp_path, 0)
    note(figures, 0, *chunk(96, 96))
    figures.write()
    assert json.loads(next(tmp_path.glob("figures-0-*")).read_text())["layers"]["0"]["chunks"] == 1
