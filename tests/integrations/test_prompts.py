"""Padded prompts whose places only the device knows: moved to the first slot, searched and attended as if alone."""

import pytest
import torch
from support.inputs import DEVICE, make_qkv

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
