"""save_masks: one layer after the other goes to a new file, the header last."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.map import BlockMap, check_has_bits
from flexprefill.config import PrefillConfig
from flexprefill.runtime.files import check_path, start_writing_back, whole_file, write_at
from flexprefill.runtime.progress import Advance, asked_stage
from flexprefill.store.ahead import ahead
from flexprefill.store.container import HEADER_LIMIT, Entry, header_bytes, placed_entries
from flexprefill.store.contents import FORMAT_VERSION, TABLES, describe, planned_tensors, tensor_name
from flexprefill.store.figures import recall_entry
from flexprefill.store.heads import Stream, TrianglePacking, even_step
from flexprefill.store.recording import Recording
from flexprefill.store.tokens import check_tokens_fit


def save_masks(
    path: str | os.PathLike[str],
    masks: Mapping[int, BlockMap],
    *,
    config: PrefillConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    model: str | None = None,
    token_ids: Tensor | Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | Advance | None = None,
) -> None:
    """Saves maps by layer into one safetensors file, which appears whole or not at all.

    The maps are taken in ascending order, each once, and each is written before the next is taken: with a mapping
    that makes them on access, only one is in memory at a time.

    Args:
        path: the file; one that exists is replaced, and its permissions stay.
        masks: layer number to map; maps may differ in lengths, heads and device.
        config: the settings that made the masks, kept in the file. Default: those of a Recording, if its layers share
            them.
        metadata: the caller's own entries, str to str, kept in the file. A Recording's recall becomes one more. An
            entry ``heads`` with a name for each head of a layer, separated by commas, is what the viewer calls them.
        model: the name of the model whose masks they are, kept in the file.
        token_ids: the prompt, a tensor of any shape or a list of ints, whose SHA-256 is kept in the file.
        tokens: the prompt's text, one string for each key, such as ``[tokenizer.decode([i]) for i in ids]``; the viewer
            shows it. A file with tokens holds the whole prompt: treat it as private. Default: no text is kept.
        dtype: of the queries and keys that the masks were made from, kept in the file.
        progress: True shows a bar on stderr (with tqdm, else a line); a function is called with 1 after each layer.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or ``tokens`` are not as many as the keys.
        OSError: the file cannot be written.
    """
    check_path(path)
    numbers = _layer_numbers(masks)
    if isinstance(masks, Recording):
        config = masks.config if config is None else config
        if metadata is None or isinstance(metadata, Mapping):
            metadata = recall_entry(masks.recalls) | dict(metadata or {})
    description = describe(config, metadata, model, token_ids, tokens, dtype)
    start = _header_room(description, numbers)
    layers: dict[int, dict[str, Any]] = {}
    densities: list[float] = []
    checksums: list[int] = []
    with asked_stage(progress, "writing masks", len(numbers)) as advance, whole_file(path) as descriptor:
        # by hand: serialize_file holds all layers, 71 MB for 5, puts the tables first and takes 1.3 times as long
        end = start

        def write(packed: _Packed) -> tuple[list[float], list[int]]:
            """Appends the streams to the file; the density and the checksum of each."""
            nonlocal end
            streams = np.ascontiguousarray(packed.stream.view(np.uint8)[:, : packed.size])
            write_at(descriptor, streams.reshape(-1).data, end)
            start_writing_back(descriptor, end, streams.nbytes)
            end += streams.nbytes
            return packed.densities, [zlib.crc32(stream) for stream in streams]

        packed = _packed(masks, numbers, layers, advance, None if tokens is None else len(tokens))
        with contextlib.closing(ahead(write, packed)) as written:
            for shares, sums in written:
                densities += shares
                checksums += sums
        description["layers"] = json.dumps(layers)
        header = header_bytes(description, placed_entries(planned_tensors(FORMAT_VERSION, layers)), start)
        tables = struct.pack(f"<{len(densities)}f", *densities) + struct.pack(f"<{len(checksums)}I", *checksums)
        write_at(descriptor, tables + struct.pack("<2I", zlib.crc32(header), zlib.crc32(tables)), end)
        write_at(descriptor, header, 0)


@dataclass(frozen=True)
class _Packed:
    """Some heads' streams of ``size`` bytes each, filled up to words, and the density of each."""

    densities: list[float]
    size: int
    stream: Stream


def _packed(
    masks: Mapping[int, BlockMap],
    numbers: Sequence[int],
    layers: dict[int, dict[str, Any]],
    advance: Advance,
    token_count: int | None,
) -> Iterator[_Packed]:
    """The heads' streams, some at a time; notes the sizes of each layer in ``layers`` on the way."""
    packing_for = functools.lru_cache(maxsize=1)(TrianglePacking)

    def pack_layer(layer: int, block_map: BlockMap) -> Iterator[_Packed]:
        check_has_bits(f"masks[{layer}]", block_map)
        layers[layer] = block_map.geometry._asdict() | {"shape": block_map.shape[:2]}
        if token_count is not None:
            check_tokens_fit(token_count, layer, layers[layer])
        packing = packing_for(block_map.geometry)
        words = block_map.words.to("cpu").reshape(-1, packing.words_per_head).numpy()  # [B · H, M · W]
        step = even_step(len(words), packing.most)
        for first in range(0, len(words), step):
            stream = packing.pack(words[first : first + step])
            kept = np.bitwise_count(stream).sum(1, dtype=np.int64)
            yield _Packed((kept / packing.bits).tolist(), packing.size, stream)

    for layer in numbers:
        yield from pack_layer(layer, masks[layer])  # which alone holds the map, and is done with it after
        advance(1)


def _layer_numbers(masks: Mapping[int, BlockMap]) -> list[int]:
    """The keys in ascending order."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping of layer numbers to BlockMaps, got {type(masks).__name__}")
    numbers = list(masks)
    if not numbers:
        raise ValueError("masks must hold at least one layer, got none")
    for layer in numbers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"masks must have layer numbers as keys, got {layer!r}")
        if not 0 <= layer < 2**31:
            raise ValueError(f"masks must have layer numbers from 0 up, below 2**31, as keys, got {layer}")
    return sorted(numbers)


def _header_room(description: Mapping[str, str], numbers: Sequence[int]) -> int:
    """Bytes that the header of any maps with these layers fits in: the sizes are known only as the maps are."""
    widest = 2**63 - 1  # no size and no place in a file has more digits
    sizes = Geometry(widest, widest, widest)._asdict() | {"shape": (widest, widest)}
    layers = dict.fromkeys(numbers, sizes)
    names = [*map(tensor_name, numbers), *TABLES]
    entries = {name: Entry("F32", (widest, widest, widest), widest, widest) for name in names}
    room = len(header_bytes({**description, "layers": json.dumps(layers)}, entries))
    if room > HEADER_LIMIT:
        raise ValueError(f"metadata and tokens must leave the header below {HEADER_LIMIT:,} bytes, got {room:,}")
    return room
