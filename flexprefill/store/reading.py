"""load_masks: what is read is checked first, and only what was asked for is read."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig, check_config
from flexprefill.errors import MaskFileError
from flexprefill.runtime.devices import check_device
from flexprefill.runtime.memory import check_room
from flexprefill.runtime.progress import Advance, asked_stage
from flexprefill.store.ahead import ahead
from flexprefill.store.container import opened
from flexprefill.store.contents import (
    MaskFileInfo,
    check_model_name,
    geometry_of,
    hash_token_ids,
    tensor_name,
    triangle_bytes,
    words_shape,
)
from flexprefill.store.header import MaskFile, read_mask_file
from flexprefill.store.heads import (
    PlainUnpacking,
    TriangleUnpacking,
    as_stream_words,
    even_step,
)

THREADS = 2  # more wait for each other and for the memory
HUGE_PAGE = 2**21  # bytes
Unpacking = PlainUnpacking | TriangleUnpacking
UNPACKING: dict[int, Callable[[Geometry], Unpacking]] = {1: PlainUnpacking, 2: TriangleUnpacking}  # by format version


def load_masks(
    path: str | os.PathLike[str],
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    device: torch.device | str = "cpu",
    config: PrefillConfig | None = None,
    model: str | None = None,
    token_ids: Tensor | Sequence[int] | None = None,
    progress: bool | Advance | None = None,
) -> dict[int, BlockMap]:
    """The maps of a file by layer.

    Args:
        path: a file that :func:`save_masks` wrote.
        layers: only these layers; the others are not read.
        heads: only these heads of each layer, in this order; the others are not read.
        device: where to put the maps.
        config, model, token_ids: what the file has to have been saved with; None takes any.
        progress: True shows a bar on stderr (with tqdm, else a line); a function is called with 1 after each layer.

    Raises:
        MaskFileError: the file is missing, truncated, changed in any bit that was read, of another kind or of a newer
            format, or was not saved with this ``config``, ``model`` or ``token_ids``.
        TypeError: an argument is not of its kind.
        ValueError: the file has no such layer or head.
        NotEnoughMemoryError: the maps do not fit into memory; nothing was read.
    """
    layers, heads = _number_list("layers", layers), _number_list("heads", heads)
    device = check_device(device)
    expected = _expectations(config, model, token_ids)
    with opened(path) as source:
        file = read_mask_file(source)
        info = file.info
        for name, wanted in expected.items():
            if getattr(info, name) != wanted:
                raise MaskFileError(
                    f"{path} was saved with {name} {getattr(info, name)!r}, not the expected {wanted!r}"
                )
        chosen = list(info.layers) if layers is None else layers
        if missing := [layer for layer in chosen if layer not in info.layers]:
            raise ValueError(f"layers has {missing}, but {path} holds {list(info.layers)}")
        for layer in chosen:
            count = info.layers[layer]["shape"][1]
            if heads is not None and not all(0 <= head < count for head in heads):
                raise ValueError(f"heads must be some of 0 … {count - 1} for layer {layer} of {path}, got {heads}")
        needed = _memory_for(info, chosen, heads)
        check_room(f"the masks of {path}", needed, torch.device("cpu"), "load fewer layers or heads at a time")
        masks = {}
        parts = ahead(functools.partial(_read_part, file), _parts(info, chosen, heads), threads=THREADS)
        with asked_stage(progress, "reading masks", len(chosen)) as advance, contextlib.closing(parts) as read:
            for layer, block_map in read:
                if block_map is not None:
                    masks[layer] = block_map.to(device)
                    advance(1)
        return masks


def _memory_for(info: MaskFileInfo, layers: Sequence[int], heads: Sequence[int] | None) -> int:
    """Bytes that the maps of these layers and heads take, and what it takes to unpack them."""
    maps, unpacking = 0, 0
    for layer in layers:
        sizes = info.layers[layer]
        geometry = geometry_of(sizes)
        batch, in_file = sizes["shape"]
        words_per_head = math.prod(words_shape(geometry))
        maps += 4 * words_per_head * batch * (in_file if heads is None else len(heads))
        # the triangle's tables, or the causal future's bits one by one
        tables = 8 * triangle_bytes(geometry) if info.format_version > 1 else 9 * 32 * words_per_head
        unpacking = max(unpacking, tables)
    return maps + unpacking


@dataclass(frozen=True)
class _Part:
    """Some heads to read of a layer.

    Attributes:
        stored: their numbers in the file's layer, over the whole batch.
        words: where they go, [heads, M · W], zero.
        whole: the layer's map if these are its last heads.
    """

    layer: int
    stored: list[int]
    unpacking: Unpacking
    words: NDArray[np.int32]
    whole: BlockMap | None


def _parts(info: MaskFileInfo, layers: Sequence[int], heads: Sequence[int] | None) -> Iterator[_Part]:
    """What to read, some heads at a time, with memory for it."""
    unpacking_for = functools.lru_cache(maxsize=1)(UNPACKING[info.format_version])
    for layer in layers:
        geometry = geometry_of(info.layers[layer])
        batch, in_file = info.layers[layer]["shape"]
        chosen = range(in_file) if heads is None else heads
        stored = [b * in_file + head for b in range(batch) for head in chosen]
        words = _zero_words((batch, len(chosen), *words_shape(geometry)))
        block_map = BlockMap(torch.from_numpy(words), *geometry)
        words = words.reshape(len(stored), -1)
        unpacking = unpacking_for(geometry)
        step = even_step(len(stored), unpacking.most)
        for first in range(0, len(stored), step):
            end = first + step
            whole = block_map if end >= len(stored) else None
            yield _Part(layer, stored[first:end], unpacking, words[first:end], whole)


def _read_part(file: MaskFile, part: _Part) -> tuple[int, BlockMap | None]:
    """Reads the part's heads, checks them and fills its words; the layer, and its map if it is whole now."""
    layer, size = part.layer, part.unpacking.size
    start, _ = file.container.place(tensor_name(layer))
    pieces = (
        file.source.read(start + part.stored[first] * size, (end - first) * size)
        for first, end in _in_a_row(part.stored)
    )
    streams = np.frombuffer(b"".join(pieces), np.uint8).reshape(-1, size)
    for head, stream in zip(part.stored, streams, strict=True):
        if layer in file.checksums and zlib.crc32(stream.data) != file.checksums[layer][head]:
            b, h = divmod(head, file.info.layers[layer]["shape"][1])
            raise MaskFileError(
                f"{file.source.path} is damaged: layer {layer}, batch entry {b}, head {h} does not have its checksum"
            )
    if not part.unpacking.unpack(as_stream_words(streams), part.words):
        raise MaskFileError(f"{file.source.path} is damaged: layer {layer} has bits outside its triangle")
    return layer, part.whole


def _zero_words(shape: tuple[int, ...]) -> NDArray[np.int32]:
    """As np.zeros, in huge pages where there are such: loading into np.zeros takes 1.3 times as long."""
    size = 4 * math.prod(shape)
    if size < HUGE_PAGE:
        return np.zeros(shape, np.int32)
    memory = np.zeros(size + HUGE_PAGE, np.uint8)  # for which numpy asks the system
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + size].view(np.int32).reshape(shape)


def _in_a_row(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where runs of numbers that follow each other begin and end."""
    first = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield first, end
            first = end


def _number_list(name: str, numbers: Iterable[int] | None) -> list[int] | None:
    if numbers is None:
        return None
    listed = list(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, (str, bytes)) else [None]
    ints = [number for number in listed if type(number) is int]
    if len(ints) < len(listed):
        raise TypeError(f"{name} must be a list of ints or None, got {numbers!r}")
    if not ints or len(set(ints)) < len(ints):
        raise ValueError(f"{name} must name at least one and none twice, got {ints}")
    return ints


def _expectations(
    config: PrefillConfig | None, model: str | None, token_ids: Tensor | Sequence[int] | None
) -> dict[str, object]:
    """What the file's info has to say, by the names of its attributes."""
    expected: dict[str, object] = {}
    if config is not None:
        check_config(config)
        expected["config"] = config
    if model is not None:
        expected["model"] = check_model_name(model)
    if token_ids is not None:
        expected["token_ids_hash"] = hash_token_ids(token_ids)
    return expected
