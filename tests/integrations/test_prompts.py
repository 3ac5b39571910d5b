"""Padded prompts whose places only the device knows: moved to the first slot, searched and attended as if alone."""

import pytest
import torch
from support.inputs import DEVICE, make_qkv

from flexprefill import PrefillConfig, search_blocks
from flexprefill.integrations.layer import Layer, attend_layer
from flexprefill.integrations.prompts import Prompts, Span, attend_each, bounds_of, spans_of


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

    expected = attend_each(attend, *tensors, Prompts(4, offset, None, spans_of(real)[0], DEVICE))
    bounds, whole = bounds_of(real)
    assert whole
    output = attend_each(attend, *tensors, Prompts(4, offset, None, bounds, DEVICE))
    assert torch.equal(output == 0, expected == 0)
    torch.testing.assert_close(output, expected)


def test_padding_between_tokens_is_found():
    real = torch.tensor([[False, True, True], [True, False, True]], device=DEVICE)
    assert bounds_of(real[:1])[1] and not bounds_of(real)[1]
    assert spans_of(real[:1]) == ((Span(1, 3),), True)
    assert spans_of(real) == ((Span(1, 3), Span(0, 3)), False)


@pytest.mark.parametrize(
    "config",
    [
        PrefillConfig.recommended(),
        pytest.param(PrefillConfig(alpha=0.3, last_full_blocks=1), marks=pytest.mark.slow),
    ],
)
def test_prompts_with_padding_behind_them_keep_the_blocks_that_each_keeps_alone(config):
    lengths = (700, 1500, 1024, 129)
    query, key, value = make_qkv(1500, batch=4, heads=4, kv_heads=2, device=DEVICE)
    # each block of keys has a topic of its own, and each block of queries asks for one of them
    generator = torch.Generator().manual_seed(0)
    topics = 8 * torch.nn.functional.normalize(torch.randn(12, key.shape[3], generator=generator)).to(DEVICE)
    key = key + topics.repeat_interleave(128, 0)[:1500]
    query = query + topics.roll(5, 0).repeat_interleave(128, 0)[:1500]
    layer = Layer(config, 0.6)
    output = attend_layer(layer, query, key, value, torch.tensor(lengths, device=DEVICE))
    for row, length in enumerate(lengths):
        alone = [tensor[row : row + 1, :, :length] for tensor in (query, key, value)]
        found = search_blocks(*alone[:2], config, scale=0.6)
        assert length < 1500 or found.density().mean() < 0.9
        expected = attend_layer(layer, *alone)
        assert torch.allclose(output[row, :, :length], expected[0], atol=1e-5)
