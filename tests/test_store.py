import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_blockmap import random_map

from flexprefill import (
    FlexPrefillError,
    MaskFileError,
    PrefillConfig,
    load_masks,
    read_mask_info,
    save_masks,
)


@pytest.fixture
def masks():
    return {
        0: random_map(900, 1000, 16, heads=4, seed=1)[0],
        7: random_map(5000, 5000, 128, heads=2, seed=2)[0],
    }


@pytest.fixture
def path(tmp_path, masks):
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks, config=PrefillConfig(alpha=0.3), metadata={"model": "tiny"})
    return path


def test_what_is_saved_is_loaded(path, masks):
    assert load_masks(path) == masks
    assert load_masks(str(path)) == masks
    assert list(path.parent.iterdir()) == [path]


def test_the_file_says_what_it_is(path):
    info = read_mask_info(path)
    assert info.format_version == 1 and info.config == PrefillConfig(alpha=0.3) and info.metadata == {"model": "tiny"}
    assert info.layers[7] == {"q_len": 5000, "kv_len": 5000, "block_size": 128, "shape": (1, 2)}
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["layer.0", "layer.7"]
        assert file.get_tensor("layer.0").dtype == torch.int32


def test_chosen_layers_and_heads(path, masks):
    assert load_masks(path, layers=[7]) == {7: masks[7]}
    (chosen,) = load_masks(path, layers=[0], heads=[3, 1]).values()
    assert torch.equal(chosen.words, masks[0].words[:, [3, 1]])
    with pytest.raises(ValueError, match=r"layers has \[1\].*\[0, 7\]"):
        load_masks(path, layers=[1])
    with pytest.raises(ValueError, match="heads must be some of 0 … 1 for layer 7"):
        load_masks(path, heads=[3])


def test_config_and_metadata_may_be_left_out(tmp_path, masks):
    save_masks(tmp_path / "plain", masks)
    info = read_mask_info(tmp_path / "plain")
    assert info.config is None and info.metadata == {}


def test_a_failed_save_leaves_the_old_file(path, masks, monkeypatch):
    def fail(tensors, file, header):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("flexprefill.store.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_masks(path, {0: masks[7]})
    assert load_masks(path) == masks and list(path.parent.iterdir()) == [path]


def rewrite(path, *, words=None, drop=(), **header):
    with safe_open(path, "pt") as file:
        metadata = {name: entry for name, entry in file.metadata().items() if name not in drop} | header
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | (words or {}), path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "weights"}, "not one of masks"),
        ({"format_version": "2"}, "format version 2"),
        ({"format_version": "one"}, "no valid format_version"),
        ({"drop": ["layers"]}, "damaged header"),
        ({"layers": "[]"}, "damaged header"),
        ({"layers": json.dumps({"0": {"q_len": 1}})}, "damaged header"),
        ({"config": '{"alpha": 7}'}, "damaged header"),
        ({"user": "3"}, "damaged header"),
        ({"user": '{"a": 1}'}, "damaged header"),
        ({"layers": "[" * 100_000}, "damaged header"),
        ({"words": {"layer.9": torch.zeros(1)}}, "lists layers"),
        ({"words": {"layer.0": torch.zeros(1, 4, 57, 2)}}, "should be int32"),
        ({"words": {"layer.0": torch.zeros(1, 4, 57, 3, dtype=torch.int32)}}, "does not fit its sizes"),
        ({"words": {"layer.0": torch.zeros(1, 9, 57, 2, dtype=torch.int32)}}, "should be int32 of shape"),
        ({"words": {"layer.0": torch.full((1, 4, 57, 2), -1, dtype=torch.int32)}}, "causal future"),
    ],
)
def test_a_wrong_file_is_refused_and_named(path, change, message):
    rewrite(path, **change)
    with pytest.raises(MaskFileError, match=message) as raised:
        load_masks(path)
    assert str(path) in str(raised.value)


def test_a_truncated_foreign_or_missing_file_is_refused(path, tmp_path):
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(MaskFileError, match="no readable mask file"):
            load_masks(path)
    path.write_text("not a mask file at all")
    for wrong in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(FlexPrefillError, match="no readable mask file"):
            load_masks(wrong)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"masks": {}}, ValueError, "masks must hold at least one layer"),
        ({"masks": [1]}, TypeError, "masks must be a mapping.*list"),
        ({"masks": {0: 1}}, TypeError, r"masks\[0\] must be a BlockMap, got int"),
        ({"masks": {"0": random_map(9, 9, 16)[0]}}, TypeError, "layer numbers as keys, got '0'"),
        ({"masks": {-1: random_map(9, 9, 16)[0]}}, ValueError, "layer numbers from 0 up as keys, got -1"),
        ({"config": {}}, TypeError, "config must be a PrefillConfig"),
        ({"metadata": [1]}, TypeError, "metadata must be a mapping.*list"),
        ({"metadata": {"n": 1}}, TypeError, "metadata must map str to str"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        save_masks(tmp_path / "masks", **({"masks": {0: random_map(9, 9, 16)[0]}} | arguments))
    assert not any(tmp_path.iterdir())


def test_one_map_may_stand_in_two_layers(tmp_path, masks):
    save_masks(tmp_path / "masks", {0: masks[0], 1: masks[0]})
    assert load_masks(tmp_path / "masks") == {0: masks[0], 1: masks[0]}


def test_a_link_stays_and_the_umask_decides_who_reads(tmp_path, masks):
    save_masks(tmp_path / "file", masks)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    save_masks(tmp_path / "link", {3: masks[0]})
    assert (tmp_path / "link").is_symlink() and load_masks(tmp_path / "file") == {3: masks[0]}
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_a_file_is_ever_replaced(tmp_path, masks):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/"):
        with pytest.raises(ValueError, match="path must be a file or not exist yet"):
            save_masks(path, masks)
    with pytest.raises(TypeError, match="path must be a file name, got int"):
        save_masks(3, masks)


@pytest.mark.parametrize("name", ["layers", "heads"])
@pytest.mark.parametrize("numbers", [3, [False], [0.0], [[0]], ["0"], "0", b"\0"])
def test_layers_and_heads_are_lists_of_ints(path, name, numbers):
    with pytest.raises(TypeError, match=f"{name} must be a list of ints or None"):
        load_masks(path, **{name: numbers})
    for wrong in ([], [0, 0]):
        with pytest.raises(ValueError, match=f"{name} must name at least one and none twice"):
            load_masks(path, **{name: wrong})
