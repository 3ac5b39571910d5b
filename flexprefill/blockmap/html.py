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
BLANK = 255  # the palette's last entry: transparent
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def map_html(words: Tensor, geometry: Geometry, density: Tensor) -> str:
    """A line on the map and a panel for each of its first 16 heads, batch entry by batch entry.

    Kept blocks are dark, causal blocks that are dropped light, and the causal future is transparent. Where a map has
    more blocks than a panel has pixels, a pixel stands for several blocks, and its darkness for the root of the share
    of its causal blocks that is kept; a line says for how many.

    Args:
        words: int32 [B, H, M, W] of a map, on a device that holds data.
        density: float [B, H], of each head.
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
        notes.append(f"a pixel stands for {factor} × {factor} blocks, and is the darker the more of them are kept")
    if shown < batches * heads:
        notes.append(f"the first {shown} of {batches * heads} heads are shown")
    note = f"<div style='opacity:.7;font-size:90%'>{'; '.join(notes)}</div>" if notes else ""
    return (
        f"<div><div>{summary}</div>{note}"
        f"<div style='display:flex;flex-wrap:wrap;gap:12px;margin-top:6px'>{''.join(panels)}</div></div>"
    )


def encode_png(pixels: Tensor, palette: Tensor) -> bytes:
    """An indexed PNG; the last of 256 colours is transparent.

    Args:
        pixels: uint8 [height, width], places in the palette.
        palette: uint8 [256, 3].
    """
    height, width = pixels.shape
    lines = torch.nn.functional.pad(pixels.cpu(), (1, 0))  # each line begins with its filter, 0 for none
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(palette.flatten().tolist())),
        (b"tRNS", b"\xff" * BLANK + b"\x00"),
        (b"IDAT", zlib.compress(bytes(lines.flatten().tolist()), 9)),
        (b"IEND", b""),
    )
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _panel(shares: Tensor, pixels: int, caption: str) -> str:
    steps = BLANK - 1
    cells = torch.where(shares.isnan(), BLANK, shade(shares.nan_to_num()) * steps).round().to(torch.uint8)
    ramp = torch.lerp(rgb(DROPPED), rgb(KEPT), torch.linspace(0, 1, BLANK, dtype=torch.float32, device="cpu")[:, None])
    palette = torch.cat([ramp, torch.ones_like(ramp[:1])]).mul(255).round().to(torch.uint8)
    picture = base64.b64encode(encode_png(cells, palette)).decode()
    scale = max(1, pixels // max(cells.shape))
    height, width = (scale * size for size in cells.shape)
    return (
        f"<figure style='margin:0'><img alt='{caption}' width='{width}' height='{height}' "
        f"style='image-rendering:pixelated;max-width:none' src='data:image/png;base64,{picture}'>"
        f"<figcaption style='font-size:85%'>{caption}</figcaption></figure>"
    )


def rgb(colour: str) -> Tensor:
    """A colour #rrggbb as float32 [3] in 0 … 1."""
    return torch.tensor(list(bytes.fromhex(colour.removeprefix("#"))), dtype=torch.float32, device="cpu") / 255
