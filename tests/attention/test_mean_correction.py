import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv
from support.oracle import corrected_attention, masked_attention, relative_error
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import BlockMap, KeyMeans, PrefillConfig, create_prefill_block_mask, prefill_attention, search_blocks
from flexprefill.attention import mean_correction
from flexprefill.attention.log_sum_exp import kept_log_sum_exp_operator, log_sum_exp_over
from flexprefill.attention.mean_correction import merge_means
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import PLAIN

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)
CORRECTED = dataclasses.replace(CONFIG, mean_correction=True)


def random_map(batch, heads, q_len, kv_len, block_size, *, density, seed):
    """A map of which nothing is known: rows may keep nothing, or not their own block."""
    blocks = batch, heads, -(-q_len // block_size), -(-kv_len // block_size)
    dense = torch.rand(blocks, generator=torch.Generator().manual_seed(seed)) < density
    return BlockMap.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=block_size)


def exact_over(query, key, value, block_map, scale):
    """Output and log-sum-exps over the kept blocks alone, in float64; NaN and -inf for a row that keeps nothing."""
    rescaled = query.double() * scale * query.shape[3] ** 0.5
    output = masked_attention(rescaled, key, value, block_map).nan_to_num(0)
    lse = log_sum_exp_over(PlainAttention(query, key, scale, PLAIN), block_map)
    return torch.where(lse.isinf()[..., None], torch.nan, output).to(query.dtype), lse


@settings(deadline=None, max_examples=20 if DEVICE == "cpu" else 100)
@given(st.data())
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_merge_equals_the_definition(implementation, data):
    kv_len = data.draw(st.integers(1, 200), label="kv_len")
    q_len = data.draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)), label="q_len")
    block_size = data.draw(st.sampled_from([16, 32, 64]), label="block_size")
    head_dim, value_dim = data.draw(
        st.sampled_from([(16, 16), (24, 40), (64, 64), (192, 128), (256, 256)]), label="dims"
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    batch, kv_heads, group = (data.draw(st.integers(1, 2)) for _ in range(3))
    scale = data.draw(st.sampled_from([head_dim**-0.5, 0.3, -0.2]), label="scale")
    seed = data.draw(st.integers(0, 2**31))
    heads = kv_heads * group
    query, key, value = make_qkv(
        q_len, kv_len, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, seed=seed
    )
    value = torch.cat([value, -2 * value], 3)[..., :value_dim].contiguous()
    density = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    block_map = random_map(batch, heads, q_len, kv_len, block_size, density=density, seed=seed)

    expected, expected_lse = corrected_attention(query, key, value, block_map, scale=scale)
    output, lse = exact_over(query, key, value, block_map, scale)
    inputs = (tensor.to(DEVICE) for tensor in (query, key, value, block_map.words, output, lse))
    merged, sums = (tensor.cpu() for tensor in merge_means(*inputs, block_size, scale, implementation))
    assert merged.shape == expected.shape and merged.dtype == dtype
    finite = expected_lse.isfinite()
    assert torch.equal(finite, sums.isfinite()) and (merged[~finite] == 0).all()
    if finite.any():
        # the kernel rounds its shares to the means' dtype, and the output of either is
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        assert (merged - expected)[finite].norm() <= tolerance * expected[finite].norm() + 1e-6
        assert (sums - expected_lse)[finite].abs().max() <= 1e-4 * (1 + expected_lse[finite].abs().max())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("q_len, kv_len", [(700, 700), (300, 701), (1, 500)])
def test_the_kept_log_sum_exps_are_those_of_dense_attention(q_len, kv_len):
    query, key, _ = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2)
    block_map = random_map(2, 4, q_len, kv_len, 64, density=0.4, seed=3)
    lse = log_sum_exp_over(PlainAttention(query, key, 0.2, PLAIN), block_map)
    allowed = block_map.to_dense().repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :q_len, :kv_len]
    allowed = allowed & (torch.arange(kv_len) <= torch.arange(q_len)[:, None] + kv_len - q_len)
    products = 0.2 * query.double() @ key.double().repeat_interleave(2, 1).mT
    expected = products.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    assert torch.equal(lse.isinf(), expected.isinf())
    assert (lse - expected)[expected.isfinite()].abs().max() <= 1e-4


@pytest.fixture(scope="session")
def prompt():
    return make_qkv(1000, heads=4, kv_heads=2, device=DEVICE)


def test_prefill_attention_adds_the_means_of_what_is_dropped(prompt):
    block_map = search_blocks(*prompt[:2], CONFIG)
    assert search_blocks(*prompt[:2], CORRECTED) == block_map and block_map.density().mean() < 0.9
    expected, _ = corrected_attention(*prompt, block_map)
    output = prefill_attention(*prompt, CORRECTED).cpu()
    tolerance = 1e-5 if DEVICE == "cpu" else 2e-3  # a GPU's float32 products may be tf32
    assert relative_error(output, expected) <= tolerance
    assert relative_error(prefill_attention(*prompt, CONFIG).cpu(), expected) > 10 * tolerance  # off by default
    # of the config, a given map leaves the correction; rows of this one keep nothing
    given_map = random_map(1, 4, 1000, 1000, 128, density=0.2, seed=1).to(DEVICE)
    assert (given_map.counts() == 0).any()
    expected, _ = corrected_attention(*prompt, given_map)
    assert relative_error(prefill_attention(*prompt, CORRECTED, block_map=given_map).cpu(), expected) <= tolerance


def test_the_search_and_the_correction_share_the_means_of_keys(prompt, monkeypatch):
    pooled = []

    def pool_keys(tensor, *rest, pool=mean_correction.pool_keys):
        pooled.append(tensor)
        return pool(tensor, *rest)

    monkeypatch.setattr(mean_correction, "pool_keys", pool_keys)
    expected = prefill_attention(*prompt, CORRECTED)
    assert len(pooled) == 1 and torch.equal(pooled[0], prompt[2])
    block_map, other = search_blocks(*prompt[:2], CONFIG), KeyMeans()
    search_blocks(prompt[0], prompt[1] + 1, CONFIG, means=other)
    for means in (None, other):  # with a map they may be of any keys
        pooled.clear()
        output = prefill_attention(*prompt, CORRECTED, block_map=block_map, means=means)
        assert len(pooled) == 2 and torch.equal(output, expected)


@pytest.mark.slow
def test_the_output_of_chunks_is_that_of_the_whole(prompt):
    whole = prefill_attention(*prompt, CORRECTED)
    means, outputs = KeyMeans(), []
    for start, end in ((0, 512), (512, 640), (640, 1000)):
        seen = (tensor[:, :, :end] for tensor in prompt[1:])
        chunk = prompt[0][:, :, start:end]
        outputs.append(prefill_attention(chunk, *seen, CORRECTED, last_chunk=end == 1000, means=means))
    assert relative_error(torch.cat(outputs, 2), whole) <= (1e-5 if DEVICE == "cpu" else 2e-3)


@settings(deadline=None, max_examples=15)
@given(st.data())
@pytest.mark.parametrize("backend", ["auto"] if DEVICE == "cpu" else ["triton", "flash"])
def test_every_setting_attends_as_densely_under_its_map(backend, data):
    kv_len = data.draw(st.integers(1, 700), label="kv_len")
    q_len = data.draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)), label="q_len")
    config = dataclasses.replace(
        CONFIG,
        alpha=data.draw(st.sampled_from([0.3, 1.0]), label="alpha"),
        min_blocks=data.draw(st.sampled_from([0, 2]), label="min_blocks"),
        mask_heads=data.draw(st.sampled_from(["query", "kv"]), label="mask_heads"),
        score_rows=data.draw(st.sampled_from(["whole", "visible"]), label="score_rows"),
        scorer=data.draw(st.sampled_from(["flashprefill", "xattention", "exact"]), label="scorer"),
        mean_correction=data.draw(st.booleans(), label="mean_correction"),
    )
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    seed = data.draw(st.integers(0, 2**31), label="seed")
    inputs = make_qkv(q_len, kv_len, heads=4, kv_heads=2, dtype=dtype, device=DEVICE, seed=seed)
    block_map = search_blocks(*inputs[:2], config)
    if config.mask_heads == "kv":
        assert torch.equal(block_map.words[:, ::2], block_map.words[:, 1::2])
    exact = masked_attention(*inputs, block_map)
    allowed = 3 * max(relative_error(masked_attention(*inputs, block_map, dtype=dtype), exact), 2e-6)
    if config.mean_correction:
        exact = corrected_attention(*inputs, block_map)[0].to(DEVICE)
    output = prefill_attention(*inputs, config, backend=backend, block_map=block_map)
    assert relative_error(output, exact) <= allowed


def test_it_traces_into_a_callers_graph(prompt):
    expected = prefill_attention(*prompt, CORRECTED)
    compiled = torch.compile(lambda *inputs: prefill_attention(*inputs, CORRECTED), fullgraph=True)
    assert relative_error(compiled(*prompt), expected) <= (1e-6 if DEVICE == "cpu" else 2e-3)


def test_the_operators_pass_opcheck():
    query, key, value = make_qkv(70, 90, heads=2, head_dim=16, device=DEVICE)
    words = random_map(1, 2, 70, 90, 16, density=0.5, seed=0).words.to(DEVICE)
    lse = kept_log_sum_exp_operator(query, key, words, 16, 0.25)
    torch.library.opcheck(torch.ops.flexprefill.kept_log_sum_exp, (query, key, words, 16, 0.25))
    torch.library.opcheck(
        torch.ops.flexprefill.merge_means, (query, key, value, words, query.clone(), lse, 16, 0.25, "reference")
    )


def test_a_dense_call_has_nothing_to_correct():
    query, key, value = make_qkv(300)
    dense = dataclasses.replace(CORRECTED, dense_below=301)
    expected = masked_attention(query, key, value, BlockMap.causal(1, 2, q_len=300, kv_len=300, block_size=128))
    assert relative_error(prefill_attention(query, key, value, dense), expected) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"mask_mod": lambda b, h, q, k: q >= k}, "mask_mod"),
        ({"score_mod": lambda score, b, h, q, k: score}, "score_mod"),
        ({"return_aux": AuxRequest(max_scores=True)}, "max_scores"),
    ],
)
def test_what_it_cannot_be_combined_with_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"{name} cannot be combined with mean_correction.*mean_correction=False"):
        prefill_attention(*make_qkv(64), CORRECTED, **arguments)


def test_a_block_mask_cannot_carry_it():
    with pytest.raises(ValueError, match="config.mean_correction is more than a BlockMask.*prefill_attention"):
        create_prefill_block_mask(*make_qkv(64)[:2], CORRECTED)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len, kv_len, head_dim", [(2000, 2000, 128), (700, 2001, 64), (1, 1500, 128)])
def test_each_backend_is_at_most_twice_as_far_off_as_pytorch(backend, dtype, q_len, kv_len, head_dim, request):
    if backend == "flash":
        request.getfixturevalue("flash")
    inputs = make_qkv(q_len, kv_len, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    block_map = search_blocks(*inputs[:2], CONFIG)
    expected, expected_lse = corrected_attention(*inputs, block_map)
    kept = masked_attention(*inputs, block_map)
    theirs = relative_error(masked_attention(*inputs, block_map, dtype=dtype), kept)
    output, aux = prefill_attention(
        *inputs, CORRECTED, block_map=block_map, backend=backend, return_aux=AuxRequest(lse=True)
    )
    # one more rounding to the dtype than in attention alone
    assert relative_error(output.cpu(), expected) <= 3 * theirs
    assert (aux.lse.cpu() - expected_lse).abs().max() <= 2e-2


@pytest.mark.gpu
def test_the_last_rows_split_over_their_keys_are_corrected_too():
    inputs = make_qkv(16500, heads=2, kv_heads=1, head_dim=64, dtype=torch.bfloat16, device="cuda")
    block_map = search_blocks(*inputs[:2], CONFIG)
    both = [
        prefill_attention(*inputs, dataclasses.replace(CORRECTED, last_full_blocks=last), block_map=block_map)
        for last in (0, 1)
    ]
    assert relative_error(both[1], both[0]) <= 5e-3


def test_the_kernel_for_hopper_takes_the_common_shape_alone(monkeypatch):
    from flexprefill.attention import mean_correction_kernel as kernels

    query = torch.empty(1, 2, 300, 128, dtype=torch.bfloat16)
    assert not kernels.hopper_merges(query, query, 128, 0.1)  # not on CUDA
    monkeypatch.setattr(kernels, "hopper_copies", lambda tensor: tensor.dtype == torch.bfloat16)
    assert kernels.hopper_merges(query, query, 128, 0.1)
    for arguments in (
        (query.float(), query, 128, 0.1),
        (query, query.float(), 128, 0.1),
        (query, query[..., :64], 128, 0.1),
        (query, query, 64, 0.1),
        (query, query, 128, -0.1),
        (query, query, 128, 0.0),
    ):
        assert not kernels.hopper_merges(*arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize(
    "q_len, kv_len, heads, kv_heads, head_dim, dtype",
    [
        (2000, 2000, 8, 2, 128, torch.bfloat16),
        (700, 9001, 7, 1, 64, torch.float16),
        (300, 30_000, 4, 4, 128, torch.float16),
        (257, 16_400, 8, 2, 128, torch.bfloat16),  # the last row sees a short block whole
        (1, 8193, 4, 1, 64, torch.bfloat16),
    ],
)
def test_the_kernel_for_hopper_merges_what_the_others_merge(
    q_len, kv_len, heads, kv_heads, head_dim, dtype, density, monkeypatch
):
    from flexprefill.attention import mean_correction_kernel as kernels

    sizes = {"batch": 2, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype, "device": "cuda"}
    query, key, value = make_qkv(q_len, kv_len, **sizes)
    output, lse = torch.randn_like(query), 3 * torch.randn(query.shape[:3], device="cuda")
    empty = torch.rand_like(lse) < 0.2
    lse[empty], output[empty] = -torch.inf, torch.nan
    words = random_map(2, heads, q_len, kv_len, 128, density=density, seed=kv_len).words.cuda()
    inputs = query, key, value, words, output, lse, 128, head_dim**-0.5
    if not kernels.hopper_merges(query, output, 128, 1.0):
        pytest.skip("needs a Hopper GPU")
    merged, sums = merge_means(*inputs, "triton")
    monkeypatch.setattr(kernels, "hopper_merges", lambda *arguments: False)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for other in ("triton", "reference"):
        expected, expected_sums = merge_means(*inputs, other)
        finite = expected_sums.isfinite()
        assert torch.equal(finite, sums.isfinite()) and (merged[~finite] == 0).all()
        assert relative_error(merged[finite], expected[finite]) <= tolerance
        assert (sums - expected_sums)[finite].abs().max() <= 1e-4 * (1 + expected_sums[finite].abs().max())


@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16])
def test_later_keys_that_are_not_finite_stay_out_of_earlier_rows(dtype):
    query, key, value = make_qkv(700, heads=2, head_dim=64, dtype=dtype, device=DEVICE)
    words = random_map(1, 2, 700, 700, 128, density=0.3, seed=0).words.to(DEVICE)
    inputs = words, torch.randn_like(query), torch.randn(query.shape[:3], device=DEVICE), 128, 0.1, "triton"
    expected = merge_means(query, key, value, *inputs)
    key[:, :, 384:], value[:, :, 384:] = torch.nan, torch.inf
    for found, clean in zip(merge_means(query, key, value, *inputs), expected, strict=True):
        assert torch.equal(found[:, :, :384], clean[:, :, :384])
