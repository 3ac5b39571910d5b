"""What public reports about other attention libraries look like here: each kind with an instance and a second one."""

import copy
import functools
import itertools
import logging

import numpy as np
import pytest
import torch
from support.inputs import DEVICE
from support.oracle import relative_error

hf = pytest.importorskip("transformers")

from support.families import make_model, reference_of  # noqa: E402
from torch import nn  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    create_causal_mask,
    sliding_window_overlay,
)
from transformers.modeling_utils import AttentionInterface  # noqa: E402

from flexprefill import (  # noqa: E402
    AttentionVariant,
    FlexPrefillError,
    PrefillConfig,
    Sequences,
    record_masks,
    search_blocks,
)
from flexprefill.integrations.prompt_mask import PromptMask  # noqa: E402
from flexprefill.integrations.transformers import register, unregister  # noqa: E402
from flexprefill.integrations.transformers_internals import watch_models  # noqa: E402
from flexprefill.integrations.transformers_masks import prompt_mask  # noqa: E402
from flexprefill.runtime.state import forget  # noqa: E402

ALL_KEPT = PrefillConfig(alpha=1e-30, block_size=16)
FEW_KEPT = PrefillConfig(alpha=1.0, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)
LENGTH = 140


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(ALL_KEPT, name="kept")
    register(FEW_KEPT, name="few")
    register(ALL_KEPT, name="layer_dense", layers={1: None})
    register(ALL_KEPT, name="all_dense", layers=dict.fromkeys(range(2)))
    with torch.no_grad():
        yield
    for name in ("kept", "few", "layer_dense", "all_dense"):
        unregister(name)


def tokens_of(*shape, seed=1):
    return torch.randint(2, 90, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pair(family, name="kept", **sizes):
    """A model with flexprefill, and the same one with its own attention."""
    return (make_model(family, each, **sizes).to(DEVICE) for each in (name, reference_of(family)))


def attend(name, query, key, mask, **given):
    """The attention function of a name, called as a layer does."""
    layer = nn.Module()
    layer.is_causal = True
    return AttentionInterface._global_mapping[name](layer, query, key, key, mask, **given)[0]


# 1: a model whose attention does not go through the interface


def causal_model(kind, config):
    return kind._from_config(config, attn_implementation="kept").eval().to(DEVICE)


@pytest.mark.parametrize("kind", ["BloomForCausalLM", "XGLMForCausalLM", "GPTJForCausalLM", "FalconForCausalLM"])
def test_a_model_that_attends_by_itself_is_refused_by_its_name(kind):
    configs = {
        "BloomForCausalLM": hf.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4),
        "XGLMForCausalLM": hf.XGLMConfig(vocab_size=97, d_model=64, num_layers=2, attention_heads=4, ffn_dim=64),
        "GPTJForCausalLM": hf.GPTJConfig(vocab_size=97, n_embd=64, n_layer=2, n_head=4, rotary_dim=16),
        "FalconForCausalLM": hf.FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    }
    with pytest.raises(FlexPrefillError, match=f"for {kind}, got 'kept': the class computes its attention itself"):
        causal_model(getattr(hf, kind), configs[kind])


@pytest.mark.parametrize("length", [40, 2])
@pytest.mark.parametrize("kind", ["BloomForCausalLM", "MptForCausalLM", "CodeGenForCausalLM", "XGLMForCausalLM"])
def test_a_model_that_slips_through_meets_a_mask_that_says_so(kind, length):
    configs = {
        "BloomForCausalLM": hf.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4),
        "MptForCausalLM": hf.MptConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4),
        "CodeGenForCausalLM": hf.CodeGenConfig(vocab_size=97, n_embd=64, n_layer=2, n_head=4, rotary_dim=16),
        "XGLMForCausalLM": hf.XGLMConfig(vocab_size=97, d_model=64, num_layers=2, attention_heads=4, ffn_dim=64),
    }
    register(ALL_KEPT, name="unwatched")
    watch_models(None)
    try:
        model = getattr(hf, kind)._from_config(configs[kind], attn_implementation="unwatched").eval().to(DEVICE)
    finally:
        unregister("unwatched")
        register(ALL_KEPT, name="kept")  # watches again
    model.config._attn_implementation_internal = "kept"
    with pytest.raises(FlexPrefillError, match="computes .* its attention itself"):
        model(tokens_of(1, length))
    real = torch.ones(2, length, dtype=torch.int64, device=DEVICE)
    real[1, : length // 2] = 0
    with pytest.raises(FlexPrefillError, match="computes .* its attention itself"):
        model(tokens_of(2, length), attention_mask=real)


def test_arithmetic_with_a_prompts_mask_says_what_is_wrong():
    mask = prompt_mask(batch_size=1, q_length=8, kv_length=8)
    scores = torch.zeros(1, 1, 8, 8)
    for use in (
        lambda: scores + mask,
        lambda: mask + scores,
        lambda: mask * -1.0,
        lambda: 1.0 - mask,
        lambda: scores.masked_fill(mask, 0),
        lambda: torch.where(mask, scores, 0),
        lambda: nn.functional.scaled_dot_product_attention(scores, scores, scores, attn_mask=mask),
        lambda: mask[:, :, :4],
        lambda: mask[0],
        lambda: mask == 0,
        lambda: mask.dtype,
        lambda: mask.expand(1, 1, 8, 8),
        lambda: mask.bool(),
    ):
        with pytest.raises(FlexPrefillError, match="computes .* its attention itself"):
            use()
    assert mask.ndim == mask.dim() == 4 and mask.size() == mask.shape and mask.size(-1) == 8
    assert mask[:, :, :, :8] is mask and mask.to("cpu") is mask and not hasattr(mask, "dtype")
    assert mask.to_dense().shape == (1, 1, 1, 1)


def test_masks_that_are_tensors_can_be_added_to_scores():
    real = torch.tensor([[False, True, True], [True, True, True]], device=DEVICE)
    single = prompt_mask(batch_size=2, q_length=1, kv_length=3, q_offset=2, attention_mask=real, device=DEVICE)
    encoder = prompt_mask(
        batch_size=2,
        q_length=3,
        kv_length=3,
        mask_function=bidirectional_mask_function,
        attention_mask=real,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
        device=DEVICE,
    )
    for mask in (single, encoder):
        assert mask.is_floating_point()
        assert torch.equal(mask == 0, real[:, None, None].expand(mask.shape))
    # an encoder that attends by itself adds them
    config = hf.RoFormerConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = hf.RoFormerModel._from_config(config, attn_implementation="eager").eval().to(DEVICE)
    tokens = tokens_of(2, 3)
    expected = model(tokens, attention_mask=real).last_hidden_state
    model.config._attn_implementation_internal = "kept"
    assert relative_error(model(tokens, attention_mask=real).last_hidden_state, expected) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "biogpt"])
def test_classes_that_declare_nothing_and_go_through_the_interface_work(family):
    model, own = pair(family)
    tokens = tokens_of(1, LENGTH)
    assert relative_error(model(tokens).logits, own(tokens).logits) <= 1e-5


# 2: two sources of one length


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("last", [40, 1])
@pytest.mark.slow
def test_a_cache_that_returns_more_keys_than_it_told_the_mask_is_refused(family, last):
    model = make_model(family, "kept").to(DEVICE)
    cache = hf.DynamicCache(config=model.config)
    cache.activate_past_recording()
    tokens = tokens_of(1, 80 + last)
    model(tokens[:, :40], past_key_values=cache)
    model(tokens[:, 40:80], past_key_values=cache)
    with pytest.raises(FlexPrefillError, match=r"key must have the length .* (87|48) keys|48\] was made for, got 81"):
        model(tokens[:, 80:], past_key_values=cache)


def test_a_cache_that_records_its_past_and_is_cropped_works():
    logits = []
    for model in pair("mistral"):
        cache = hf.DynamicCache(config=model.config)
        cache.activate_past_recording()
        parts = []
        for start in (0, 40, 80):
            parts.append(model(tokens_of(1, 120)[:, start : start + 40], past_key_values=cache).logits)
            cache.crop(0)
        logits.append(torch.cat(parts, 1))
    assert relative_error(*logits) <= 1e-5


def test_keys_without_a_mask_have_to_be_as_many_as_queries():
    query, key = torch.zeros(1, 2, 5, 16, device=DEVICE), torch.zeros(1, 2, 9, 16, device=DEVICE)
    with pytest.raises(FlexPrefillError, match="got None for 5 queries and 9 keys"):
        attend("kept", query, key, None)
    mask = prompt_mask(batch_size=1, q_length=5, kv_length=7, q_offset=2)
    with pytest.raises(FlexPrefillError, match="5 queries and 7 keys, but attention got .* 5 queries and 9 keys"):
        attend("kept", query, key, mask)
    single = prompt_mask(batch_size=1, q_length=1, kv_length=7, q_offset=6)
    with pytest.raises(FlexPrefillError, match="1 queries and 7 keys, but attention got .* 1 queries and 9 keys"):
        attend("kept", query[:, :, :1], key, single)
    with pytest.raises(FlexPrefillError, match="must count the tokens"):
        prompt_mask(batch_size=1, q_length=5, kv_length=7, q_offset=4)


# 9: several dtypes under autocast


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(pytest.param(family, "kept", marks=pytest.mark.slow) for family in ("llama", "mistral")),
        *(pytest.param(family, "kept", marks=pytest.mark.release) for family in ("gemma2", "gpt_oss")),
        ("llama", "all_dense"),
    ],
)
def test_autocast_with_weights_of_float32(family, name):
    def logits(model):
        # without a cache values are of another dtype than queries and keys, with one they are the keys'
        cache = hf.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens_of(1, 122).split([80, 40, 1, 1], 1)]
        alone = [model(tokens_of(1, length), use_cache=False).logits for length in (LENGTH, 1)]
        return torch.cat([*parts, *alone], 1).float()

    model, own = pair(family, name)
    exact = logits(own)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected, output = logits(own), logits(model)
    # two roundings of one thing
    assert (output - exact).square().mean() <= 3 * (expected - exact).square().mean()


CAPPED, WINDOWED, WITH_SINKS = {"softcap": 20.0}, {"sliding_window": 16}, {"s_aux": torch.ones(2)}


@pytest.mark.parametrize(
    ("name", "q_len", "given"),
    [
        *(("kept", 1, given) for given in ({}, CAPPED, WINDOWED, WITH_SINKS)),
        ("all_dense", 40, {}),
        *(pytest.param("kept", 40, given, marks=pytest.mark.slow) for given in ({}, CAPPED)),
        *(pytest.param("kept", 40, given, marks=pytest.mark.release) for given in (WINDOWED, WITH_SINKS)),
        *(pytest.param("all_dense", 40, given, marks=pytest.mark.release) for given in (CAPPED, WINDOWED, WITH_SINKS)),
    ],
)
def test_autocast_casts_whatever_differs(name, q_len, given):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, q_len, 16, generator=generator).to(DEVICE) for _ in range(3))
    given = {key: each.to(DEVICE) if isinstance(each, torch.Tensor) else each for key, each in given.items()}
    layer = nn.Module()
    layer.is_causal = True
    function = AttentionInterface._global_mapping[name]
    expected = function(layer, query, key, value, None, **given)[0]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for tensors in ((query, key, value.bfloat16()), (query.bfloat16(), key, value), (query, key.half(), value)):
            output = function(layer, *tensors, None, **given)[0]
            assert output.dtype == torch.bfloat16 and relative_error(output.float(), expected) <= 2e-2
    if q_len > 1:
        with pytest.raises(TypeError, match="value must have query's dtype torch.float32, got torch.bfloat16"):
            function(layer, query, key, value.bfloat16(), None, **given)


# 10: numbers that are tensors


@pytest.mark.parametrize("family", ["mistral", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_assisted_decoding_with_a_sliding_window(family):
    tokens = tokens_of(1, 65).repeat(1, 2)
    settings = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 4}
    model, own = pair(family)
    assert torch.equal(model.generate(tokens, **settings), own.generate(tokens, **settings))


@pytest.mark.parametrize("number", [torch.tensor, np.int64, lambda value: torch.tensor([value])])
def test_counts_come_as_any_kind_of_number(number):
    counts = {"batch_size": 1, "q_length": 4, "kv_length": 12, "q_offset": 18, "kv_offset": 10}
    mask = prompt_mask(**{name: number(count) for name, count in counts.items()}, local_size=number(6))
    expected = prompt_mask(**counts, local_size=6)
    assert mask.shape == expected.shape == (1, 1, 4, 12)
    assert (mask.prompts.offset, mask.prompts.window) == (8, 6)
    query = torch.randn(1, 2, 8, 16, device=DEVICE)
    output = attend("kept", query, query, None, sliding_window=number(3), scaling=torch.tensor(0.25))
    assert torch.equal(output, attend("kept", query, query, None, sliding_window=3, scaling=0.25))


# 11: a mask that may be another one, and is causal


def gemma3_with_images(implementation):
    torch.manual_seed(0)
    text = make_model("gemma3", "eager").config
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config=copy.deepcopy(text),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=93,
        eoi_token_index=94,
    )
    model = hf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=implementation)
    return model.eval().to(DEVICE)


@pytest.mark.slow
def test_text_alone_in_a_model_of_images():
    tokens, types = tokens_of(1, LENGTH), torch.zeros(1, LENGTH, dtype=torch.int64, device=DEVICE)
    model, own = gemma3_with_images("kept"), gemma3_with_images("sdpa")
    expected = own(tokens, token_type_ids=types).logits
    assert relative_error(model(tokens, token_type_ids=types).logits, expected) <= 1e-5
    # the window is the mask's
    without = gemma3_with_images("sdpa")
    without.config.text_config.sliding_window = 4096
    assert relative_error(without(tokens, token_type_ids=types).logits, expected) > 1e-3
    real = torch.ones_like(tokens)
    real[:, :30] = 0
    settings = {"attention_mask": real, "token_type_ids": types, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens, **settings), own.generate(tokens, **settings))


@pytest.mark.parametrize("image", [(20, 30), (139, 140), (60, 62)])
def test_images_whose_tokens_see_each_other_are_refused(image):
    types = torch.zeros(1, LENGTH, dtype=torch.int64, device=DEVICE)
    types[:, slice(*image)] = 1
    model, tokens = gemma3_with_images("kept"), tokens_of(1, LENGTH)
    if image[1] - image[0] == 1:  # which sees itself alone
        expected = gemma3_with_images("sdpa")(tokens, token_type_ids=types).logits
        assert relative_error(model(tokens, token_type_ids=types).logits, expected) <= 1e-5
        return
    with pytest.raises(FlexPrefillError, match="attention_mask must be causal"):
        model(tokens, token_type_ids=types)


def mask_of(model, **functions):
    embedded = torch.zeros(1, LENGTH, 64, device=DEVICE)
    return create_causal_mask(model.config, embedded, None, None, **functions)


def test_a_callers_mask_function_is_followed_or_refused():
    model = make_model("llama", "kept").to(DEVICE)
    windowed = mask_of(model, and_mask_function=sliding_window_overlay(20))
    assert windowed.prompts.window == 20 and windowed.prompts.sequences is None
    packed = mask_of(model, and_mask_function=lambda b, h, q, k: (q >= 50) == (k >= 50))
    assert packed.prompts.window is None
    assert torch.equal(packed.prompts.sequences.starts[0].unique().cpu(), torch.tensor([0, 50], dtype=torch.int32))
    both = mask_of(model, and_mask_function=lambda b, h, q, k: ((q >= 50) == (k >= 50)) & (q - k < 30))
    assert both.prompts.window == 30 and both.prompts.sequences is not None
    for function in (
        {"or_mask_function": lambda b, h, q, k: k < 9},  # a prefix that sees itself
        {"and_mask_function": lambda b, h, q, k: k != 9},
        {"and_mask_function": lambda b, h, q, k: (q - k) % 2 == 0},
        {"and_mask_function": lambda b, h, q, k: (q < 100) | (q - k < 30)},
        {"block_sequence_ids": torch.where(torch.arange(LENGTH) % 100 == 7, 0, -1)[None].to(DEVICE)},
    ):
        with pytest.raises(FlexPrefillError, match="attention_mask must be causal"):
            mask_of(model, **function)


# 12: layers that are not searched


PADDED = torch.ones(2, LENGTH, dtype=torch.int64, device=DEVICE)
PADDED[1, :30] = 0


def errors_of_dense(model, own):
    tokens, positions = tokens_of(2, LENGTH), (PADDED.cumsum(1) - 1).clamp(min=0)
    yield relative_error(model(tokens).logits, own(tokens).logits)
    given = {"attention_mask": PADDED, "position_ids": positions}
    yield relative_error(*(each(tokens, **given).logits[PADDED.bool()] for each in (model, own)))
    caches = (hf.DynamicCache(config=each.config) for each in (model, own))
    chunks = [
        torch.cat(
            [each(part, past_key_values=cache).logits for part in tokens.split([90, 49, 1], 1)],
            1,
        )
        for each, cache in zip((model, own), caches, strict=True)
    ]
    yield relative_error(*chunks)


@pytest.mark.parametrize("head_dim", [512, 8, 20])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gemma2", "gpt_oss"])
def test_a_dense_layer_takes_any_head_dimension(family, head_dim):
    assert max(errors_of_dense(*pair(family, "all_dense", head_dim=head_dim))) <= 2e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_dense_layer_takes_float64(family):
    tokens = tokens_of(1, LENGTH)
    model, own = (make_model(family, name, torch.float64).to(DEVICE) for name in ("all_dense", reference_of(family)))
    assert relative_error(model(tokens).logits, own(tokens).logits) <= 1e-12


def test_a_layer_with_a_window_is_not_searched_either():
    model, own = pair("mistral", head_dim=20)
    assert max(errors_of_dense(model, own)) <= 2e-5
    with record_masks(model) as masks:
        model(tokens_of(1, 600))
    assert masks[0].density().max() < 0.7


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
def test_a_head_dimension_above_256_is_dense_and_said_once(family, caplog):
    forget("layers that were said to be dense")
    model, own = pair(family, "few", head_dim=264)
    with caplog.at_level(logging.WARNING, logger="flexprefill"):
        assert max(errors_of_dense(model, own)) <= 2e-5
    (record,) = (record for record in caplog.records if record.name == "flexprefill")
    assert f"of {family} is dense: its head dimension D=264" in record.getMessage()


def test_a_searched_layer_refuses_what_the_search_cannot_take():
    with pytest.raises(ValueError, match="head dimension that is a multiple of 8 from 16 to 256, got D=20"):
        make_model("qwen3", "layer_dense", head_dim=20).to(DEVICE)(tokens_of(1, LENGTH))
    with pytest.raises(TypeError, match="float16, bfloat16 or float32, got torch.float64"):
        make_model("llama", "layer_dense", torch.float64).to(DEVICE)(tokens_of(1, LENGTH))


# 14: packed sequences


LENGTHS = (61, 1, 50, 28)
BOUNDS = (0, *itertools.accumulate(LENGTHS))
PACKED = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(DEVICE)


def logits_alone(model, tokens):
    return torch.cat([model(tokens[:, a:b], use_cache=False).logits for a, b in itertools.pairwise(BOUNDS)], 1)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mistral", "kept"),
        pytest.param("llama", "layer_dense", marks=pytest.mark.slow),
        *(
            pytest.param(family, name, marks=pytest.mark.release)
            for family in ("llama", "gemma2", "gpt_oss")
            for name in ("kept", "layer_dense")
            if (family, name) != ("llama", "layer_dense")
        ),
    ],
)
def test_packed_sequences_are_attended_as_if_alone(family, name):
    model, tokens = make_model(family, name).to(DEVICE), tokens_of(1, LENGTH)
    expected = logits_alone(make_model(family, reference_of(family)).to(DEVICE), tokens)
    assert relative_error(model(tokens, position_ids=PACKED, use_cache=False).logits, expected) <= 1e-5
    # with an empty cache transformers looks for none, and FlashAttention's implementations do
    cache = hf.StaticCache(model.config, max_cache_len=LENGTH + 20)
    for given in ({}, {"past_key_values": cache}):
        assert relative_error(model(tokens, position_ids=PACKED, **given).logits, expected) <= 1e-5


@pytest.mark.slow
def test_rows_of_a_batch_are_packed_differently():
    tokens, model = tokens_of(2, LENGTH), make_model("llama", "kept").to(DEVICE)
    positions = torch.cat([PACKED, torch.arange(LENGTH, device=DEVICE)[None]])
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    own = make_model("llama", "sdpa").to(DEVICE)
    expected = torch.cat([logits_alone(own, tokens[:1]), own(tokens[1:]).logits])
    assert relative_error(logits, expected) <= 1e-5


@pytest.mark.parametrize("return_flash", [False, True])
def test_a_flattening_collator(return_flash):
    tokens, model = tokens_of(1, LENGTH), make_model("llama", "kept").to(DEVICE)
    collate = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=return_flash)
    parts = [{"input_ids": tokens[0, a:b].tolist()} for a, b in itertools.pairwise(BOUNDS)]
    batch = {
        name: entry.to(DEVICE) if isinstance(entry, torch.Tensor) else entry for name, entry in collate(parts).items()
    }
    batch.pop("labels")
    expected = logits_alone(make_model("llama", "sdpa").to(DEVICE), tokens)
    assert relative_error(model(**batch).logits, expected) <= 1e-5
    if return_flash:
        batch.pop("position_ids")  # the rotary embedding is then of one sequence; who sees whom is as it was
        last = model(**batch).logits[:, BOUNDS[3] :]
        other = torch.cat([tokens_of(1, BOUNDS[3], seed=5), tokens[:, BOUNDS[3] :]], 1)
        assert torch.equal(model(**{**batch, "input_ids": other}).logits[:, BOUNDS[3] :], last)
        with pytest.raises(FlexPrefillError, match="cu_seq_lens_q must say the sequences that position_ids say"):
            model(**batch, position_ids=torch.arange(LENGTH, device=DEVICE)[None] % 70, use_cache=False)


def test_masks_of_packed_sequences_are_those_of_the_search():
    calls = []

    def spy(module, query, key, *others, function=AttentionInterface._global_mapping["few"], **given):
        calls.append((query, key, given["scaling"]))
        return function(module, query, key, *others, **given)

    AttentionInterface.register("spied", spy)
    register_mask = hf.AttentionMaskInterface.register
    register_mask("spied", prompt_mask)
    try:
        model = make_model("llama", "spied").to(DEVICE)
        with record_masks(model) as masks:
            model(tokens_of(1, LENGTH), position_ids=PACKED, use_cache=False)
    finally:
        for interface in (AttentionInterface, hf.AttentionMaskInterface):
            interface._global_mapping.pop("spied")
    sequences = Sequences.from_cu_seqlens(torch.tensor(BOUNDS, device=DEVICE), LENGTH)
    variant = AttentionVariant(sequences=sequences)
    for layer, (query, key, scale) in enumerate(calls):
        assert masks[layer] == search_blocks(query, key, FEW_KEPT, variant=variant, scale=scale)
        assert masks[layer].density().max() < 0.6


def test_other_positions_are_no_packing():
    model, own = pair("llama")
    tokens = tokens_of(1, LENGTH)
    for positions in (torch.arange(LENGTH) + 7, torch.arange(LENGTH) * 2, torch.arange(LENGTH) // 2):
        given = {"position_ids": positions[None].to(DEVICE), "use_cache": True}
        assert relative_error(model(tokens, **given).logits, own(tokens, **given).logits) <= 1e-5


@pytest.mark.eager_flex
def test_packed_sequences_are_refused_inside_torch_compile():
    if DEVICE != "cpu":
        pytest.skip("an assertion that fails on a GPU ends the process")
    model = torch.compile(make_model("llama", "few"), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="packed sequences"):
        model(tokens_of(1, LENGTH), position_ids=PACKED, use_cache=False)


# 15: another turn of a padded batch


@functools.cache
def turns_of(family, name):
    model = make_model(family, name).to(DEVICE)
    settings = {"max_new_tokens": 5, "do_sample": False, "past_key_values": hf.DynamicCache(config=model.config)}
    tokens, real = tokens_of(2, 60), torch.ones(2, 60, dtype=torch.int64, device=DEVICE)
    real[1, :13] = 0
    answered = model.generate(tokens, attention_mask=real, **settings)
    for seed, (length, padding) in enumerate([(17, 5), (23, 20)]):
        its = torch.ones(2, length, dtype=torch.int64, device=DEVICE)
        its[seed % 2, :padding] = 0
        real = torch.cat([real, torch.ones_like(answered[:, real.shape[1] :]), its], 1)
        tokens = torch.cat([answered, tokens_of(2, length, seed=seed)], 1)
        answered = model.generate(tokens, attention_mask=real, **settings)
    return answered


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_further_turns_of_a_padded_batch(family):
    assert torch.equal(turns_of(family, "kept"), turns_of(family, reference_of(family)))


@pytest.mark.parametrize("family", ["llama", "mistral", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_padding_anywhere_in_what_continues_a_cache(family):
    real = torch.ones(2, LENGTH, dtype=torch.int64, device=DEVICE)
    real[1, :20] = real[0, 70:82] = real[1, 95:99] = real[1, 103:107] = real[1, 130:] = 0
    tokens, positions = tokens_of(2, LENGTH), (real.cumsum(1) - 1).clamp(min=0)

    def logits(model):
        cache = hf.DynamicCache(config=model.config)
        parts = [
            model(
                tokens[:, a:b], attention_mask=real[:, :b], position_ids=positions[:, a:b], past_key_values=cache
            ).logits
            for a, b in ((0, 60), (60, 100), (100, LENGTH))
        ]
        return torch.cat(parts, 1)[real.bool()]

    model, own = pair(family)
    assert relative_error(logits(model), logits(own)) <= 1e-5


def test_a_window_over_a_hole_is_not_recorded():
    model, tokens = make_model("mistral", "kept").to(DEVICE), tokens_of(1, LENGTH)
    real, cache = torch.ones_like(tokens), hf.DynamicCache(config=model.config)
    real[:, 90:100] = 0
    model(tokens[:, :90], past_key_values=cache)
    with (
        pytest.raises(FlexPrefillError, match="record_masks cannot record a layer with a sliding"),
        record_masks(model),
    ):
        model(tokens[:, 90:], attention_mask=real, past_key_values=cache)


def test_a_turn_after_a_hole_keeps_the_blocks_that_it_keeps_without():
    model, length = make_model("llama", "few").to(DEVICE), 90
    real = torch.ones(1, LENGTH, dtype=torch.int64, device=DEVICE)
    real[:, length : length + 20] = 0
    tokens, positions = tokens_of(1, LENGTH), (real.cumsum(1) - 1).clamp(min=0)
    maps = []
    for kept in (real, real[real.bool()][None]):
        cache, own = hf.DynamicCache(config=model.config), kept.shape[1]
        its, at = (tokens, positions) if own == LENGTH else (tokens[real.bool()][None], positions[real.bool()][None])
        model(its[:, :length], attention_mask=kept[:, :length], past_key_values=cache)
        with record_masks(model) as masks:
            model(its[:, length:], attention_mask=kept, position_ids=at[:, length:], past_key_values=cache)
        maps.append(masks)
    assert maps[0][1] == maps[1][1] and maps[0][0] == maps[1][0]


# 16: shapes alone


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_forward_of_shapes_alone(family):
    config = make_model(family, "eager").config
    config._experts_implementation = "batched_mm"  # transformers' eager one has no shapes alone
    for padded in (False, True):
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="kept").eval()
            tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
            given = {"attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)} if padded else {}
            cache = hf.DynamicCache(config=config)
            assert model(tokens, past_key_values=cache, **given).logits.shape == (2, LENGTH, 96)
            assert model(tokens[:, :1], past_key_values=cache).logits.device.type == "meta"


def test_a_forward_of_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = make_model("mistral", "eager").config
    with FakeTensorMode():
        model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="kept").eval()
        tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
        assert model(tokens, attention_mask=torch.ones_like(tokens)).logits.shape == (2, LENGTH, 96)
        assert model(tokens, use_cache=False).logits.shape == (2, LENGTH, 96)


def test_the_attention_function_gives_shapes_for_shapes():
    query = torch.empty(2, 4, 30, 24, device="meta")
    key = torch.empty(2, 2, 30, 24, device="meta")
    output = attend("kept", query, key, None)
    assert output.shape == (2, 30, 4, 24) and output.device.type == "meta"


def test_masks_are_objects_that_generate_hands_on():
    mask = prompt_mask(batch_size=2, q_length=300, kv_length=300)
    assert isinstance(mask, PromptMask) and mask.shape == (2, 1, 300, 300)
    assert torch.equal(mask.to_dense().bool()[0, 0].cpu(), torch.ones(3, 3, dtype=torch.bool).tril())
