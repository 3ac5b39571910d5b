"""Small mask files for the viewer's tests."""

import numpy as np

from flexprefill import PrefillConfig
from support.mask_files import pack_triangles, write_mask_file

CONFIG = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=2, last_full_blocks=1)


def lines_and_noise(heads, blocks, seed, *, batch=1, rows=None):
    """bool [batch, heads, rows, blocks], causal: sinks, a window, a vertical, a slash and scattered blocks."""
    rng = np.random.default_rng(seed)
    rows = rows or blocks
    key = np.arange(blocks)
    query = np.arange(blocks - rows, blocks)[:, None]
    dense = rng.random((batch, heads, rows, blocks)) < rng.uniform(0.02, 0.2, (batch, heads, 1, 1))
    dense |= (key < 2) | (query - key < 3)
    line = rng.random(dense.shape) < 0.8
    dense |= line & ((key == blocks // 3) | (query - key == blocks // 4))
    return dense & (key <= query)


def write_masks(path, layers, *, block=16, **metadata):
    """Masks of whole blocks, bool [B, H, N, N] by layer."""
    sizes = {number: (dense.shape[2] * block, dense.shape[3] * block, block) for number, dense in layers.items()}
    packed = {number: (pack_triangles(dense, *sizes[number]), *sizes[number]) for number, dense in layers.items()}
    write_mask_file(path, packed, **metadata)
    return path
