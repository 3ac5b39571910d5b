"""What the integration takes for granted of transformers: each fact with the place that leans on it."""

import inspect
import re
from pathlib import Path

import pytest
import torch

hf = pytest.importorskip("transformers")

from support.families import FAMILIES, MORE_FAMILIES, OWN_ATTENTION, WINDOW, make_model  # noqa: E402
from torch.nn.attention.flex_attention import BlockMask  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.modeling_utils import AttentionInterface, PreTrainedModel  # noqa: E402

from flexprefill.integrations import transformers_internals as internals  # noqa: E402
from flexprefill.integrations.prompt_mask import PromptMask  # noqa: E402
from flexprefill.integrations.prompts import Prompts  # noqa: E402

MODELS = Path(hf.__file__).parent / "models"
SIZES = {"batch_size": 1, "q_length": 4, "kv_length": 4}


@pytest.mark.parametrize("interface", [AttentionInterface, hf.AttentionMaskInterface])
def test_registering_writes_one_mapping_of_the_class(interface):
    before = dict(interface._global_mapping)
    interface.register("for_a_contract", print)
    assert internals.is_taken("for_a_contract")
    assert interface._global_mapping == {**before, "for_a_contract": print}
    internals.forget_name("for_a_contract")
    assert interface._global_mapping == before and not internals.is_taken("for_a_contract")
    # the public way reaches the names of one object alone
    with pytest.raises(KeyError):
        del interface()["sdpa"]


def test_parts_of_names_have_a_meaning():
    from transformers.utils.generic import is_flash_attention_requested

    assert is_flash_attention_requested(requested_attention_implementation="my_flash")
    source = inspect.getsource(PreTrainedModel.get_correct_attn_implementation)
    assert '"flex_attention" in applicable_attention' in source and '"sdpa" in applicable_attention' in source
    assert set(internals.RESERVED) >= {"flash", "sdpa", "eager", "flex_attention", "|", "/"}


@pytest.fixture
def asked():
    """The arguments of each call of the mask function of "for_a_contract"."""
    calls = []

    def mask_function(**given):
        calls.append(given)

    hf.AttentionMaskInterface.register("for_a_contract", mask_function)
    yield calls
    internals.forget_name("for_a_contract")


def config_of_contract(**sizes):
    config = hf.LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, **sizes)
    config._attn_implementation_internal = "for_a_contract"
    return config


def test_only_a_bidirectional_mask_is_asked_for_with_its_own_argument(asked):
    config, embedded = config_of_contract(), torch.zeros(1, 4, 64)
    masking_utils.create_bidirectional_mask(config, embedded, None)
    masking_utils.create_causal_mask(config, embedded, None, None)
    config.sliding_window = 2
    masking_utils.create_sliding_window_causal_mask(config, embedded, None, None)
    masking_utils.create_bidirectional_sliding_window_mask(config, embedded, None)
    assert [internals.is_bidirectional(given) for given in asked] == [True, False, False, True]
    assert all(given["dtype"] == torch.float32 and given["config"] is config for given in asked)
    assert asked[2]["local_size"] == 2


def test_packed_sequences_are_looked_for_without_cache_and_mask_alone(asked):
    config, embedded, positions = config_of_contract(), torch.zeros(1, 4, 64), torch.tensor([[0, 1, 0, 1]])
    for mask, cache in ((None, None), (torch.ones(1, 4), None), (None, hf.DynamicCache(config=config))):
        masking_utils.create_causal_mask(config, embedded, mask, cache, positions)
    assert [given["allow_is_causal_skip"] for given in asked] == [False, True, True]


def test_a_mask_made_in_advance_is_handed_on(asked):
    mask = PromptMask(Prompts(1, 0, None, None, "cpu"), 4, 4)
    assert isinstance(mask, BlockMask)
    made = masking_utils.create_causal_mask(config_of_contract(), torch.zeros(1, 4, 64), mask, None)
    assert made is mask and asked == []


def test_sdpa_makes_bools_and_none_where_everything_is_seen():
    assert internals.sdpa_mask(**{**SIZES, "q_length": 1}, q_offset=3) is None
    mask = internals.sdpa_mask(**SIZES, allow_is_causal_skip=False)
    assert mask.dtype == torch.bool and torch.equal(mask[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())
    where = torch.arange(4)
    assert torch.equal(internals.causal_mask_function(0, 0, where[:, None], where), mask[0, 0])


def test_sdpa_gives_heads_behind_tokens():
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    output, weights = internals.sdpa_attention_forward(layer, query, key, key, None, scaling=0.25, is_causal=None)
    assert output.shape == (1, 3, 4, 16) and weights is None


def test_a_model_asks_one_method_for_its_attention():
    seen = []
    internals.watch_models(lambda model, implementation: seen.append((type(model).__name__, implementation)))
    try:
        model = make_model("llama", "eager")
        assert ("LlamaForCausalLM", "eager") in seen and ("LlamaModel", "eager") in seen
        seen.clear()
        model.set_attn_implementation("sdpa")
        assert ("LlamaForCausalLM", "sdpa") in seen
    finally:
        internals.watch_models(None)
    assert "transformers_internals" not in inspect.getsourcefile(PreTrainedModel.get_correct_attn_implementation)
    overriding = [path for path in MODELS.glob("*/modeling_*.py") if "def get_correct_attn_impl" in path.read_text()]
    assert overriding == []


def class_of(config):
    return hf.AutoModelForCausalLM._model_mapping[type(config)]


def test_sources_tell_which_classes_attend_by_themselves():
    composed = {"mpt"}  # whose config has a part that is no model's
    for family, make_config in {**FAMILIES, **MORE_FAMILIES}.items():
        kind = class_of(make_config())
        assert not internals.has_own_attention(kind), family
        assert internals.attention_classes_without(kind, "for_a_contract") is None, family
    for family, make_config in OWN_ATTENTION.items():
        config = make_config()
        kind = class_of(config)
        table = internals.attention_classes_without(kind, "for_a_contract")
        assert internals.has_own_attention(kind) or table, family
        assert not getattr(config, "sub_configs", None) or table or family in composed, family


def test_tables_of_attention_are_read_by_the_implementations_name():
    expected = {"gptj": "GPTJ", "falcon": "FALCON", "gpt_neo": "GPT_NEO", "git": "GIT_SELF"}
    for family, name in expected.items():
        kind = class_of(OWN_ATTENTION[family]())
        assert internals.attention_classes_without(kind, "for_a_contract") == f"{name}_ATTENTION_CLASSES"
        assert internals.attention_classes_without(kind, "eager") is None
    # every such table is one that the pattern finds
    for path in MODELS.glob("*/modeling_*.py"):
        for use in re.findall(r"\w+_ATTENTION_CLASSES\[[^\]]*\]", path.read_text()):
            assert re.match(r"\w*ATTENTION_CLASSES\[\s*(?:self\.)?config\._attn_implementation", use), (path, use)


def test_caches_tell_what_the_mask_needs():
    config = hf.MistralConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, sliding_window=8)
    states = torch.zeros(1, 2, 6, 16)
    cache = hf.DynamicCache(config=config)
    cache.activate_past_recording()
    for _ in range(2):
        told, _ = cache.get_mask_sizes(6, 0)
        keys, _ = cache.update(states, states, 0)
        assert keys.shape[2] == told
    # from the window's length on it returns more than it tells
    told, _ = cache.get_mask_sizes(6, 0)
    assert cache.update(states, states, 0)[0].shape[2] == 18 > told == 13
    # and a number of tokens to remove that is a tensor makes its length one
    cache.crop(torch.tensor(-2))
    assert isinstance(cache.get_seq_length(0), torch.Tensor)
    static = hf.StaticCache(config, max_cache_len=32)
    assert static.get_mask_sizes(6, 0) == (8, 0)


def test_continuous_batching_gives_its_function_what_it_needs():
    """A cache that knows windows and gives the keys of all requests; and whose they are, one tensor for all layers."""
    calls, bounds_of_queries = [], []

    def attend(module, query, key, value, attention_mask, **given):
        assert attention_mask is None  # no mask function has the name
        cache, layer = given["cache"], module.layer_idx
        indices = {name: given[name] for name in ("read_index", "write_index")}
        kind, window = internals.paged_kind(cache, layer), internals.paged_window(cache, layer)
        assert window == (WINDOW if kind == "sliding_attention" else None)
        keys, values = internals.keys_in_cache(cache, key, value, layer_idx=layer, **indices)
        bounds = given["cu_seq_lens_k"][kind]
        assert keys.shape == values.shape == (bounds[-1], 2, 16) and query.shape[:2] == (1, 4)
        assert key.shape == (1, 2, query.shape[2], 16) and given["cu_seq_lens_q"][-1] == query.shape[2]
        bounds_of_queries.append(given["cu_seq_lens_q"])  # kept, so that no other has its id
        queries = bounds_of_queries[-1].tolist()
        calls.append((layer, id(bounds_of_queries[-1]), queries, given["logits_indices"].tolist()))
        assert given["block_table"] is None
        return query.transpose(1, 2), None

    AttentionInterface.register("paged|for_a_contract", attend)
    try:
        model = make_model("gemma3", "paged|for_a_contract")
        found = model.generate_batch(
            [[5] * 70, [6] * 9],
            generation_config=hf.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1),
            continuous_batching_config=hf.ContinuousBatchingConfig(block_size=32, num_blocks=16, max_batch_tokens=64),
            progress_bar=False,
        )
    finally:
        internals.forget_name("paged|for_a_contract")
    assert len(found) == 2 and all(result.error is None for result in found.values())
    # 64 of 70 tokens in the first batch, so no token behind them
    assert calls[0][2:] == ([0, 64], [0])
    # an object of its own for each batch, and one for its layers
    assert all(layer == place % 2 for place, (layer, *_) in enumerate(calls))
    objects = [name for _, name, _, _ in calls]
    assert objects[::2] == objects[1::2] and len(set(objects)) == len(calls) // 2 > 2


def test_names_that_transformers_knows_for_serving():
    from transformers.utils.generic import is_flash_attention_requested

    # a name without "flash" asks for no CUDA graphs, and gets no mask
    assert not is_flash_attention_requested(requested_attention_implementation="paged|flexprefill")
    source = (Path(hf.__file__).parent / "generation/continuous_batching/continuous_api.py").read_text()
    assert "if not is_flash and not is_paged and model._supports_flash_attn:" in source
    assert 'model.set_attn_implementation(f"paged|{target_implem}")' in source
    # `transformers serve` takes these names alone
    serving = (Path(hf.__file__).parent / "cli/serving/model_manager.py").read_text()
    names = re.search(r"VALID_ATTN_IMPLEMENTATIONS = (\{.*?\})", serving)[1]
    assert names == '{"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}'
