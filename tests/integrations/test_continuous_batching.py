"""transformers' continuous batching with flexprefill as the attention, held against its own implementations."""

import dataclasses
import functools
from itertools import pairwise

import pytest
import torch
from support.inputs import DEVICE
from support.oracle import relative_error

hf = pytest.importorskip("transformers")

from support.families import SIZES, WINDOW, make_model  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

from flexprefill import FlexPrefillError, PrefillConfig, search_blocks  # noqa: E402
from flexprefill.attention import steps  # noqa: E402
from flexprefill.integrations import continuous_batching as batching  # noqa: E402
from flexprefill.integrations import transformers as integration  # noqa: E402
from flexprefill.integrations.transformers import register, unregister  # noqa: E402
from flexprefill.runtime.listeners import listen  # noqa: E402

ALL_KEPT = PrefillConfig(alpha=1e-30, block_size=16)
FEW_KEPT = PrefillConfig(alpha=1.0, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)
DENSE = PrefillConfig(dense_below=2**20)
LENGTHS = (200, 5, 163, 64, 1, 17)


@pytest.fixture(scope="module", autouse=True)
def registered():
    names = {"all_kept": ALL_KEPT, "few_kept": FEW_KEPT, "all_dense": DENSE}
    for name, config in names.items():
        register(config, name=name)
    with torch.no_grad():
        yield
    for name in names:
        unregister(name)


@functools.cache
def model_of(family, implementation):
    return make_model(family, implementation).to(DEVICE)


@functools.cache
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 96, (length,), generator=generator).tolist() for length in LENGTHS]


def generate(model, inputs=None, *, new_tokens=6, batch_tokens=256, **settings):
    """The tokens that continuous batching generates for each prompt."""
    found = model.generate_batch(
        prompts() if inputs is None else inputs,
        generation_config=hf.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=32, num_blocks=64, max_batch_tokens=batch_tokens, **settings
        ),
        progress_bar=False,
    )
    assert all(result.error is None for result in found.values()), [result.error for result in found.values()]
    return [result.generated_tokens for result in found.values()]


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_it_is_sdpa_where_all_is_dense(family):
    # a window that hides something is no dense attention: there prompts fit into it, and steps of decoding do not
    inputs = [prompt[:WINDOW] for prompt in prompts()] if family == "gemma3" else prompts()
    found = generate(model_of(family, "paged|all_dense"), inputs)
    assert found == generate(model_of(family, "paged|sdpa"), inputs)
    assert len({tuple(tokens) for tokens in found}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gemma3", marks=pytest.mark.release)]
)  # a GPU compiles faster, and takes more of them
def test_tokens_are_those_of_transformers_own_where_all_blocks_are_kept(family):
    # a batch of 96 tokens takes the long prompts in chunks, beside steps of decoding
    for batch_tokens in (512, 96):
        expected = generate(model_of(family, "paged|eager"), batch_tokens=batch_tokens)
        assert generate(model_of(family, "paged|all_kept"), batch_tokens=batch_tokens) == expected
    if family == "llama":
        # prompts that begin alike share pages, so all but the first begin at an offset
        shared = [prompts()[0][:130] + prompt[:40] for prompt in prompts()]
        one_by_one = {"inputs": shared, "max_requests_per_batch": 1}
        expected_of_shared = generate(model_of(family, "paged|eager"), **one_by_one)
        assert generate(model_of(family, "paged|all_kept"), **one_by_one) == expected_of_shared
        assert expected != generate(model_of(family, "paged|few_kept"), batch_tokens=batch_tokens)


@pytest.fixture
def searches(monkeypatch):
    """Query, key and map of each search."""
    calls = []

    def search(query, key, *others, own=steps.search_checked):
        calls.append((query, key, own(query, key, *others)))
        return calls[-1][2]

    monkeypatch.setattr(steps, "search_checked", search)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [512, 96])
def test_maps_are_those_of_each_request_alone(searches, batch_tokens):
    alone = model_of("llama", "few_kept")
    for prompt in prompts():
        alone(torch.tensor([prompt], device=DEVICE), use_cache=False)
    expected = list(searches)
    searches.clear()
    generate(model_of("llama", "paged|few_kept"), new_tokens=1, batch_tokens=batch_tokens)
    seen = set()
    for query, key, block_map in searches:
        # whose keys these are, and of which layer
        errors = [
            relative_error(key, whole[:, :, : key.shape[2]]) if whole.shape[2] >= key.shape[2] else 1.0
            for _, whole, _ in expected
        ]
        place = errors.index(min(errors))
        queries, keys, whole_map = expected[place]
        start, end = block_map.offset, block_map.kv_len
        if errors[place] > 1e-5:
            # chunks begin inside blocks, so later layers are not those of the prompt in one go
            assert batch_tokens == 96
            continue
        assert relative_error(query, queries[:, :, start:end]) < 1e-5
        last = end == keys.shape[2]
        assert block_map == search_blocks(queries[:, :, start:end], keys[:, :, :end], FEW_KEPT, last_chunk=last)
        assert (start, end) != (0, keys.shape[2]) or block_map == whole_map
        seen.add((place, start, end))
    assert len(seen) == len(searches) or (batch_tokens == 96 and len(seen) >= len(searches) / 2)
    # all queries of each prompt in the first layer, but for a last chunk of one query, which is no search
    for place in range(0, len(expected), SIZES["num_hidden_layers"]):
        searched = sum(end - start for other, start, end in seen if other == place)
        assert expected[place][1].shape[2] - searched in (0, 1)
    assert min(block_map.density().min() for _, _, block_map in searches) < 0.5


def test_lengths_are_read_once_a_batch_and_steps_go_together(monkeypatch):
    reads, forwards, attended = [], [], []

    def read(*given, own=batching.Batch.read):
        reads.append(own(*given))
        return reads[-1]

    def forward(module, query, *others, own=integration.sdpa_attention_forward, **settings):
        attended.append(query.shape[0])
        return own(module, query, *others, **settings)

    model = model_of("llama", "paged|all_dense")
    monkeypatch.setattr(batching.Batch, "read", read)
    monkeypatch.setattr(integration, "sdpa_attention_forward", forward)
    hook = model.register_forward_hook(lambda *_: forwards.append(len(reads)))
    try:
        generate(model)
    finally:
        hook.remove()
    assert forwards == list(range(1, len(forwards) + 1)) and len(forwards) > 5
    single = [sum(end - start == 1 for start, end in pairwise(batch.queries)) for batch in reads]
    assert max(single) == len(LENGTHS)
    # those of 200 and of 163 tokens go together
    assert len(attended) < SIZES["num_hidden_layers"] * sum(single) and max(attended) == 2
    # a tensor that is filled anew is read anew
    bounds = torch.tensor([0, 2, 3])
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": {"full_attention": bounds, "sliding_attention": bounds + 0}}
    first = batching.batch_of(0, given)
    assert batching.batch_of(1, given) is first and first.sampled is None
    bounds[1] = 1
    second = batching.batch_of(0, given | {"logits_indices": torch.tensor([2, 0])})
    assert second is not first and second.queries == [0, 1, 3] and second.sampled == {0, 2}
    assert second.keys == {"full_attention": [0, 1, 3], "sliding_attention": [0, 2, 3]}


def test_a_plan_takes_every_token_once_and_no_other_requests_keys():
    queries, keys = [0, 1, 101, 102, 103, 103, 104], [0, 7, 207, 213, 313, 313, 314]
    batch = batching.Batch(queries, {None: keys})
    plan = batching.make_plan(batch, keys, None, torch.device("cpu"))
    assert plan.prompts == (batching.Prompt(slice(1, 101), slice(7, 207), True),)
    for sampled in ({100}, {0, 101}):
        later = batching.make_plan(dataclasses.replace(batch, sampled=sampled), keys, None, torch.device("cpu"))
        assert later.prompts[0].last == (100 in sampled)
    assert [step.rows.tolist() for step in plan.steps] == [[103], [0, 101], [102]]
    alone, together, long = plan.steps
    assert alone.keys.tolist() == [[313]] and alone.seen is None and long.keys.tolist() == [list(range(213, 313))]
    assert together.keys.tolist() == [list(range(7)), [207, 208, 209, 210, 211, 212, 212]]
    assert together.seen[:, 0, 0].tolist() == [[True] * 7, [True] * 6 + [False]]
    windowed = batching.make_plan(batch, keys, 4, torch.device("cpu"))
    assert windowed.prompts == plan.prompts
    assert [step.keys.tolist() for step in windowed.steps] == [
        [[313]],
        [[3, 4, 5, 6], [209, 210, 211, 212], [309, 310, 311, 312]],
    ]


def test_a_key_that_is_not_finite_reaches_no_other_request():
    keys, lengths = torch.randn(40, 2, 16), [0, 9, 17, 33, 40]
    keys[12] = torch.nan
    plan = batching.make_plan(batching.Batch(list(range(5)), {}), lengths, None, torch.device("cpu"))
    query = torch.randn(1, 4, 4, 16)

    class Cache:
        def update(self, **_):
            return keys, keys

    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    paged = batching.Paged(Cache(), batching.Batch([], {None: []}, plans={(None, None): plan}), "", None, {})
    output = paged.attend(
        query, None, None, None, lambda q, k, v, seen: integration.sdpa_attention_forward(layer, q, k, v, seen)[0]
    )
    assert output.isnan().flatten(2).all(2).tolist() == [[False, True, False, False]]
    assert not output[:, [0, 2, 3]].isnan().any()


@pytest.mark.slow
def test_a_plain_name_becomes_the_paged_one():
    model = model_of("llama", "all_dense")
    expected = generate(model_of("llama", "paged|sdpa"))
    assert generate(model) == expected and model.config._attn_implementation == "all_dense"


def test_unregister_takes_the_paged_name_back():
    before = dict(AttentionInterface._global_mapping)
    register(name="for_a_moment")
    assert {"for_a_moment", "paged|for_a_moment"} <= AttentionInterface._global_mapping.keys() - before.keys()
    unregister("for_a_moment")
    assert AttentionInterface._global_mapping == before
    AttentionInterface.register("paged|theirs", print)
    try:
        with pytest.raises(ValueError, match="name 'theirs' is an attention implementation of transformers'"):
            register(name="theirs")
    finally:
        del AttentionInterface._global_mapping["paged|theirs"]
    with pytest.raises(FlexPrefillError, match="BloomForCausalLM"):
        config = hf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=4)
        hf.AutoModelForCausalLM.from_config(config, attn_implementation="paged|all_dense")


def test_other_calls_are_refused_by_name():
    model = model_of("llama", "paged|all_dense")
    with pytest.raises(FlexPrefillError, match=r"'paged\|all_dense' must be called by continuous batching"):
        model(torch.tensor([prompts()[0]]))
    layer = model.model.layers[0].self_attn
    function = AttentionInterface._global_mapping["paged|all_dense"]
    query = torch.zeros(1, 4, 3, 16)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 3]), "cu_seq_lens_k": torch.tensor([0, 3])}
    given = {"cache": object(), "read_index": [], "write_index": [], **bounds}

    def call(mask=None, **more):
        function(layer, query, query[:, :2], query[:, :2], mask, **given, **more)

    with pytest.raises(FlexPrefillError, match="takes no block_table"):
        call(block_table=torch.zeros(1, 1, 1))
    with listen(object()), pytest.raises(FlexPrefillError, match="record_masks cannot record continuous batching"):
        call()
    with pytest.raises(FlexPrefillError, match="dropout must be 0"):
        call(dropout=0.1)
    given["cache"] = type("Cache", (), {"sliding_windows": {0: 1}})()
    with pytest.raises(FlexPrefillError, match="attention_mask must be None and the layer causal .*got Tensor"):
        call(torch.zeros(1, 1, 3, 3))
    with pytest.raises(FlexPrefillError, match="attention_mask must be None and the layer causal"):
        call(is_causal=False)
    with pytest.raises(Exception, match="cannot be compiled or captured whole"):
        torch.compile(call, backend="eager", fullgraph=True)()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_tokens_on_a_gpu(family):
    for batch_tokens in (512, 96):
        expected = generate(model_of(family, "paged|eager"), batch_tokens=batch_tokens)
        assert generate(model_of(family, "paged|all_kept"), batch_tokens=batch_tokens) == expected
