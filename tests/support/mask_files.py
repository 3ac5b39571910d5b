"""Mask files of format version 2, written from the format's description with numpy alone: a check on save_masks."""

import hashlib
import json
import zlib

import numpy as np

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.uint8)


def visible_blocks(q_len, kv_len, block):
    """How many key blocks each query block sees: int [M]."""
    ends = np.minimum(np.arange(block, q_len + block, block), q_len) + kv_len - q_len
    return (ends - 1) // block + 1


def pack_triangles(dense, q_len, kv_len, block):
    """bool [B, H, M, N] to uint8 [B, H, T]: the visible blocks of each row, one row after another."""
    seen = np.arange(dense.shape[-1]) < visible_blocks(q_len, kv_len, block)[:, None]
    return np.packbits(dense[:, :, seen], axis=-1, bitorder="little")


def write_mask_file(path, layers, *, config=None, **metadata):
    """layers: number to (uint8 [B, H, T], q_len, kv_len, block_size)."""
    listed, tensors, density, sums = {}, {}, [], []
    for number, (triangles, q_len, kv_len, block) in sorted(layers.items()):
        batch, heads, _ = triangles.shape
        listed[number] = {"q_len": q_len, "kv_len": kv_len, "block_size": block, "shape": [batch, heads]}
        tensors[f"layer.{number}"] = ("U8", triangles.shape)
        kept = BITS[triangles].sum(-1, dtype=np.int64).reshape(-1)
        density += list(kept / visible_blocks(q_len, kv_len, block).sum())
        sums += [zlib.crc32(head) for head in np.ascontiguousarray(triangles).reshape(batch * heads, -1)]
    tables = np.asarray(density, "<f4").tobytes() + np.asarray(sums, "<u4").tobytes()
    tensors |= {"density": ("F32", [len(sums)]), "crc32": ("U32", [len(sums)]), "checksums": ("U32", [2])}
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    header = {
        "format": "flexprefill-masks",
        "format_version": "2",
        "layers": json.dumps(listed),
        "config": json.dumps(config),
        "config_hash": hashlib.sha256(canonical.encode()).hexdigest() if config else "",
        "model": "",
        "token_ids_hash": "",
        "scoring": "flashprefill-v1",
        "library": json.dumps({"flexprefill": "0", "torch": "0", "safetensors": "0"}),
        "dtype": "",
        "user": "{}",
    } | metadata
    entries, at = {"__metadata__": header}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + int(np.prod(shape)) * (1 if dtype == "U8" else 4)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with open(path, "wb") as file:
        file.write(head)
        for _, (triangles, *_) in sorted(layers.items()):
            file.write(triangles.tobytes())
        file.write(tables + np.asarray([zlib.crc32(head), zlib.crc32(tables)], "<u4").tobytes())
