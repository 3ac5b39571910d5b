import copy
import pickle

import pytest
import torch
from support.inputs import DEVICE
from torch import nn

from flexprefill import (
    BlockMap,
    FlexPrefillError,
    PrefillConfig,
    create_prefill_block_mask,
    load_masks,
    record_masks,
    save_masks,
    search_blocks,
)

CONFIG = PrefillConfig(block_size=16, alpha=0.6, window_blocks=1)


class Attention(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.projection = nn.Linear(32, 32 * 3)
        torch.manual_seed(seed)
        nn.init.normal_(self.projection.weight)

    def qkv(self, hidden):
        return self.projection(hidden).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)

    def forward(self, hidden):
        query, key, value = self.qkv(hidden)
        create_prefill_block_mask(query, key, CONFIG)  # the mask is what is recorded, whoever uses it
        return hidden + value.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention(seed) for seed in range(3))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def expected_maps(model, hidden):
    maps = {}
    for number, layer in enumerate(model.layers):
        maps[number] = search_blocks(*layer.qkv(hidden)[:2], CONFIG)
        hidden = layer(hidden)
    return maps


@torch.no_grad()
def test_every_layers_map_is_recorded_and_can_be_saved(tmp_path):
    model, hidden = Model().to(DEVICE), torch.randn(1, 200, 32, device=DEVICE)
    expected, output = expected_maps(model, hidden), model(hidden)
    with record_masks(model) as masks:
        assert torch.equal(model(hidden), output)
    assert dict(masks) == expected and masks.modules == ["layers.0", "layers.1", "layers.2"]
    save_masks(tmp_path / "masks", masks)
    assert load_masks(tmp_path / "masks", device=DEVICE) == expected
    with pytest.raises(KeyError, match="layer 3: 3 layers were recorded"):
        masks[3]


@torch.no_grad()
def test_nothing_is_recorded_outside_the_block_or_of_another_model():
    model, other = Model().to(DEVICE), Model().to(DEVICE)
    first, second = torch.randn(2, 1, 100, 32, device=DEVICE)
    with record_masks(model) as masks:
        model(first)
        other(second)
        search_blocks(*other.layers[0].qkv(second)[:2], CONFIG).to_block_mask()
    model(second)
    assert dict(masks) == expected_maps(model, first)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_recordings_in_each_other_end_one_by_one():
    model = Model().to(DEVICE)
    first, second = torch.randn(2, 1, 100, 32, device=DEVICE)
    with record_masks(model) as outer:
        with record_masks(model) as inner:
            model(first)
        assert dict(outer) == dict(inner)
        model(second)
    model(first)
    assert dict(inner) == expected_maps(model, first)
    assert dict(outer) == expected_maps(model, second)


@torch.no_grad()
def test_a_second_pass_replaces_and_chunks_join():
    model = Model().to(DEVICE)
    first, second = torch.randn(2, 1, 100, 32, device=DEVICE)
    with record_masks(model) as masks:
        model(first)
        model(second)
    assert dict(masks) == expected_maps(model, second)

    class Chunked(nn.Module):
        def forward(self, query, key):
            search_blocks(query, key, CONFIG, last_chunk=key.shape[2] == 96).to_block_mask()

    chunked = Chunked()
    query, key, _ = Attention(0).to(DEVICE).qkv(first[:, :96])
    with record_masks(chunked) as masks:
        for end in (32, 64, 96):
            chunked(query[:, :, end - 32 : end], key[:, :, :end])
    assert masks[0] == search_blocks(query, key, CONFIG) and isinstance(masks[0], BlockMap)


@torch.no_grad()
def test_an_exception_in_the_model_leaves_no_hooks():
    model = Model().to(DEVICE)
    with pytest.raises(RuntimeError), record_masks(model):
        model(torch.randn(1, 100, 31, device=DEVICE))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    hidden = torch.randn(1, 100, 32, device=DEVICE)
    with record_masks(model) as masks:
        with pytest.raises(RuntimeError):
            model.layers[1](hidden[..., :31])
        model(hidden)
    assert dict(masks) == expected_maps(model, hidden)


def test_recording_nothing_is_an_error():
    with pytest.raises(FlexPrefillError, match="record_masks saw no mask"), record_masks(nn.Linear(3, 3)) as masks:
        masks  # noqa: B018
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        record_masks("model")  # before anything is entered


@torch.no_grad()
def test_a_recording_is_copied_and_pickled():
    model, hidden = Model().to(DEVICE), torch.randn(1, 300, 32, device=DEVICE)
    with record_masks(model) as masks:
        model(hidden)
    for copied in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks))):
        assert dict(copied) == dict(masks) and copied.modules == masks.modules
