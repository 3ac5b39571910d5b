"""A mask file is data: loading it runs nothing that stands in it, and makes nothing of a size that it only declares."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mask_files import write_mask_file

from flexprefill import (
    BlockMap,
    MaskFileError,
    NotEnoughMemoryError,
    PrefillConfig,
    load_masks,
    read_mask_info,
    save_masks,
)

WATCHED = """
import sys
sys.path[:0] = [{tests!r}]
from flexprefill import load_masks, read_mask_info, MaskFileError
load_masks({good!r}), read_mask_info({good!r})  # whatever is imported late, is now

forbidden = []
def watch(event, arguments):
    opened_to_write = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
    names = ("exec", "compile", "import", "marshal.", "pickle.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "subprocess.", "socket.", "ctypes.", "code.", "shutil.", "os.remove", "os.rename", "urllib.")
    if opened_to_write or event.startswith(names):
        forbidden.append((event, str(arguments)[:100]))
sys.addaudithook(watch)

for path in {paths!r}:
    for read in (load_masks, read_mask_info):
        try:
            read(path)
        except MaskFileError:
            pass
assert not forbidden, forbidden
eval("1")
assert forbidden, "the watch sees nothing"
print("nothing ran")
"""


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/flexprefill-was-here",)


def hostile_files(folder):
    """Files that would do something if anything in them were run or unpickled."""
    evil = pickle.dumps(Evil())
    (folder / "pickle").write_bytes(evil)
    torch.save({"layer.0": torch.zeros(3), "evil": Evil()}, folder / "torch_save")
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("data.pkl", evil)
    (folder / "python").write_text("__import__('os').system('touch /tmp/flexprefill-was-here')")
    np.save(folder / "numpy.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    triangles = np.zeros((1, 1, 1), np.uint8)
    code = "__import__('os').system('touch /tmp/flexprefill-was-here')"
    class_name = {"__class__": code, "__reduce__": [code]}
    settings = {"config": PrefillConfig.from_dict({"scorer": code}).to_dict(), "config_class": class_name}
    for name, config in settings.items():
        write_mask_file(folder / name, {0: (triangles, 16, 16, 16)}, config=config)
    write_mask_file(folder / "user", {0: (triangles, 16, 16, 16)}, user=json.dumps({"__reduce__": code}), model=code)
    return sorted(str(path) for path in folder.iterdir())


def test_loading_runs_nothing(tmp_path):
    good = tmp_path / "good.safetensors"
    save_masks(good, {0: BlockMap.causal(1, 2, q_len=300, kv_len=300, block_size=16)}, config=PrefillConfig())
    folder = tmp_path / "hostile"
    folder.mkdir()
    paths = [str(good), *hostile_files(folder)]
    code = WATCHED.format(tests=str(Path(__file__).parents[1]), good=str(good), paths=paths)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout == "nothing ran\n", result.stderr
    assert not os.path.exists("/tmp/flexprefill-was-here")


def test_strings_of_a_file_stay_strings(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    hostile_files(folder)
    info = read_mask_info(folder / "user")
    assert info.model.startswith("__import__") and info.metadata["__reduce__"] == info.model
    assert read_mask_info(folder / "config").config.scorer == info.model  # a name, which nothing has
    with pytest.raises(ValueError, match="config.scorer must be one of"):
        from flexprefill import search_blocks

        search_blocks(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), read_mask_info(folder / "config").config)
    with pytest.raises(MaskFileError, match="unknown names"):
        read_mask_info(folder / "config_class")


def sparse_file(path, header, size):
    """A file whose bytes behind the header were never written: they are zeros and take no room on the disk."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
        if "crc32" in header and header["crc32"]["shape"][0] <= 2**20:  # with the checksums that its zeros have
            file.seek(len(head) + size - 8)
            tables = bytes(8 * header["crc32"]["shape"][0])
            file.write(struct.pack("<2I", zlib.crc32(head), zlib.crc32(tables)))


def huge_header(version, *, q_len=2**21, heads=4096, block=16):
    """Of masks of terabytes; every size in it agrees with every other."""
    blocks = q_len // block
    sizes = {"q_len": q_len, "kv_len": q_len, "block_size": block, "shape": [1, heads]}
    strings = {
        "format": "flexprefill-masks", "format_version": str(version), "layers": json.dumps({"0": sizes}),
        "config": "null", "user": "{}",
    }  # fmt: skip
    if version == 1:
        shape = [1, heads, blocks, blocks // 32]
        size = 4 * heads * blocks * blocks // 32
        return {"__metadata__": strings, "layer.0": {"dtype": "I32", "shape": shape, "data_offsets": [0, size]}}, size
    strings |= {"config_hash": "", "model": "", "token_ids_hash": "", "scoring": "", "library": "{}", "dtype": ""}
    triangle = (blocks * (blocks + 1) // 2 + 7) // 8
    tensors, end = {"__metadata__": strings}, 0
    for name, dtype, shape, width in (
        ("layer.0", "U8", [1, heads, triangle], 1),
        ("density", "F32", [heads], 4),
        ("crc32", "U32", [heads], 4),
        ("checksums", "U32", [2], 4),
    ):
        start, end = end, end + int(np.prod(shape, dtype=object)) * width
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return tensors, end


LIMITED = """
import resource, sys, time
from flexprefill import FlexPrefillError, load_masks, read_mask_info
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + 300_000_000, now + 300_000_000))
for function, path in {calls!r}:
    start = time.perf_counter()
    try:
        {{"load": load_masks, "info": read_mask_info}}[function](path)
    except FlexPrefillError as error:
        print(type(error).__name__, error)
    assert time.perf_counter() - start < 20
"""


def test_sizes_that_are_only_declared_are_not_allocated(tmp_path):
    """The process may take 300 MB more; the files say that they hold terabytes."""
    calls = []
    for name, function, (header, size) in (
        ("version 1", "load", huge_header(1)),
        ("many heads", "info", huge_header(2, q_len=16, heads=2**31 - 1)),
        ("a map", "load", huge_header(2)),
    ):
        path = tmp_path / name
        try:
            sparse_file(path, header, size)
        except OSError as error:
            pytest.skip(f"no file of {size:,} bytes can be made here: {error}")
        assert path.stat().st_blocks * 512 < 2**20
        calls.append((function, str(path)))
    code = LIMITED.format(calls=calls)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stdout
    for line, (_, path) in zip(lines, calls, strict=True):
        assert line.startswith("NotEnoughMemoryError") and path in line


@pytest.mark.parametrize("declared", [2**63 - 1, 2**40, 10**8 + 1, 2**31])
def test_a_headers_length_is_not_trusted(tmp_path, declared):
    path = tmp_path / "short"
    path.write_bytes(struct.pack("<Q", declared) + b"{}" * 100)
    with pytest.raises(MaskFileError, match=f"header of {declared} bytes, but has 208 bytes in all"):
        load_masks(path)


def test_a_real_file_that_does_not_fit_is_refused_and_fits_by_heads(tmp_path, monkeypatch):
    from flexprefill.runtime import memory

    path, block_map = tmp_path / "masks", BlockMap.causal(1, 8, q_len=4096, kv_len=4096, block_size=16)
    save_masks(path, {0: block_map})
    monkeypatch.setattr(memory, "WORTH_ASKING", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: block_map.words.nbytes // 2)
    with pytest.raises(
        NotEnoughMemoryError, match=r"memory for the masks of .*takes [\d,]+ bytes.*fewer layers or heads"
    ):
        load_masks(path)
    monkeypatch.setattr(memory, "free_bytes", lambda device: block_map.words.nbytes * 3 // 4 + 2**16)
    assert load_masks(path, heads=[3])[0] == BlockMap(block_map.words[:, 3:4], 4096, 4096, 16)
