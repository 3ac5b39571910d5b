"""The setting of calls that name none."""

import pytest
import torch
from support.inputs import make_qkv

from flexprefill import (
    AttentionVariant,
    MaskCache,
    PagedKV,
    PrefillConfig,
    Sequences,
    create_prefill_block_mask,
    explain_backend,
    prefill_attention,
    record_masks,
    search_blocks,
)
from flexprefill.search.defaults import FLASHPREFILL, RECOMMENDED, resolve_config

LENGTH = 1500
VARIANTS = {
    "a window": AttentionVariant(sliding_window=300),
    "a soft cap": AttentionVariant(soft_cap=20.0),
    "slopes": AttentionVariant(alibi_slopes=torch.tensor([0.1, 0.2])),
    "sequences": AttentionVariant(sequences=Sequences.from_cu_seqlens(torch.tensor([0, 700, LENGTH]), LENGTH)),
}


@pytest.fixture(scope="module")
def tensors():
    return make_qkv(LENGTH, heads=2, kv_heads=1)


def test_plain_calls_take_the_recommended_setting(tensors):
    query, key, value = tensors
    expected = search_blocks(query, key, PrefillConfig.recommended())
    assert expected != search_blocks(query, key, PrefillConfig())
    assert search_blocks(query, key) == expected
    mask = create_prefill_block_mask(query, key)
    assert torch.equal(mask.to_dense(), expected.to_block_mask().to_dense())
    cached = MaskCache().prompt(torch.arange(LENGTH)).search_blocks(0, query, key)
    assert cached == expected
    output = prefill_attention(query, key, value)
    assert torch.equal(output, prefill_attention(query, key, value, block_map=expected))
    assert explain_backend(query, key, value) == explain_backend(query, key, value, PrefillConfig.recommended())


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_the_two_sided_search_cannot_do_takes_flashprefills(tensors, kind):
    query, key, _ = tensors
    variant = VARIANTS[kind]
    assert search_blocks(query, key, variant=variant) == search_blocks(query, key, PrefillConfig(), variant=variant)
    with pytest.raises(ValueError, match="probes and outliers attend plainly"):
        search_blocks(query, key, PrefillConfig.recommended(), variant=variant)


def test_sinks_are_no_reason_against_it(tensors):
    query, key, _ = tensors
    assert search_blocks(query, key, variant=AttentionVariant(sinks=torch.zeros(2))) == search_blocks(query, key)


def test_pages_take_flashprefills(tensors):
    query, key, value = tensors
    count = -(-LENGTH // 128)
    padded = [torch.nn.functional.pad(tensor, (0, 0, 0, count * 128 - LENGTH)) for tensor in (key, value)]
    pages = [tensor[0].unflatten(1, (count, 128)).transpose(0, 1).contiguous() for tensor in padded]
    paged = PagedKV(*pages, torch.arange(count, dtype=torch.int32)[None], LENGTH)
    assert search_blocks(query, paged) == search_blocks(query, key, PrefillConfig())
    assert explain_backend(query, paged) == explain_backend(query, paged, config=PrefillConfig())


class Searching(torch.nn.Module):
    def forward(self, query, key, variant):
        return create_prefill_block_mask(query, key, variant=variant)


@pytest.mark.parametrize(("variant", "config"), [(None, RECOMMENDED), (VARIANTS["a window"], FLASHPREFILL)])
def test_recordings_say_which_setting_it_was(tensors, variant, config):
    query, key, _ = tensors
    model = Searching()
    with record_masks(model) as recording:
        model(query, key, variant)
    assert recording.config == config


def test_a_named_setting_stays_as_it_is():
    named = PrefillConfig(alpha=0.3)
    assert resolve_config(named, VARIANTS["a window"], in_a_row=False) is named
