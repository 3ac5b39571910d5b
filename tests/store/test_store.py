import errno
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.inputs import random_map

from flexprefill import (
    BlockMap,
    FlexPrefillError,
    MaskFileError,
    PrefillConfig,
    load_masks,
    read_mask_info,
    save_masks,
)
from flexprefill.blockmap.geometry import Geometry, visible_blocks
from flexprefill.store.heads import triangle_bits

DATA = Path(__file__).parents[1] / "data"
TESTS, HERE = str(Path(__file__).parents[1]), str(Path(__file__).parent)
CONFIG = PrefillConfig(alpha=0.3)
TOKEN_IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def masks():
    return {
        0: random_map(900, 1000, 16, heads=4, seed=1)[0],
        7: random_map(5000, 5000, 128, heads=2, seed=2)[0],
    }


@pytest.fixture
def path(tmp_path, masks):
    path = tmp_path / "masks.safetensors"
    save_masks(
        path,
        masks,
        config=CONFIG,
        metadata={"text": "random"},
        model="tiny",
        token_ids=TOKEN_IDS,
        dtype=torch.bfloat16,
    )
    return path


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny"
    save_masks(path, {2: random_map(40, 70, 16, batch=2, heads=2, seed=3)[0], 11: random_map(5, 5, 1, heads=1)[0]})
    return path


def test_what_is_saved_is_loaded(path, masks):
    assert load_masks(path) == masks
    assert load_masks(str(path)) == masks
    assert list(path.parent.iterdir()) == [path]


def test_the_file_says_what_it_is(path, masks):
    info = read_mask_info(path)
    assert info.format_version == 2 and info.config == CONFIG and info.metadata == {"text": "random"}
    assert info.layers[7] == {"q_len": 5000, "kv_len": 5000, "block_size": 128, "shape": (1, 2)}
    assert (info.model, info.dtype, info.scoring) == ("tiny", "bfloat16", "flashprefill-v1")
    assert info.library.keys() == {"flexprefill", "torch", "safetensors"} and info.library["torch"] == torch.__version__
    canonical = json.dumps(CONFIG.to_dict(), sort_keys=True, separators=(",", ":"))
    assert info.config_hash == hashlib.sha256(canonical.encode()).hexdigest()
    assert info.token_ids_hash == hashlib.sha256(struct.pack("<5q", *TOKEN_IDS)).hexdigest()
    for layer, block_map in masks.items():
        assert torch.equal(torch.tensor(info.density[layer]), block_map.density())


def test_another_program_can_open_the_file(path, masks):
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["checksums", "crc32", "density", "layer.0", "layer.7"]
        stored = file.get_tensor("layer.0")
        assert stored.dtype == torch.uint8
        for head in range(4):  # the documented place of each bit
            dense = masks[0].to_dense()[0, head]
            rows = zip(dense, visible_blocks(masks[0].geometry, "cpu").tolist(), strict=True)
            bits = [bit for row, visible in rows for bit in row[:visible].tolist()]
            stream = sum(bit << k for k, bit in enumerate(bits))
            assert bytes(stored[0, head].tolist()) == stream.to_bytes(-(-len(bits) // 8), "little")
        assert file.get_tensor("crc32")[1].item() == zlib.crc32(bytes(stored[0, 1].tolist()))


def test_no_byte_more_than_the_triangle_needs(tmp_path):
    save_masks(tmp_path / "long", {0: BlockMap.causal(1, 2, q_len=131_072, kv_len=131_072, block_size=128)})
    triangle = 1024 * 1025 // 2 // 8
    assert 2 * triangle < (tmp_path / "long").stat().st_size < 2 * triangle + 3000


GEOMETRIES = st.sampled_from([1, 3, 16, 128]).flatmap(
    lambda size: st.integers(1, 70 * size).flatmap(
        lambda kv_len: st.builds(Geometry, st.integers(1, kv_len), st.just(kv_len), st.just(size))
    )
)


@settings(deadline=None, max_examples=300)
@given(GEOMETRIES)
def test_the_bits_of_a_triangle_are_what_its_rows_see(geometry):
    assert triangle_bits(geometry) == visible_blocks(geometry, "cpu").sum().item()


@settings(deadline=None, max_examples=80)
@given(
    layers=st.dictionaries(
        st.integers(0, 2**31 - 1), st.tuples(GEOMETRIES, st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=3
    ),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_maps_survive_whole_and_in_part(tmp_path_factory, layers, share, seed, data):
    path = tmp_path_factory.getbasetemp() / "any"
    masks = {
        layer: random_map(*geometry, batch=batch, heads=heads, share=share, seed=seed)[0]
        for layer, (geometry, batch, heads) in layers.items()
    }
    save_masks(path, masks)
    assert load_masks(path) == masks and list(load_masks(path)) == sorted(masks)
    layer = data.draw(st.sampled_from(sorted(masks)))
    heads = data.draw(st.permutations(range(layers[layer][2])))[: data.draw(st.integers(1, layers[layer][2]))]
    chosen = load_masks(path, layers=[layer], heads=heads)
    assert chosen.keys() == {layer} and torch.equal(chosen[layer].words, masks[layer].words[:, heads])


def test_heads_are_split_into_steps_without_a_trace(tmp_path, monkeypatch, masks):
    monkeypatch.setattr("flexprefill.store.heads.WORDS_AT_A_TIME", 1)  # one head at a time
    save_masks(tmp_path / "masks", masks)
    assert load_masks(tmp_path / "masks") == masks
    assert load_masks(DATA / "masks_v1.safetensors") == load_masks(DATA / "masks_v2.safetensors")


@pytest.mark.parametrize("name", ["masks_v1.safetensors", "masks_v2.safetensors"])
def test_files_of_every_version_stay_readable(name):
    loaded = load_masks(DATA / name)
    expected = json.loads((DATA / "masks.json").read_text())
    assert list(loaded) == [int(layer) for layer in expected]
    for block_map, content in zip(loaded.values(), expected.values(), strict=True):
        kept = torch.tensor(
            [[[[c == "#" for c in row] for row in rows] for rows in heads] for heads in content["kept"]]
        )
        lengths = {name: content[name] for name in ("q_len", "kv_len", "block_size")}
        assert block_map == BlockMap.from_dense(kept, **lengths)
    (chosen,) = load_masks(DATA / name, layers=[0], heads=[1]).values()
    assert torch.equal(chosen.words, loaded[0].words[:, 1:])
    info = read_mask_info(DATA / name)
    assert info.config == PrefillConfig(alpha=0.25, block_size=16) and info.metadata == {"text": "random, α"}
    if name == "masks_v2.safetensors":
        assert (info.model, info.dtype) == ("tiny-model", "bfloat16")
        assert info.library == {"flexprefill": "0.1.0", "torch": "2.13.0+cpu", "safetensors": "0.8.0"}
    else:
        assert (info.format_version, info.model, info.density) == (1, None, {})


def test_chosen_layers_and_heads(path, masks):
    assert load_masks(path, layers=[7]) == {7: masks[7]}
    (chosen,) = load_masks(path, layers=[0], heads=[3, 1]).values()
    assert torch.equal(chosen.words, masks[0].words[:, [3, 1]])
    with pytest.raises(ValueError, match=r"layers has \[1\].*\[0, 7\]"):
        load_masks(path, layers=[1])
    with pytest.raises(ValueError, match="heads must be some of 0 … 1 for layer 7"):
        load_masks(path, heads=[3])


def test_one_head_is_read_without_the_others(path, masks):
    whole = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        size = file.get_tensor("layer.0").shape[2]
        first = len(whole) - 8 - 6 * 8 - file.get_tensor("layer.7").numel() - 4 * size
    for head in (0, 2, 3):  # damaged, so that reading them would show
        whole[first + head * size] ^= 1
    path.write_bytes(whole)
    assert torch.equal(load_masks(path, layers=[0], heads=[1])[0].words, masks[0].words[:, 1:2])
    assert load_masks(path, layers=[7]) == {7: masks[7]}
    with pytest.raises(MaskFileError, match="layer 0, batch entry 0, head 2 does not have its checksum"):
        load_masks(path, layers=[0], heads=[1, 2])


def test_what_was_not_given_is_none(tmp_path, masks):
    save_masks(tmp_path / "plain", masks)
    info = read_mask_info(tmp_path / "plain")
    assert info.config is info.config_hash is info.model is info.token_ids_hash is info.dtype is None
    assert info.metadata == {}


def test_a_file_of_something_else_than_expected_is_refused(path, masks):
    assert load_masks(path, config=CONFIG, model="tiny", token_ids=torch.tensor([TOKEN_IDS])) == masks
    for name, wrong, message in (
        ("config", PrefillConfig(), r"config PrefillConfig\(alpha=0.3.*, not the expected PrefillConfig\(alpha=0.1"),
        ("model", "large", "model 'tiny', not the expected 'large'"),
        ("token_ids", [3, 1, 4, 1, 6], "token_ids_hash '[0-9a-f]{64}', not the expected '[0-9a-f]{64}'"),
    ):
        with pytest.raises(MaskFileError, match=f"was saved with {message}") as raised:
            load_masks(path, **{name: wrong})
        assert str(path) in str(raised.value)
    with pytest.raises(MaskFileError, match="model None, not the expected 'tiny'"):
        load_masks(DATA / "masks_v1.safetensors", model="tiny")


TOKENS = ["Grüße", " 日本", "\n", '"</script>', "\ud800", "", "\\u0041", "\0"] * 5


def test_the_prompts_text_is_kept_only_where_it_is_given(tmp_path, masks):
    maps = {0: random_map(20, 40, 16, heads=2)[0], 3: random_map(40, 40, 8)[0]}
    save_masks(tmp_path / "with", maps, tokens=TOKENS)
    info = read_mask_info(tmp_path / "with")
    assert info.tokens == tuple(TOKENS) and "Grüße" not in repr(info)
    assert load_masks(tmp_path / "with") == maps
    save_masks(tmp_path / "without", maps, token_ids=range(40))
    assert read_mask_info(tmp_path / "without").tokens is None


@settings(max_examples=25, deadline=None)
@given(tokens=st.lists(st.text(st.characters(exclude_categories=[])), min_size=9, max_size=9))
def test_any_text_of_a_prompt_survives(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("tokens") / "masks"
    save_masks(path, {0: random_map(9, 9, 16)[0]}, tokens=tokens)
    assert read_mask_info(path).tokens == tuple(tokens)


def test_token_ids_are_hashed_by_value(tmp_path, masks):
    hashes = set()
    for token_ids in (TOKEN_IDS, tuple(TOKEN_IDS), torch.tensor([TOKEN_IDS], dtype=torch.int32)):
        save_masks(tmp_path / "masks", masks, token_ids=token_ids)
        hashes.add(read_mask_info(tmp_path / "masks").token_ids_hash)
    assert len(hashes) == 1


def test_progress_is_told_of_each_layer(tmp_path, masks):
    steps = []
    save_masks(tmp_path / "masks", masks, progress=steps.append)
    load_masks(tmp_path / "masks", progress=steps.append)
    assert steps == [1] * 4


def test_progress_can_be_shown(tmp_path, masks, capsys, monkeypatch):
    path = tmp_path / "masks"
    save_masks(path, masks, progress=False)
    load_masks(path, progress=None)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as without tqdm
    save_masks(path, masks, progress=True)
    load_masks(path, progress=True)
    assert capsys.readouterr() == ("", "writing masks …\nreading masks …\n")
    monkeypatch.undo()
    pytest.importorskip("tqdm")
    save_masks(path, masks, progress=True)
    load_masks(path, layers=[7], progress=True)
    shown = capsys.readouterr().err
    assert "writing masks: " in shown and "/2 [" in shown and "reading masks: " in shown and "/1 [" in shown
    for wrong in (1, "tqdm"):
        with pytest.raises(TypeError, match="progress must be a bool, None or a function of the steps done, got"):
            save_masks(tmp_path / "new", masks, progress=wrong)
        with pytest.raises(TypeError, match="progress must be"):
            load_masks(path, progress=wrong)
    assert list(tmp_path.iterdir()) == [path]


class Lazy(Mapping):
    """Makes each map when it is asked for; ``make`` sees the layer."""

    def __init__(self, layers, make):
        self.layers, self.make = layers, make

    def __len__(self):
        return len(self.layers)

    def __iter__(self):
        return iter(self.layers)

    def __getitem__(self, layer):
        return self.make(layer)


def test_maps_are_taken_once_in_order_and_one_is_held_at_a_time(tmp_path):
    words = BlockMap.causal(1, 32, q_len=1024, kv_len=1024, block_size=1).words
    size = words.nbytes  # 4 MB
    asked = []

    def make(layer):
        asked.append(layer)
        data = bytearray(size)  # Python's own memory, which is traced
        copy = torch.frombuffer(data, dtype=torch.int32).view(words.shape).copy_(words)
        return BlockMap(copy, 1024, 1024, 1)

    tracemalloc.start()
    save_masks(tmp_path / "masks", Lazy(range(9, -1, -1), make))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert asked == list(range(10))
    assert size < peak < 3 * size  # a map, and what packing a part of it takes
    assert load_masks(tmp_path / "masks", layers=[8])[8].words.equal(words)


def test_a_failed_save_leaves_the_old_file(path, masks, monkeypatch):
    def fail(layer):
        if layer == 3:
            raise OSError("disk full")
        return masks[0]

    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            save_masks(path, Lazy(range(5), fail))
        with pytest.raises(OSError, match="disk full"):
            save_masks(path.parent / "new", Lazy(range(5), fail))
        assert load_masks(path) == masks and list(path.parent.iterdir()) == [path]
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)  # as on a file system without nameless files
    save_masks(path, {3: masks[0]})
    assert load_masks(path) == {3: masks[0]} and list(path.parent.iterdir()) == [path]


SAVE = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import os, signal
from test_store import Lazy, random_map, save_masks
def make(layer):
    if layer == {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
    return random_map(3000, 3000, 16, heads=8, seed=1000 * {seed} + layer)[0]
for _ in range({times}):
    save_masks({path!r}, Lazy(range(3), make), metadata={{"seed": {seed!r}}})
"""


def start_saving(path, *, seed, times=1, killed=-1):
    code = SAVE.format(tests=TESTS, here=HERE, path=str(path), seed=str(seed), times=times, killed=killed)
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.slow
def test_processes_that_save_to_one_path_leave_one_whole_file(tmp_path):
    path = tmp_path / "masks"
    loads = 0
    processes = [start_saving(path, seed=seed, times=30) for seed in (1, 2)]
    running = True
    while running:
        running = any(process.poll() is None for process in processes)
        if path.exists():
            assert len(load_masks(path)) == 3
            loads += 1
    assert [process.returncode for process in processes] == [0, 0] and loads > 1
    seed = int(read_mask_info(path).metadata["seed"])
    expected = {layer: random_map(3000, 3000, 16, heads=8, seed=1000 * seed + layer)[0] for layer in range(3)}
    assert load_masks(path) == expected and list(tmp_path.iterdir()) == [path]


def test_a_killed_save_leaves_the_old_file(path, masks):
    try:
        os.close(os.open(path.parent, os.O_TMPFILE | os.O_RDWR))
    except (AttributeError, OSError):
        pytest.skip("this file system has no nameless files")
    assert start_saving(path, seed=1, killed=2).wait() == -signal.SIGKILL
    assert load_masks(path) == masks and list(path.parent.iterdir()) == [path]


def forge(path, changed=lambda fields: None, **strings):
    """Rewrites the header, its checksum included, with these strings (None drops one) and this change."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    fields = json.loads(whole[8:end])
    metadata = fields["__metadata__"] | strings
    fields["__metadata__"] = {name: string for name, string in metadata.items() if string is not None}
    fields = changed(fields) or fields
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    header = len(text).to_bytes(8, "little") + text
    path.write_bytes(header + whole[end:-8] + struct.pack("<I", zlib.crc32(header)) + whole[-4:])


def sizes(**changed):
    layer = {"q_len": 900, "kv_len": 1000, "block_size": 16, "shape": [1, 4]} | changed
    return json.dumps({"0": layer, "7": {"q_len": 5000, "kv_len": 5000, "block_size": 128, "shape": [1, 2]}})


def with_tensor(name, **changed):
    def change(fields):
        fields[name] = fields.get(name, {}) | changed

    return change


def without(name):
    def change(fields):
        del fields[name]

    return change


def test_a_forged_header_is_read_if_it_is_right(path, masks):
    forge(path)
    assert load_masks(path) == masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "weights"}, "not one of masks"),
        ({"format_version": "3"}, "format version 3.*reads 1 to 2"),
        ({"format_version": "1"}, "'layer.0' should be .'I32'"),
        ({"format_version": "one"}, "no valid format_version"),
        ({"format_version": "0"}, "no valid format_version"),
        ({"format_version": "9" * 5000}, "no valid format_version"),
        ({"layers": None}, r"lacks \['layers'\]"),
        ({"library": None}, r"lacks \['library'\]"),
        ({"layers": "[]"}, "an object of other values"),
        ({"layers": "{}"}, "at least one"),
        ({"layers": '{"0": [1]}'}, "an object of other values"),
        ({"layers": json.dumps({"0": {"q_len": 1}})}, "a layer must have"),
        ({"layers": json.dumps({"00": {}})}, "must have numbers"),
        ({"layers": "[" * 100_000}, "recursion|nested"),
        ({"layers": sizes(shape=[4, 1])}, "'layer.0' should be"),
        ({"layers": sizes(shape=[1, 5])}, "'layer.0' should be"),
        ({"layers": sizes(shape=[1, 4, 1])}, "shape must be two numbers"),
        ({"layers": sizes(shape=[1, 2**60])}, "shape must be two numbers"),
        ({"layers": sizes(shape=[2**31 - 1, 2**31 - 1])}, "'layer.0' should be"),
        ({"layers": sizes(q_len=2**31 - 1, kv_len=2**31 - 1, block_size=1)}, "'layer.0' should be"),
        ({"layers": sizes(q_len=1001)}, "q_len must be at most kv_len"),
        ({"layers": sizes(q_len=True)}, "q_len must be an int"),
        ({"layers": sizes(q_len=900.0)}, "q_len must be an int"),
        ({"layers": sizes(block_size=0)}, "block_size must be at least 1"),
        ({"layers": sizes(block_size=float("nan"))}, "the number NaN"),
        ({"layers": '{"0": {}, "0": {}}'}, "one name twice"),
        ({"config": '{"alpha": 7}'}, "alpha must be in"),
        ({"config": '{"beta": 7}'}, "unknown names"),
        ({"config": "null"}, "config_hash"),
        ({"config_hash": ""}, "config_hash"),
        ({"user": "3"}, "an object of other values"),
        ({"tokens": "3"}, "tokens must be a list of strings"),
        ({"tokens": json.dumps(["a"] * 1000)}, "tokens must be one for each key, 5000 in layer 7, got 1000"),
        ({"tokens": json.dumps([["a"]] * 1000)}, "tokens must be strings, got list"),
        ({"user": '{"a": 1}'}, "an object of other values"),
        ({"changed": with_tensor("layer.9", dtype="U8", shape=[0], data_offsets=[0, 0])}, "'layer.9' should be None"),
        ({"changed": with_tensor("layer.9", dtype="U8", shape=[1], data_offsets=[0, 1])}, "starts at byte 0"),
        ({"changed": with_tensor("layer.0", dtype="F64")}, "is of dtype 'F64'"),
        ({"changed": with_tensor("layer.0", dtype=["U8"])}, "is of dtype"),
        ({"changed": with_tensor("layer.0", shape=[1, 4, 2**62])}, "does not take the bytes"),
        ({"changed": with_tensor("layer.0", shape=[10**4000] * 9)}, "has shape"),
        ({"changed": with_tensor("layer.0", data_offsets=[0])}, "data_offsets"),
        ({"changed": with_tensor("layer.0", data_offsets=[-1, 0])}, "data_offsets"),
        ({"changed": with_tensor("layer.0", extra=1)}, "must have dtype, shape and data_offsets"),
        ({"changed": with_tensor("density", dtype="U32")}, "'density' should be"),
        ({"changed": without("layer.0")}, "starts at byte"),
        ({"changed": without("checksums")}, "should take"),
        ({"changed": lambda fields: b"[]"}, "no JSON object"),
        ({"changed": lambda fields: b"{"}, "Expecting"),
        ({"changed": lambda fields: b"\xff"}, "utf-8"),
        ({"changed": lambda fields: b'{"a": 1, "a": 1}'}, "one name twice"),
        ({"changed": lambda fields: {"__metadata__": {"format": 1}}}, "must map str to str"),
        ({"changed": lambda fields: {"layer.0": 1}}, "must have dtype, shape and data_offsets"),
    ],
)
def test_a_wrong_header_is_refused_before_anything_is_made(path, change, message):
    forge(path, **change)
    tracemalloc.start()
    with pytest.raises(MaskFileError, match=message) as raised:
        load_masks(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(raised.value) and len(str(raised.value)) < 1000 + 5000
    assert peak < 100 * path.stat().st_size + 2**20


def test_tensors_in_another_order_are_refused(path):
    def swap(fields):
        first, second = fields["density"], fields["crc32"]
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]

    forge(path, swap)
    with pytest.raises(MaskFileError, match="should follow each other"):
        load_masks(path)


def test_bits_after_the_last_block_are_refused(tmp_path):
    path = tmp_path / "masks"
    save_masks(path, {0: BlockMap.causal(1, 1, q_len=5, kv_len=5, block_size=1)})  # 15 bits
    whole = bytearray(path.read_bytes())
    whole[-17] |= 0x80
    tables = whole[-16:-12] + struct.pack("<I", zlib.crc32(whole[-18:-16]))
    path.write_bytes(whole[:-16] + tables + whole[-8:-4] + struct.pack("<I", zlib.crc32(tables)))
    with pytest.raises(MaskFileError, match="layer 0 has bits outside its triangle"):
        load_masks(path)


def rewrite_first_version(path, **words):
    with safe_open(DATA / "masks_v1.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors | {name.replace("_", "."): tensor for name, tensor in words.items()}, path, file.metadata())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layer_9": torch.zeros(1, dtype=torch.int32)}, "'layer.9' should be None"),
        ({"layer_0": torch.zeros(1, 2, 19, 1)}, "'layer.0' should be"),
        ({"layer_0": torch.zeros(1, 2, 19, 2, dtype=torch.int32)}, "'layer.0' should be"),
        ({"layer_0": torch.full((1, 2, 19, 1), -1, dtype=torch.int32)}, "layer 0 has bits outside its triangle"),
    ],
)
def test_wrong_words_of_the_first_version_are_refused(tmp_path, words, message):
    rewrite_first_version(tmp_path / "masks", **words)
    with pytest.raises(MaskFileError, match=message):
        load_masks(tmp_path / "masks")


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_cut_anywhere_is_refused(tmp_path, version):
    path = tmp_path / "cut"
    path.write_bytes((DATA / f"masks_v{version}.safetensors").read_bytes())
    for length in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(MaskFileError, match="no readable mask file"):
            load_masks(path)
    path.write_bytes((DATA / f"masks_v{version}.safetensors").read_bytes() + b"\0")
    with pytest.raises(MaskFileError, match="follow the header"):
        load_masks(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, masks):
    """A mapped file would end the process here."""
    path = tmp_path / "masks"
    save_masks(path, dict.fromkeys(range(20), masks[0]))
    half = path.stat().st_size // 2
    with pytest.raises(MaskFileError, match=f"no readable mask file: it ends at byte {half}"):
        load_masks(path, progress=lambda steps: os.truncate(path, half))


def outcome(path, start, change):
    """What loading the file says with these bytes changed for a while."""
    with path.open("r+b", buffering=0) as file:
        before = os.pread(file.fileno(), len(change), start)
        if before == change:
            return "unchanged"
        os.pwrite(file.fileno(), change, start)
        try:
            load_masks(path)
            return "loaded"
        except MaskFileError as error:
            assert str(path) in str(error)
            return "refused"
        finally:
            os.pwrite(file.fileno(), before, start)


def test_any_flipped_bit_is_found(tiny):
    whole = tiny.read_bytes()
    for start in range(len(whole)):
        for bit in range(8):
            assert outcome(tiny, start, bytes([whole[start] ^ 1 << bit])) == "refused", (start, bit)


def random_change(generator, whole):
    """Where, and which bytes: some flipped bits, a run of other bytes, or two stretches exchanged."""
    kind = generator.randrange(3)
    start = generator.randrange(len(whole))
    length = generator.randint(1, min(64, len(whole) - start))
    piece = bytearray(whole[start : start + length])
    if kind == 0:
        for _ in range(generator.randint(1, 8)):
            piece[generator.randrange(length)] ^= 1 << generator.randrange(8)
    elif kind == 1:
        piece[:] = generator.choice([bytes(length), b"\xff" * length, b"9" * length, generator.randbytes(length)])
    else:
        other = generator.randrange(len(whole) - length + 1)
        piece[:] = whole[other : other + length]
    return start, bytes(piece)


@pytest.mark.parametrize(
    ("version", "times"),
    [
        (1, 1000),
        pytest.param(2, 2000, marks=pytest.mark.slow),
        pytest.param(2, 10_000, marks=pytest.mark.release),
    ],
)
def test_random_damage_is_refused_and_crashes_nothing(tmp_path, version, times):
    path = tmp_path / "masks"
    whole = (DATA / f"masks_v{version}.safetensors").read_bytes()
    path.write_bytes(whole)
    generator = random.Random(version)
    outcomes = [outcome(path, *random_change(generator, whole)) for _ in range(times)]
    assert outcomes.count("refused") > times / 2
    if version == 2:  # the first version has no checksums
        assert "loaded" not in outcomes


def test_a_foreign_or_missing_file_is_refused(path, tmp_path):
    path.write_text("not a mask file at all")
    os.mkfifo(tmp_path / "pipe")
    for wrong in (path, tmp_path / "missing", tmp_path, tmp_path / "pipe", "/dev/zero", "a\0b"):
        with pytest.raises(FlexPrefillError, match="no readable mask file"):
            load_masks(wrong)
    with pytest.raises(TypeError, match="path must be a file name, got int"):
        load_masks(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"masks": {}}, ValueError, "masks must hold at least one layer"),
        ({"masks": [1]}, TypeError, "masks must be a mapping.*list"),
        ({"masks": {0: 1}}, TypeError, r"masks\[0\] must be a BlockMap, got int"),
        ({"masks": {"0": random_map(9, 9, 16)[0]}}, TypeError, "layer numbers as keys, got '0'"),
        ({"masks": {-1: random_map(9, 9, 16)[0]}}, ValueError, "layer numbers from 0 up, .* got -1"),
        ({"config": {}}, TypeError, "config must be a PrefillConfig"),
        ({"metadata": [1]}, TypeError, "metadata must be a mapping.*list"),
        ({"metadata": {"n": 1}}, TypeError, "metadata must map str to str"),
        ({"metadata": {"n": "1" * 100_000_000}}, ValueError, "metadata and tokens must leave the header below"),
        ({"model": 3}, TypeError, "model must be a name or None, got 3"),
        ({"model": ""}, ValueError, "model must be a name of printable characters"),
        ({"model": "\ud800"}, ValueError, "model must be a name of printable characters"),
        ({"token_ids": 1.5}, TypeError, "token_ids must be whole numbers, got torch.float32"),
        ({"token_ids": [True]}, TypeError, "token_ids must be whole numbers, got torch.bool"),
        ({"token_ids": "text"}, TypeError, "token_ids must be a tensor or list of whole numbers, got str"),
        ({"token_ids": [2**70]}, TypeError, "token_ids must be a tensor or list of whole numbers, got list"),
        ({"token_ids": []}, ValueError, "token_ids must hold at least one token"),
        ({"tokens": "nine char"}, TypeError, "tokens must be a list of strings, one for each token, got str"),
        ({"tokens": [str(n) for n in range(8)] + [8]}, TypeError, "tokens must be strings, got int: decode"),
        ({"tokens": []}, ValueError, "tokens must hold at least one token"),
        ({"tokens": ["a"] * 8}, ValueError, "tokens must be one for each key, 9 in layer 0, got 8"),
        (
            {"tokens": ["a"] * 9, "masks": {3: random_map(9, 9, 16, batch=2)[0]}},
            ValueError,
            "tokens are those of one prompt, but layer 3 has 2 batch entries",
        ),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype or None, got 'bfloat16'"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        save_masks(tmp_path / "masks", **({"masks": {0: random_map(9, 9, 16)[0]}} | arguments))
    assert not any(tmp_path.iterdir())


def test_one_map_may_stand_in_two_layers(tmp_path, masks):
    save_masks(tmp_path / "masks", {0: masks[0], 1: masks[0]})
    assert load_masks(tmp_path / "masks") == {0: masks[0], 1: masks[0]}


def test_a_map_whose_words_are_a_view_is_saved(tmp_path, masks):
    view = BlockMap(masks[0].words.flip(1)[:, ::2], 900, 1000, 16)
    save_masks(tmp_path / "masks", {0: view})
    assert load_masks(tmp_path / "masks") == {0: view}


@pytest.mark.parametrize("sizes", [(900, 1000, 16), (40, 70, 16), (5000, 5000, 128)])
def test_bits_in_the_future_reach_no_other_row(tmp_path, sizes):
    block_map, _ = random_map(*sizes, heads=2)
    visible = BlockMap.causal(1, 2, q_len=sizes[0], kv_len=sizes[1], block_size=sizes[2]).words
    save_masks(tmp_path / "masks", {0: BlockMap(block_map.words | ~visible, *sizes)})
    assert load_masks(tmp_path / "masks") == {0: block_map}


def test_a_default_device_changes_nothing(tmp_path, masks):
    with torch.device("meta"):
        save_masks(tmp_path / "masks", masks, token_ids=TOKEN_IDS)
        assert load_masks(tmp_path / "masks", token_ids=TOKEN_IDS) == masks


@pytest.mark.gpu
def test_maps_of_a_gpu_are_saved_and_loaded_there(tmp_path, masks):
    there = {layer: block_map.to("cuda") for layer, block_map in masks.items()}
    save_masks(tmp_path / "masks", there)
    assert load_masks(tmp_path / "masks") == masks
    assert load_masks(tmp_path / "masks", device="cuda") == there


def test_a_link_stays_and_the_umask_decides_who_reads(tmp_path, masks):
    save_masks(tmp_path / "file", masks)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    save_masks(tmp_path / "link", {3: masks[0]})
    assert (tmp_path / "link").is_symlink() and load_masks(tmp_path / "file") == {3: masks[0]}
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("nameless", [True, False])
def test_a_replaced_file_keeps_its_mode(tmp_path, masks, monkeypatch, nameless):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    path, modes = tmp_path / "masks", []

    def note_mode(layer):
        modes.extend(file.stat().st_mode & 0o7777 for file in tmp_path.glob(".flexprefill-*"))
        return masks[0]

    for umask in (0o077, 0):
        before = os.umask(umask)
        try:
            save_masks(path, masks)
            assert path.stat().st_mode & 0o7777 == 0o666 & ~umask
            for mode in (0o640, 0o600, 0o664, 0o400):
                path.chmod(mode)
                save_masks(path, Lazy([0], note_mode))
                assert path.stat().st_mode & 0o7777 == mode
            path.unlink()
        finally:
            os.umask(before)
    # nobody who could not read the old file can open the new one while it is written
    assert modes == ([] if nameless else 2 * [0o640, 0o600, 0o664, 0o400])


@pytest.mark.parametrize("refused", ["open", "replace"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, masks, monkeypatch, refused, number):
    path = tmp_path / "masks"
    real = getattr(os, refused)
    making = os.O_CREAT | getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY

    def refuse(name, argument, *arguments, **places):
        if refused == "replace" or argument & making:
            raise OSError(number, os.strerror(number), name)
        return real(name, argument, *arguments, **places)

    monkeypatch.setattr(os, refused, refuse)  # root may write to any folder
    with pytest.raises(OSError, match=f"folder {tmp_path} is not writable") as raised:
        save_masks(path, masks)
    assert raised.value.errno == number and raised.value.filename == str(path)
    assert ".flexprefill" not in str(raised.value) and not any(tmp_path.iterdir())


def test_a_missing_folder_is_told_by_the_path_given(tmp_path, masks):
    path = tmp_path / "missing" / "masks"
    with pytest.raises(FileNotFoundError) as raised:
        save_masks(path, masks)
    assert raised.value.filename == str(path)


LINUX_ALONE = [name for name in dir(os) if name.startswith(("posix_fa", "POSIX_FADV", "preadv", "pwritev"))]


@pytest.mark.parametrize("missing", [["posix_fadvise"], ["O_TMPFILE"], [*LINUX_ALONE, "O_TMPFILE"], ["/proc"]])
def test_what_other_systems_lack_is_not_needed(tmp_path, masks, monkeypatch, missing):
    exists = os.path.exists
    for name in missing:
        if name == "/proc":
            monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith("/proc") and exists(path))
        else:
            monkeypatch.delattr(os, name, raising=False)
    path = tmp_path / "masks"
    for _ in range(2):
        save_masks(path, masks)
    assert load_masks(path) == masks and list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_masks(path, layers=[0], heads=[2])[0].words, masks[0].words[:, 2:3])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(MaskFileError, match="should take"):
        load_masks(path)


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
