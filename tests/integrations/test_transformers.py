"""Models of transformers with flexprefill as their attention, held against their own implementations."""

import functools
import itertools

import pytest
import torch
from support.inputs import DEVICE, as_variant
from support.oracle import relative_error
from torch.nn.attention.flex_attention import AuxOutput

hf = pytest.importorskip("transformers")

from support.families import ALTERNATING, FAMILIES, WINDOW, make_model, reference_of  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

from flexprefill import BlockMap, FlexPrefillError, PrefillConfig, record_masks, search_blocks  # noqa: E402
from flexprefill.attention import steps  # noqa: E402
from flexprefill.integrations.transformers import register, unregister  # noqa: E402

ALL_KEPT = PrefillConfig(alpha=1e-30, block_size=16)
FEW_KEPT = PrefillConfig(alpha=1.0, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)
LENGTHS = (200, 163)  # of a batch's prompts
LENGTH = max(LENGTHS)
EDGES = (0, 180, LENGTH)  # of a batch's chunks


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(ALL_KEPT, name="all_kept")
    register(FEW_KEPT, name="few_kept")
    # models that a test compiles itself share their code, and are compiled at once for all lengths
    with torch._dynamo.config.patch(recompile_limit=64, assume_static_by_default=False), torch.no_grad():
        yield
    unregister("all_kept")
    unregister("few_kept")


@functools.cache
def model_of(family, implementation, dtype=torch.float32):
    return make_model(family, implementation, dtype).to(DEVICE)


@functools.cache
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 96, (1, length), generator=generator).to(DEVICE) for length in LENGTHS]


def pad_prompts(side):
    """tokens, attention_mask and position_ids [2, LENGTH]."""
    tokens = torch.zeros(len(LENGTHS), LENGTH, dtype=torch.int64, device=DEVICE)
    real = torch.zeros_like(tokens)
    for row, (prompt, length) in enumerate(zip(prompts(), LENGTHS, strict=True)):
        place = slice(LENGTH - length, LENGTH) if side == "left" else slice(length)
        tokens[row, place], real[row, place] = prompt[0], 1
    return tokens, real, (real.cumsum(1) - 1).clamp(min=0)


def logits_alone(model):
    """float [tokens of all prompts, vocabulary], each prompt without padding."""
    return torch.cat([model(prompt).logits[0] for prompt in prompts()])


def logits_padded(model, side, cache):
    tokens, real, positions = pad_prompts(side)
    if cache is None:
        logits = model(tokens, attention_mask=real, position_ids=positions).logits
    else:
        logits = torch.cat(
            [
                model(
                    tokens[:, start:end],
                    attention_mask=real[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                ).logits
                for start, end in itertools.pairwise(EDGES)
            ],
            1,
        )
    return logits[real.bool()]


QUICK = ("llama",)
EACH_FAMILY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_logits_are_those_of_the_models_own_attention_where_all_blocks_are_kept(family):
    exact = logits_alone(model_of(family, reference_of(family), torch.float64))
    allowed = 2 * relative_error(logits_alone(model_of(family, reference_of(family))), exact)
    model = model_of(family, "all_kept")
    assert relative_error(logits_alone(model), exact) <= allowed
    for side, cache in (
        ("left", None),
        ("right", None),
        ("left", hf.DynamicCache(config=model.config)),
        ("right", hf.DynamicCache(config=model.config)),
        ("left", hf.StaticCache(model.config, max_cache_len=256)),
        ("right", hf.StaticCache(model.config, max_cache_len=256)),
    ):
        error = relative_error(logits_padded(model, side, cache), exact)
        assert error <= allowed, (side, type(cache).__name__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), pytest.param("llama", torch.float16, marks=pytest.mark.release)],
)
def test_logits_in_low_precision(family, dtype):
    exact = logits_alone(model_of(family, reference_of(family), torch.float64))
    allowed = 2 * relative_error(logits_alone(model_of(family, reference_of(family), dtype)), exact)
    assert relative_error(logits_alone(model_of(family, "all_kept", dtype)), exact) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_oss", marks=pytest.mark.release)])
def test_a_batch_without_padding_shares_its_calls(family):
    tokens = torch.cat([prompt[:, :160] for prompt in prompts()])
    expected = model_of(family, reference_of(family))(tokens).logits
    assert relative_error(model_of(family, "all_kept")(tokens).logits, expected) <= 2e-5


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_generate_gives_the_same_tokens_where_all_blocks_are_kept(family):
    tokens, real, _ = pad_prompts("left")
    for cache in ("dynamic", "static"):
        settings = {"attention_mask": real, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        expected = model_of(family, reference_of(family)).generate(tokens, **settings)
        assert torch.equal(model_of(family, "all_kept").generate(tokens, **settings), expected), cache


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_generate_prefills_in_chunks(family):
    settings = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 64}
    expected = model_of(family, reference_of(family)).generate(prompts()[0], **settings)
    assert torch.equal(model_of(family, "all_kept").generate(prompts()[0], **settings), expected)


@pytest.fixture
def seen():
    """What the attention function of "few_kept" and "flexprefill" was called with, by layer."""
    calls = {}
    before = dict(AttentionInterface._global_mapping)
    register()
    for name in ("few_kept", "flexprefill"):

        def spy(module, query, key, *others, function=AttentionInterface._global_mapping[name], **settings):
            calls.setdefault(module.layer_idx, []).append(
                (query, key, {"scale": settings["scaling"], "soft_cap": settings.get("softcap")})
            )
            return function(module, query, key, *others, **settings)

        AttentionInterface.register(name, spy)
    yield calls
    AttentionInterface.register("few_kept", before["few_kept"])
    unregister()


def attend_nothing(query, key, value, listed, settings, *_):
    output = torch.zeros_like(query)
    return output, AuxOutput() if settings.return_aux is None else AuxOutput(lse=output[..., 0].float())


@pytest.mark.parametrize(
    ("family", "alpha"),
    [
        ("llama", 0.18),
        ("qwen2", 0.08),
        ("qwen3_moe", 0.12),
        ("qwen3", 0.1),
        ("mistral", 0.1),
        ("gemma2", 0.1),
        ("gemma3", 0.1),
        ("gpt_oss", 0.1),
        ("phi3", 0.1),
    ],
)
def test_recorded_masks_are_those_of_the_search(family, alpha, seen, monkeypatch):
    # the maps are what this looks at; whatever follows a layer is searched as it is
    monkeypatch.setattr(steps, "flex_over", attend_nothing)
    # a window that is no shorter than the prompt is no window
    sizes = {"sliding_window": 4096} if family == "mistral" else {}
    model = make_model(family, "flexprefill", **sizes).to(DEVICE)
    tokens = torch.randint(2, 96, (2, 1000), device=DEVICE)
    with record_masks(model) as masks:
        model(tokens)
    assert len(masks) == 2
    for layer, recorded in masks.items():
        query, key, terms = seen[layer][0]
        if family in ALTERNATING and layer == 0:  # a layer with a window
            band = torch.ones(1000, 1000, dtype=torch.bool, device=DEVICE).tril().triu(1 - WINDOW)
            blocks = torch.nn.functional.pad(band, (0, 24, 0, 24)).unflatten(0, (8, 128)).unflatten(2, (8, 128))
            assert torch.equal(recorded.to_dense(), blocks.any(3).any(1).expand(2, 4, 8, 8))
        else:
            config = PrefillConfig(alpha=alpha)
            assert recorded == search_blocks(query, key, config, **as_variant(**terms))


def test_padded_prompts_keep_the_blocks_that_they_keep_alone(seen):
    model = model_of("llama", "few_kept")
    tokens, real, positions = pad_prompts("left")
    with record_masks(model) as alone:
        model(prompts()[1])
    assert 0.1 < alone[1].density().mean() < 0.9
    with record_masks(model) as padded:
        model(tokens[1:], attention_mask=real[1:], position_ids=positions[1:])
    for layer in (0, 1):
        # rotary embeddings at the same positions: the same keys, bit for bit
        assert padded[layer] == alone[layer]
    expected = torch.cat([model(prompt).logits[0] for prompt in prompts()])
    for side in ("left", "right"):
        assert relative_error(logits_padded(model, side, None), expected) <= 1e-5


def test_a_batch_of_different_padding_is_not_recorded():
    tokens, real, _ = pad_prompts("left")
    model = model_of("llama", "few_kept")
    with pytest.raises(FlexPrefillError, match="record_masks cannot record a batch"), record_masks(model):
        model(tokens, attention_mask=real)


def test_layers_have_settings_of_their_own():
    register(FEW_KEPT, name="by_layer", layers={0: None})
    try:
        model = make_model("llama", "by_layer").to(DEVICE)
        with record_masks(model) as masks:
            model(prompts()[0])
        assert masks[0] == BlockMap.causal(1, 4, q_len=LENGTH, kv_len=LENGTH, block_size=128, device=DEVICE)
        assert masks[1].block_size == 16 and masks[1].density().max() < 1
        register(layers=dict.fromkeys(range(2)), name="by_layer")
        expected = logits_alone(model_of("llama", "sdpa"))
        assert relative_error(logits_alone(model), expected) <= 1e-5
        for cache in (None, hf.DynamicCache(config=model.config)):
            assert relative_error(logits_padded(model, "left", cache), expected) <= 2e-5
        register(layers={1: None, 2: None}, name="by_layer")
        with pytest.raises(ValueError, match="layers must be below 2, the model's number of layers, got 2"):
            model(prompts()[0])
    finally:
        unregister("by_layer")


def test_unregistering_leaves_no_trace():
    from transformers.models.llama import modeling_llama

    def state():
        interfaces = [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
        return interfaces, dict(vars(modeling_llama)), dict(vars(modeling_llama.LlamaAttention))

    before = state()
    register(FEW_KEPT)
    model = make_model("llama", "flexprefill").to(DEVICE)
    model(prompts()[1])
    register(ALL_KEPT)  # replaces the settings
    assert relative_error(model(prompts()[1]).logits, model_of("llama", "sdpa")(prompts()[1]).logits) <= 1e-5
    unregister()
    assert state() == before
    with pytest.raises(KeyError, match="flexprefill"):
        model(prompts()[1])
    with pytest.raises(ValueError, match="flexprefill"):
        make_model("llama", "flexprefill")


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"config": 0.1}, "config must be a PrefillConfig"),
        (TypeError, {"name": 3}, "name must be a string"),
        (ValueError, {"name": ""}, "name must be without"),
        (ValueError, {"name": "my_flash"}, "name must be without"),
        (ValueError, {"name": "sdpa"}, "name must be without"),
        (TypeError, {"layers": [0, 1]}, "layers must be a mapping"),
        (TypeError, {"layers": {"0": None}}, "layers must have ints"),
        (ValueError, {"layers": {-1: None}}, "layers must have indices of 0 or more"),
        (TypeError, {"layers": {0: 0.1}}, r"layers\[0\] must be a PrefillConfig or None"),
    ],
)
def test_register_names_what_is_wrong(error, arguments, message):
    before = dict(AttentionInterface._global_mapping)
    with pytest.raises(error, match=message):
        register(**arguments)
    assert AttentionInterface._global_mapping == before


def test_register_and_unregister_leave_other_libraries_names_alone(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "theirs", print)
    with pytest.raises(ValueError, match="name 'theirs' is an attention implementation"):
        register(name="theirs")
    with pytest.raises(ValueError, match="name 'theirs' is not registered"):
        unregister("theirs")
    with pytest.raises(TypeError, match="name must be a string"):
        unregister(None)


def padding_between(tokens):
    real = torch.ones_like(tokens)
    real[:, 50:60] = 0
    return real


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, lambda x: {"attention_mask": padding_between(x)}, "padding between tokens"),
        (
            FlexPrefillError,
            lambda x: {"attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=DEVICE)},
            "attention_mask must be None or a padding mask",
        ),
    ],
)
def test_a_mask_that_cannot_be_searched_is_refused(error, arguments, message):
    tokens = prompts()[0]
    with pytest.raises(error, match=message):
        model_of("llama", "all_kept")(tokens, **arguments(tokens))


def test_training_is_refused():
    model = make_model("llama", "all_kept").to(DEVICE)
    with torch.enable_grad(), pytest.raises(ValueError, match="requires grad"):
        model(prompts()[0])
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(FlexPrefillError, match="dropout must be 0"):
        model(prompts()[0])


@pytest.fixture
def default_compile():
    """torch.compile as callers have it: for the first length alone, then for all."""
    with torch._dynamo.config.patch(assume_static_by_default=True):
        yield


@pytest.mark.eager_flex
@pytest.mark.usefixtures("default_compile")
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.release) for family in ("gemma2", "gpt_oss"))]
)
def test_a_model_is_compiled_at_most_twice_over_lengths(family):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model(family, "few_kept").to(DEVICE)
    model.config._experts_implementation = "batched_mm"  # transformers' eager one does not trace
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for length in (200, 160, 256, 333, 129):
        tokens = torch.ones(1, length, dtype=torch.int64, device=DEVICE)
        assert compiled(tokens, use_cache=False).logits.isfinite().all()
    assert len(graphs) <= 2
    graphs.clear()
    for length in (200, 160, 333):
        tokens = torch.ones(2, length, dtype=torch.int64, device=DEVICE)
        for padding in (slice(60), slice(length - 30, length)):
            real = torch.ones_like(tokens)
            real[1, padding] = 0
            assert compiled(tokens, attention_mask=real, use_cache=False).logits.isfinite().all()
    assert len(graphs) <= 2


def with_any_length(*tensors):
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 1)
    return tensors


# one layer, which with gemma2 has a window, and one graph for all lengths: compiling takes the time
@pytest.mark.usefixtures("default_compile")
@pytest.mark.parametrize(
    ("family", "padded"),
    [
        pytest.param("llama", False, marks=pytest.mark.release),
        ("llama", True),
        pytest.param("gemma2", True, marks=pytest.mark.release),
    ],
)
@pytest.mark.slow
def test_a_compiled_model_gives_the_logits_of_the_uncompiled_one(family, padded):
    model = make_model(family, "few_kept", num_hidden_layers=1).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    expected = logits_alone(model)
    model.set_attn_implementation("all_kept")
    assert family == "gemma2" or relative_error(logits_alone(model), expected) > 1e-3
    model.set_attn_implementation("few_kept")
    for side in ("left", "right") if padded else ():
        tokens, real, positions = with_any_length(*pad_prompts(side))
        logits = compiled(tokens, attention_mask=real, position_ids=positions, use_cache=False).logits
        assert relative_error(logits[real.bool()], expected) <= 1e-5
    if not padded:
        logits = [compiled(*with_any_length(prompt.clone()), use_cache=False).logits[0] for prompt in prompts()]
        assert relative_error(torch.cat(logits), expected) <= 1e-5


@pytest.mark.eager_flex
@pytest.mark.usefixtures("default_compile")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x: {"attention_mask": padding_between(x)}, "padding between tokens"),
        (lambda x: {"position_ids": torch.arange(LENGTH, device=DEVICE)[None] % 100}, "attention_mask must be causal"),
    ],
)
def test_a_compiled_model_raises_where_a_mask_cannot_be_searched(arguments, message):
    if DEVICE != "cpu":
        pytest.skip("an assertion that fails on a GPU ends the process")
    model = torch.compile(model_of("llama", "few_kept"), fullgraph=True, backend="eager")
    tokens = prompts()[0]
    with pytest.raises(RuntimeError, match=message):
        model(tokens, use_cache=False, **arguments(tokens))
