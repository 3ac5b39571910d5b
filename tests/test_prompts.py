"""Padded prompts whose places only the device knows: moved to the first slot, searched and attended as if alone."""

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import make_qkv
from oracle import evaluate_rule

from flexprefill import PrefillConfig
from flexprefill.blockmap import ceil_div
from flexprefill.integrations.layer import search_prompts
from flexprefill.integrations.prompts import Prompts, Span, attend_each, bounds_of, spans_of

CONFIG = {"alpha": 0.7, "block_size": 16, "sink_blocks": 1, "window_blocks": 1}


@given(
    q_len=st.integers(1, 200),
    offset=st.integers(0, 60),
    cut=st.tuples(st.integers(0, 260), st.integers(0, 40)),
    last_full_blocks=st.integers(0, 2),
    mask_heads=st.sampled_from(["query", "kv"]),
    score_rows=st.sampled_from(["whole", "visible"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_shorter_prompts_keep_what_the_rule_says_of_each_alone(
    q_len, offset, cut, last_full_blocks, mask_heads, score_rows, seed
):
    kv_len = offset + q_len
    config = PrefillConfig(**CONFIG, last_full_blocks=last_full_blocks, mask_heads=mask_heads, score_rows=score_rows)
    query, key, _ = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2, head_dim=16, device=DEVICE, seed=seed)
    lengths = [max(kv_len - short, 0) for short in cut]
    found = search_prompts(query, key, config, 0.25, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)).to_dense()
    for entry, length in enumerate(lengths):
        own, own_keys = max(length - offset, 0), ceil_div(length, 16)
        rows = ceil_div(own, 16)
        assert (found[entry, :, rows:].sum(-1) == 1).all()
        if not own:
            continue
        alone = query[entry : entry + 1, :, :own], key[entry : entry + 1, :, :length]
        keep, close = evaluate_rule(*alone, config=config, scale=0.25)
        mine = found[entry : entry + 1, :, :rows, :own_keys].cpu()
        differs = (mine != keep) & ~close
        assert not differs[:, :, :-1].any()
        # the last is scored with padding
        assert not (keep & ~mine)[:, :, -1].any()
        if last_full_blocks:
            assert not differs.any()


@pytest.mark.parametrize("offset", [0, 7])
def test_prompts_on_the_device_are_attended_as_those_known_on_the_host(offset):
    real = torch.ones(4, 50, dtype=torch.bool, device=DEVICE)
    real[0, 45:] = real[2, 30:] = real[3] = False
    if offset == 0:
        real[1, :20] = False
    query, key, value = make_qkv(50 - offset, 50, batch=4, heads=2, head_dim=16, device=DEVICE)
    tensors = query, torch.nn.functional.pad(key, (0, 0, 0, 9)), torch.nn.functional.pad(value, (0, 0, 0, 9))
    # nothing of padding may be seen
    outside = torch.nn.functional.pad(~real, (0, 9), value=True)[:, None, :, None]
    tensors = tensors[0], *(tensor.masked_fill(outside, torch.nan) for tensor in tensors[1:])

    def attend(query, key, value, lengths):
        assert key.isfinite().all() and value.isfinite().all()
        position = torch.arange(key.shape[2], device=DEVICE)
        seen = position <= position[key.shape[2] - query.shape[2] :, None]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)

    expected = attend_each(attend, *tensors, Prompts(4, offset, None, spans_of(real), DEVICE))
    bounds, whole = bounds_of(real)
    assert whole
    output = attend_each(attend, *tensors, Prompts(4, offset, None, bounds, DEVICE))
    assert torch.equal(output == 0, expected == 0)
    torch.testing.assert_close(output, expected)


def test_padding_between_tokens_is_found():
    real = torch.tensor([[False, True, True], [True, False, True]], device=DEVICE)
    assert bounds_of(real[:1])[1] and not bounds_of(real)[1]
    assert spans_of(real[:1]) == (Span(1, 3),)
    with pytest.raises(ValueError, match="padding between tokens"):
        spans_of(real)
