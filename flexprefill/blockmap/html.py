"""A map as HTML for a notebook: small panels as PNG data URIs, written without matplotlib."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

from flexprefill.blockmap.cells import cell_factor, head_shares, shade
from flexprefill.blockmap.geometry import Geometry

KEPT, DROPPED = "#14508c", "#e3e7ed"
MAX_PANELS = 16
PANEL_PIXELS = {1: 384, 4: 256, MAX_PANELS: 160}  # the longer side, by the most panels that it is for
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def map_html(words: Tensor, geometry: Geometry, density: Tensor) -> str:
    """A line on the map and a panel for each of its first 16 heads, batch entry by batch entry.

    Kept blocks are dark. Dropped causal blocks are light. The causal future is transparent. A map can have more blocks
    than a panel has pixels. A pixel then stands for several blocks: it is as dark as the root of the kept share of
    its causal blocks, and a line says for how many blocks it stands.

    Args:
        words: A map's, int32 [B, H, M, W], on a device that holds data.
        geometry: The map's sizes.
        density: Each head's, float [B, H].
    """
    batches, heads = words.shape[:2]
    shown = min(batches * heads, MAX_PANELS)
    pixels = next(size for most, size in PANEL_PIXELS.items() if shown <= most)
    factor = cell_factor(geometry, pixels)
    densities = density.flatten().tolist()
    panels = []
    for index in range(shown):
        batch, head = divmod(index, heads)
        name = f"head {head}" if batches == 1 else f"batch {batch}, head {head}"
        caption = f"{name}, {100 * densities[index]:.1f} %"
        panels.append(_panel(head_shares(words[batch, head], geometry, factor), pixels, caption))

    offset = f", the last {geometry.q_len:,} as queries" if geometry.offset else ""
    summary = (
        f"BlockMap: {f'{batches} × ' if batches > 1 else ''}{heads} head{'s' if heads > 1 else ''} of "
        f"{geometry.rows:,} × {geometry.columns:,} blocks, {geometry.kv_len:,} tokens{offset}; "
        f"{100 * sum(densities) / len(densities):.1f} % kept"
    )
    notes = []
    if factor > 1:
        notes.append(f"a pixel stands for {factor} × {factor} blocks: the more of them are kept, the darker it is")
    if shown < batches * heads:
        notes.append(f"the first {shown} of {batches * heads} heads are shown")
    note = f"<div style='opacity:.7;font-size:90%'>{'; '.join(notes)}</div>" if notes else ""
    return (
        f"<div><div>{summary}</div>{note}"
        f"<div style='display:flex;flex-wrap:wrap;gap:12px;margin-top:6px'>{''.join(panels)}</div></div>"
    )


def encode_png(pixels: Tensor) -> bytes:
    """A PNG of red, green, blue and opacity: uint8 [height, width, 4]."""
    height, width, _ = pixels.shape
    lines = torch.nn.functional.pad(pixels.flatten(1), (1, 0))  # each line begins with its filter, 0 for none
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(lines.flatten().tolist()), 9)),
        (b"IEND", b""),
    )
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _panel(shares: Tensor, pixels: int, caption: str) -> str:
    colours = torch.lerp(rgb(DROPPED), rgb(KEPT), shade(shares.nan_to_num())[..., None])
    cells = torch.cat([colours, ~shares.isnan()[..., None]], 2).mul(255).round().to(torch.uint8)
    picture = base64.b64encode(encode_png(cells)).decode()
    scale = max(1, pixels // max(shares.shape))
    height, width = (scale * size for size in shares.shape)
    return (
        f"<figure style='margin:0'><img alt='{caption}' width='{width}' height='{height}' "
        f"style='image-rendering:pixelated;max-width:none' src='data:image/png;base64,{picture}'>"
        f"<figcaption style='font-size:85%'>{caption}</figcaption></figure>"
    )


def rgb(colour: str) -> Tensor:
    """A colour #rrggbb as float32 [3] in 0 … 1."""
    return torch.tensor(list(bytes.fromhex(colour.removeprefix("#"))), dtype=torch.float32, device="cpu") / 255
