import math

import pytest
import torch
from support.inputs import make_qkv
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexprefill import BlockMap, FlexPrefillError, PrefillConfig, prefill_attention, search_blocks
from flexprefill.attention import log_sum_exp
from flexprefill.attention.log_sum_exp import factor_to, flash_lse_factor

LN2 = math.log(2)


@pytest.fixture
def unchecked():
    flash_lse_factor.cache_clear()
    yield
    flash_lse_factor.cache_clear()


def right_lse(query, key, block_map=None):
    """Of causal attention in float32, over the kept blocks alone if there is a map."""
    products = query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    rows = torch.arange(query.shape[2], device=query.device) + key.shape[2] - query.shape[2]
    allowed = torch.arange(key.shape[2], device=query.device) <= rows[:, None]
    if block_map is not None:
        size = block_map.block_size
        blocks = block_map.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
        allowed = allowed & blocks[:, :, : query.shape[2], : key.shape[2]]
    return (products * query.shape[3] ** -0.5).masked_fill(~allowed, -math.inf).logsumexp(-1)


def flash_that_gives(spoil, calls):
    """A flex_over of the right log-sum-exp, spoilt."""

    def flex_over(query, key, value, listed, settings):
        calls.append(settings)
        assert settings.return_aux == AuxRequest(lse=True) and settings.kernel_options == (("BACKEND", "FLASH"),)
        assert [tensor.flatten().tolist() for tensor in listed.lists] == [[1], [0], [0], [0]] and listed.offset is None
        return value, AuxOutput(lse=spoil(right_lse(query, key)))

    return flex_over


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("spoil", "factor"),
    [(lambda right: right, 1.0), (lambda right: right * LN2, 1 / LN2), (lambda right: right * (1 + 1e-3), 1.0)],
)
def test_the_check_finds_the_factor_once(monkeypatch, spoil, factor):
    calls = []
    monkeypatch.setattr(log_sum_exp, "flex_over", flash_that_gives(spoil, calls))
    for _ in range(3):
        assert flash_lse_factor(torch.device("cpu")) == pytest.approx(factor)
    assert len(calls) == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda right: right / LN2,
        lambda right: right * LN2**2,
        lambda right: right + 1,
        lambda right: right.flip(-1),
        lambda right: right * math.nan,
        torch.zeros_like,
    ],
)
def test_a_log_sum_exp_that_is_wrong_in_another_way_is_refused(monkeypatch, spoil):
    monkeypatch.setattr(log_sum_exp, "flex_over", flash_that_gives(spoil, []))
    for _ in range(2):  # and not only the first time
        with pytest.raises(FlexPrefillError, match="wrong log-sum-exp.*backend='triton'"):
            flash_lse_factor(torch.device("cpu"))


def test_the_factor_is_of_all_rows():
    right = torch.linspace(1, 8, 64)
    assert factor_to(right, right) == 1 and factor_to(right * LN2, right) == 1 / LN2
    half = torch.where(torch.arange(64) < 32, right, right * LN2)
    with pytest.raises(FlexPrefillError):
        factor_to(half, right)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "triton", "auto"])
@pytest.mark.parametrize("q_len, kv_len", [(2000, 2000), (700, 2000)])
def test_the_log_sum_exp_is_right_on_every_backend(backend, q_len, kv_len):
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="needs the package flash-attn-4")
    config = PrefillConfig(alpha=0.5, window_blocks=1)
    query, key, value = make_qkv(q_len, kv_len, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    block_map = search_blocks(query, key, config)
    _, aux = prefill_attention(query, key, value, block_map=block_map, backend=backend, return_aux=AuxRequest(lse=True))
    assert (aux.lse - right_lse(query, key, block_map)).abs().max() <= 1e-3
    assert aux.max_scores is None


@pytest.mark.gpu
def test_max_scores_are_right_and_come_from_triton():
    query, key, value = make_qkv(1000, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    everything = BlockMap.causal(1, 4, q_len=1000, kv_len=1000, block_size=128, device="cuda")
    request = AuxRequest(lse=True, max_scores=True)
    _, aux = prefill_attention(query, key, value, block_map=everything, return_aux=request)
    products = query.float() @ key.float().repeat_interleave(2, 1).transpose(2, 3) * 128**-0.5
    hidden = torch.ones(1000, 1000, dtype=torch.bool, device="cuda").triu(1)
    assert (aux.max_scores - products.masked_fill(hidden, -math.inf).amax(-1)).abs().max() <= 1e-3
    assert (aux.lse - right_lse(query, key)).abs().max() <= 1e-3
