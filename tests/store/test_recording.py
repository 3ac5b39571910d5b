import copy
import pickle
from dataclasses import replace

import pytest
import torch
from support.inputs import DEVICE
from torch import nn

from flexprefill import (
    AttentionVariant,
    BlockMap,
    FlexPrefillError,
    MaskCache,
    PrefillConfig,
    Sequences,
    attention_recall,
    create_prefill_block_mask,
    load_masks,
    mass_by_distance,
    prefill_attention,
    read_mask_info,
    record_masks,
    save_masks,
    search_blocks,
)
from flexprefill.integrations.layer import Layer, attend_layer
from flexprefill.store.figures import RECALL_ENTRY, read_recall

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


def assert_same_recall(found, expected):
    for name in ("shares", "rows", "can_lose"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_recall_and_inputs_of_every_layer(tmp_path):
    model, hidden = Model().to(DEVICE), torch.randn(2, 300, 32, device=DEVICE)
    with record_masks(model, recall=True, inputs=True) as masks:
        model(hidden)
    with record_masks(model) as plain:
        model(hidden)
    assert not plain.recalls and not plain.inputs and list(masks.recalls) == list(masks.inputs) == [0, 1, 2]
    for layer, module in enumerate(model.layers):
        query, key, _ = module.qkv(hidden)
        hidden = module(hidden)
        kept = masks.inputs[layer]
        assert torch.equal(kept.query, query) and torch.equal(kept.key, key) and kept.scale == 0.25
        assert_same_recall(masks.recalls[layer], attention_recall(query, key, masks[layer]))
    path = tmp_path / "masks"
    save_masks(path, masks, metadata={"by": "me"})
    save_masks(tmp_path / "plain", plain)
    info = read_mask_info(path)
    assert info.metadata["by"] == "me" and read_recall(read_mask_info(tmp_path / "plain")) == {}
    for layer, figures in read_recall(info).items():
        for name in ("mean", "least"):
            expected = getattr(masks.recalls[layer], name)
            torch.testing.assert_close(torch.tensor(figures[name]), expected, rtol=0, atol=1e-5)
    assert list(read_recall(info)) == [0, 1, 2] and load_masks(path, device=DEVICE) == dict(masks)
    copied = pickle.loads(pickle.dumps(masks))
    assert copied.table() == masks.table()


@pytest.mark.parametrize("entry", ["", "[1]", "{", "[" * 10**5, '{"0": 1}', '{"0": {"mean": [[1]], "least": [[2]]}}'])
def test_an_entry_of_somebody_else_is_no_recall(tmp_path, entry):
    block_map = BlockMap.causal(1, 1, q_len=100, kv_len=100, block_size=16)
    save_masks(tmp_path / "masks", {0: block_map}, metadata={RECALL_ENTRY: entry})
    info = read_mask_info(tmp_path / "masks")
    assert info.metadata == {RECALL_ENTRY: entry} and read_recall(info) == {}


@torch.no_grad()
def test_the_table_has_a_row_for_each_head_of_what_was_recorded():
    model, hidden = Model().to(DEVICE), torch.randn(1, 600, 32, device=DEVICE)
    names = ["layer", "module", "batch", "head", "density"]
    recall = [
        "recall",
        "recall_p05",
        "recall_median",
        "recall_least",
        "least_row",
        "measured_rows",
        "rows_that_can_lose",
    ]
    distance = ["sink", "mean_distance", "beyond_128", "beyond_512"]
    for asked, columns in (
        ({}, names),
        ({"recall": True}, names + recall),
        ({"inputs": True}, names + distance + recall),
    ):
        with record_masks(model, **asked) as masks:
            model(hidden)
        steps = []
        table = masks.table(progress=steps.append)
        assert [list(row) for row in table] == [columns] * 6 and sum(steps) == 3
        assert [(row["layer"], row["module"], row["head"]) for row in table] == [
            (layer, f"layers.{layer}", head) for layer in range(3) for head in range(2)
        ]
    inputs, row = masks.inputs[1], table[3]
    found = mass_by_distance(inputs.query, inputs.key, edges=[128, 512])
    assert row["beyond_128"] == pytest.approx(found.beyond(128)[0, 1].item(), abs=1e-6)
    assert row["recall"] == pytest.approx(
        attention_recall(inputs.query, inputs.key, masks[1]).mean[0, 1].item(), abs=1e-5
    )
    assert row["density"] == masks[1].density()[0, 1].item()
    assert "beyond_64" in masks.table(edges=iter([64]), rows=None)[-1]
    assert masks.table(rows=iter([500, 599]))[-1]["measured_rows"] == 2
    for name, wrong in (("edges", 64), ("rows", 1.5), ("seed", "0")):
        with pytest.raises(TypeError, match=f"^{name} must be"):
            masks.table(**{name: wrong})


class Calls(nn.Module):
    def forward(self, call):
        return call()


@torch.no_grad()
def test_recall_of_chunks_is_that_of_their_rows():
    query, key, _ = Attention(0).to(DEVICE).qkv(torch.randn(1, 320, 32, device=DEVICE))
    model = Calls()

    def search(start, end):
        part = query[:, :, start:end], key[:, :, :end]
        search_blocks(*part, CONFIG, last_chunk=end == 320).to_block_mask()

    with record_masks(model, recall=True, inputs=True) as masks:
        for start, end in ((0, 160), (160, 320)):
            model(lambda start=start, end=end: search(start, end))
    kept = masks.inputs[0]
    assert torch.equal(kept.query, query) and torch.equal(kept.key, key)
    whole = attention_recall(query, key, masks[0], rows=None)
    found = masks.recalls[0]
    assert torch.equal(found.can_lose, whole.can_lose)
    for head in range(2):
        ours, theirs = (recall.rows[0, head] for recall in (found, whole))
        assert ours[ours >= 0].equal(theirs[theirs >= 0])  # fewer in each chunk than are sampled
        torch.testing.assert_close(found.shares[0, head][ours >= 0], whole.shares[0, head][theirs >= 0])


WINDOW = AttentionVariant(sliding_window=100)
CALLS = {  # of a query, key, value and a map, with the arguments of its recall
    "a BlockMask": (
        lambda q, k, v, found: create_prefill_block_mask(q, k, CONFIG, variant=WINDOW),
        {"variant": WINDOW},
    ),
    "a cached map": (
        lambda q, k, v, found: MaskCache().prompt(range(300)).search_blocks(0, q, k, CONFIG, scale=0.3).to_block_mask(),
        {"scale": 0.3},
    ),
    "a dense layer": (lambda q, k, v, found: attend_layer(Layer(None, 0.3), q, k, v), {"scale": 0.3}),
    "attention": (lambda q, k, v, found: prefill_attention(q, k, v, CONFIG, scale=0.3), {"scale": 0.3}),
    "a given map": (lambda q, k, v, found: prefill_attention(q, k, v, block_map=found, scale=0.3), {"scale": 0.3}),
    "a layer with a window": (
        lambda q, k, v, found: attend_layer(Layer(None, 0.3, WINDOW), q, k, v),
        {"scale": 0.3, "variant": WINDOW},
    ),
}


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=pytest.mark.slow) if call == "a layer with a window" else call for call in CALLS]
)
@torch.no_grad()
def test_the_attention_is_known_whichever_function_made_the_map(call):
    query, key, value = Attention(0).qkv(torch.randn(1, 300, 32))
    found, model = search_blocks(query, key, CONFIG), Calls()
    function, arguments = CALLS[call]
    with record_masks(model, recall=True) as masks:
        model(lambda: function(query, key, value, found))
    assert_same_recall(masks.recalls[0], attention_recall(query, key, masks[0], **arguments))


@torch.no_grad()
def test_a_mask_mods_hidden_keys_hold_nothing_and_an_unknown_attention_has_no_recall():
    query, key, _ = Attention(0).qkv(torch.randn(1, 300, 32))

    def hides_odd_keys(b, h, q, k):
        return (k % 2 == 0) | (q == k)

    model = Calls()
    with record_masks(model, recall=True, inputs=True) as masks:
        model(lambda: create_prefill_block_mask(query, key, CONFIG, mask_mod=hides_odd_keys))
    assert masks.inputs[0].mask_mods == (hides_odd_keys,)
    without = attention_recall(query, key, masks[0])
    assert torch.equal(masks.recalls[0].rows, without.rows) and not masks.recalls[0].mean.allclose(without.mean)
    with record_masks(model, recall=True) as masks:
        model(search_blocks(query, key, CONFIG).to_block_mask)
    assert len(masks) == 1 and not masks.recalls


@torch.no_grad()
def test_what_a_mask_hides_is_no_lost_mass_whichever_way_it_is_put_on():
    query, key, _ = Attention(0).qkv(torch.randn(1, 128, 32))
    config = replace(CONFIG, alpha=1e-6)
    document = torch.arange(128) // 32

    def same_document(b, h, q, k):
        return document[q] == document[k]

    mask = BlockMap.causal(1, 1, q_len=128, kv_len=128, block_size=config.block_size).with_mask(same_document)
    ways = {
        "&": lambda: search_blocks(query, key, config) & mask,
        "to_block_mask of a mask": lambda: search_blocks(query, key, config).to_block_mask(mask),
        "to_block_mask of a mod": lambda: search_blocks(query, key, config).to_block_mask(same_document),
        "with_mask": lambda: search_blocks(query, key, config).with_mask(same_document),
        "create": lambda: create_prefill_block_mask(query, key, config, mask_mod=mask),
    }
    recalls = {}
    for way, call in ways.items():
        with record_masks(model := Calls(), recall=True) as masks:
            model(call)
        recalls[way] = masks.recalls[0].mean
        assert masks.config == config
        with record_masks(model, inputs=True) as masks:
            model(call)
        later = torch.tensor([[head["recall"] for head in masks.table()]])
        torch.testing.assert_close(later, recalls[way])
    kept = search_blocks(query, key, config).to_dense().repeat_interleave(config.block_size, 2)
    kept = kept.repeat_interleave(config.block_size, 3)
    hidden = (document[:, None] != document) | torch.ones(128, 128).triu(1).bool()
    weights = (query.double() @ key.double().mT * query.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    for head in range(2):
        loses = (~kept[0, head]).tril().any(-1)
        right = (weights[0, head] * kept[0, head]).sum(-1)[loses].mean() if loses.any() else torch.ones(())
        for way, recall in recalls.items():
            assert recall[0, head].item() == pytest.approx(right.item(), abs=1e-4), way


@pytest.mark.slow
@torch.no_grad()
def test_padding_takes_no_part_in_a_recorded_recall():
    query, key, value = (tensor.repeat(2, 1, 1, 1) for tensor in Attention(0).qkv(torch.randn(1, 300, 32)))
    lengths = torch.tensor([300, 170])
    layer = Layer(CONFIG, 0.25)
    with record_masks(model := Calls(), recall=True) as masks:
        model(lambda: attend_layer(layer, query, key, value, lengths.int()))
    recall = masks.recalls[0]
    assert recall.rows[1].max() < 170 <= recall.rows[0].max()
    variant = AttentionVariant(Sequences.from_lengths(lengths, 300))
    assert_same_recall(recall, attention_recall(query, key, masks[0], variant=variant))


def test_what_is_asked_of_a_recording_is_a_bool():
    for name in ("recall", "inputs"):
        with pytest.raises(TypeError, match=f"^{name} must be a bool, got 1"):
            record_masks(Model(), **{name: 1})


@torch.no_grad()
def test_a_recordings_settings_are_kept_in_its_file(tmp_path):
    query, key, value = Attention(0).qkv(torch.randn(1, 300, 32))
    other = replace(CONFIG, alpha=0.3)
    found = search_blocks(query, key, other)

    def record(*calls):
        model = nn.Sequential(*(Calls() for _ in calls))
        with record_masks(model) as masks:
            for layer, call in zip(model, calls, strict=True):
                layer(call)
        save_masks(tmp_path / "masks.safetensors", masks)
        return masks.configs, read_mask_info(tmp_path / "masks.safetensors").config

    def attend():
        return prefill_attention(query, key, value, CONFIG)

    def given():
        return prefill_attention(query, key, value, block_map=found)

    assert record(attend, lambda: create_prefill_block_mask(query, key, CONFIG)) == ({0: CONFIG, 1: CONFIG}, CONFIG)
    assert record(attend, lambda: search_blocks(query, key, other).to_block_mask()) == ({0: CONFIG, 1: other}, None)
    assert record(attend, given) == ({0: CONFIG}, CONFIG)
    assert record(given) == ({}, None)
