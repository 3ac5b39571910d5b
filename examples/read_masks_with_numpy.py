"""A mask file of format version 2 read with NumPy and the standard library alone: docs/reference/format.md in code.

python examples/read_masks_with_numpy.py FILE
"""

import argparse
import json
import zlib

import numpy as np

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", help="a file that save_masks wrote")

with open(parser.parse_args().file, "rb") as file:
    head = file.read(8)
    head += file.read(int.from_bytes(head, "little"))
    tensors = json.loads(head[8:])
    about = tensors.pop("__metadata__")
    assert about["format"] == "flexprefill-masks" and about["format_version"] == "2"
    dtypes = {"U8": "<u1", "U32": "<u4", "F32": "<f4"}
    data = {name: np.fromfile(file, dtypes[t["dtype"]], np.prod(t["shape"])) for name, t in tensors.items()}
tables = data["density"].tobytes() + data["crc32"].tobytes()
assert data["checksums"].tolist() == [zlib.crc32(head), zlib.crc32(tables)]

checksums = iter(data["crc32"].tolist())
for layer, sizes in json.loads(about["layers"]).items():
    q_len, kv_len, block = (sizes[name] for name in ("q_len", "kv_len", "block_size"))
    print(f"layer {layer}: q_len {q_len}, kv_len {kv_len}, block_size {block}, shape {sizes['shape']}")
    row_end = np.minimum(np.arange(block, q_len + block, block), q_len)  # in queries
    visible = (row_end + kv_len - q_len - 1) // block + 1  # key blocks that each row of blocks sees
    triangle = np.arange(-(-kv_len // block)) < visible[:, None]  # bool [query blocks, key blocks]
    for i, stream in enumerate(data[f"layer.{layer}"].reshape(-1, -(-visible.sum() // 8))):
        assert zlib.crc32(stream.tobytes()) == next(checksums)
        kept = np.zeros_like(triangle)
        kept[triangle] = np.unpackbits(stream, count=visible.sum(), bitorder="little")
        b, head = divmod(i, sizes["shape"][1])
        print(f"  batch entry {b}, head {head}: density {kept[triangle].mean():.1%}")
