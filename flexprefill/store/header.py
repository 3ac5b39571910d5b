"""read_mask_info: what a mask file says of itself, checked, and read without its masks and without torch."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from flexprefill.store.container import Container, Source, opened, read_container
from flexprefill.store.contents import TABLES, MaskFileInfo, check_entries, read_description

BYTES_A_HEAD = 150  # of its density and checksum, as Python numbers
HEADS_UNASKED = 2**20  # a computer has memory for so many


@dataclass(frozen=True)
class MaskFile:
    """An open mask file whose header and tables are checked.

    Attributes:
        checksums: per layer one for each head, in the order of the file; empty in version 1.
    """

    source: Source
    container: Container
    info: MaskFileInfo
    checksums: dict[int, Sequence[int]]


def read_mask_info(path: str | os.PathLike[str]) -> MaskFileInfo:
    """What a mask file says of itself: what it was saved with, sizes and densities by layer. No mask is read.

    Raises:
        TypeError: ``path`` is no file name.
        MaskFileError: the file is missing, truncated, changed in any bit but those of the masks, of another kind or
            of a newer format.
    """
    with opened(path) as source:
        return read_mask_file(source).info


def read_mask_file(source: Source) -> MaskFile:
    """The header and the tables of an open file, checked; MaskFileError as of :func:`read_mask_info`."""
    container = read_container(source)
    try:
        info = read_description(container.metadata)
        check_entries(info, container.entries)
    except (ValueError, TypeError, RecursionError) as error:
        raise source.refusal(error) from error
    if info.format_version == 1:
        return MaskFile(source, container, info, {})

    # a file's sizes are those of its bytes, but bytes that were never written take no room on a disk
    stored = sum(math.prod(sizes["shape"]) for sizes in info.layers.values())
    if stored > HEADS_UNASKED:
        import torch

        from flexprefill.runtime.memory import check_room

        what = f"what {source.path} says of {stored:,} heads"
        check_room(what, stored * BYTES_A_HEAD, torch.device("cpu"), "a real file holds fewer")
    tables = {name: source.read(*container.place(name)) for name in TABLES}
    header_sum, table_sum = struct.unpack("<2I", tables["checksums"])
    if zlib.crc32(container.head) != header_sum:
        raise source.refusal("its header does not have the checksum at its end")
    if zlib.crc32(tables["density"] + tables["crc32"]) != table_sum:
        raise source.refusal("its tables do not have the checksum at its end")
    densities = iter(struct.unpack(f"<{len(tables['density']) // 4}f", tables["density"]))
    checksums = iter(struct.unpack(f"<{len(tables['crc32']) // 4}I", tables["crc32"]))
    by_layer = {layer: sizes["shape"] for layer, sizes in info.layers.items()}
    density = {
        layer: tuple(tuple(islice(densities, in_file)) for _ in range(batch))
        for layer, (batch, in_file) in by_layer.items()
    }
    return MaskFile(
        source,
        container,
        replace(info, density=density),
        {layer: tuple(islice(checksums, batch * in_file)) for layer, (batch, in_file) in by_layer.items()},
    )
