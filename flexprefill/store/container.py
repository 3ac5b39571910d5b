"""The safetensors container: a length, a JSON header, the tensors' bytes. Reads nothing that the file's size belies."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flexprefill.blockmap.geometry import ceil_div
from flexprefill.errors import MaskFileError
from flexprefill.runtime.files import check_path, read_at

LENGTH_BYTES = 8
HEADER_LIMIT = 100_000_000  # safetensors' own
ITEM_BYTES = {"U8": 1, "U32": 4, "I32": 4, "F32": 4}


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor; ``start`` and ``end`` are bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Container:
    """A parsed header.

    Attributes:
        head: the file's first bytes, the length and the header itself; the tensors' bytes follow.
        metadata: the strings under ``__metadata__``.
        entries: the tensors by name. Together they fill the rest of the file without a gap.
    """

    head: bytes
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def place(self, name: str) -> tuple[int, int]:
        """Where in the file the tensor's bytes start, and how many they are."""
        entry = self.entries[name]
        return len(self.head) + entry.start, entry.end - entry.start


@dataclass(frozen=True)
class Source:
    """An open file to read parts of; its errors name the file."""

    path: str | os.PathLike[str]
    descriptor: int

    def read(self, position: int, length: int) -> bytes:
        """These bytes.

        Raises:
            MaskFileError: the file ends before, or the system cannot read it.
        """
        # by hand: if a mapped file shrinks, safe_open ends the process; its pread takes 3.7 times as long for one head
        try:
            data = read_at(self.descriptor, position, length)
        except OSError as error:
            raise self.refusal(error) from error
        if len(data) < length:
            raise self.refusal(f"it ends at byte {position + len(data)}")
        return data

    def refusal(self, reason: object) -> MaskFileError:
        """The error to raise if this is no such file."""
        return MaskFileError(f"{self.path} is no readable mask file: {reason}")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Opens a regular file for reading.

    Raises:
        TypeError: ``path`` is no file name.
        MaskFileError: it cannot be opened, or is something else, such as a folder or a pipe.
    """
    check_path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise MaskFileError(f"{path} is no readable mask file: {reason}") from error
    try:
        source = Source(path, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise source.refusal("it is not a regular file")
        yield source
    finally:
        os.close(descriptor)


def read_container(source: Source) -> Container:
    """The header of a file, checked against the file's size before anything else is read.

    Raises:
        MaskFileError: it is no safetensors file, or a damaged one.
    """
    size = os.fstat(source.descriptor).st_size
    if size < LENGTH_BYTES:
        raise source.refusal(f"it has {size} bytes, and {LENGTH_BYTES} give the length of the header alone")
    # by hand: safe_open takes a name twice, keeps the bytes that the checksum is of, and takes 1.4 times as long
    length = int.from_bytes(source.read(0, LENGTH_BYTES), "little")
    if length > min(size - LENGTH_BYTES, HEADER_LIMIT):
        raise source.refusal(f"it should start with a header of {length} bytes, but has {size} bytes in all")
    head = source.read(0, LENGTH_BYTES + length)
    try:
        fields = parse_json(head[LENGTH_BYTES:].decode())
        metadata, entries = _checked_fields(fields, size - len(head))
    except (ValueError, RecursionError) as error:
        raise source.refusal(error) from error
    return Container(head, metadata, entries)


def placed_entries(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """The entries of tensors of these dtypes and shapes whose bytes follow each other."""
    entries: dict[str, Entry] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = Entry(dtype, shape, start, end)
    return entries


def header_bytes(metadata: Mapping[str, str], entries: Mapping[str, Entry], room: int = 0) -> bytes:
    """The length and the header, filled up with spaces to ``room`` bytes or the next multiple of 8."""
    fields = {"__metadata__": dict(metadata)} | {
        name: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.end)}
        for name, entry in entries.items()
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(max(8 * ceil_div(len(text), 8), room - LENGTH_BYTES))
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, has NaN or an infinity, or an object in it has one name twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)


def parse_object(text: str, of: Callable[[Any], bool]) -> dict[str, Any]:
    """The JSON object of a text whose every value is as ``of`` demands; ValueError otherwise."""
    value = parse_json(text)
    if not isinstance(value, dict) or not all(map(of, value.values())):
        raise ValueError(f"an object of other values was due, got {_shortened(text)}")
    return value


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _checked_fields(fields: Any, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    if not is_object(fields):
        raise ValueError("its header is no JSON object")
    metadata = fields.pop("__metadata__", {})
    if not is_object(metadata) or not all(map(is_text, metadata.values())):
        raise ValueError("the __metadata__ of its header must map str to str")
    entries = {name: _checked_entry(name, field) for name, field in fields.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"tensor {name!r} starts at byte {entry.start}, but the one before it ends at {end}")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors should take {end} bytes, but {size} follow the header")
    return metadata, entries


def _checked_entry(name: str, field: Any) -> Entry:
    if not is_object(field) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not is_text(dtype) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} is of dtype {dtype!r}; a mask file has only {sorted(ITEM_BYTES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has shape {_shortened(shape)} and data_offsets {_shortened(offsets)}")
    if math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {name!r}, {dtype} {shape}, does not take the bytes {offsets[0]} to {offsets[1]}")
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(numbers: Any) -> bool:
    """Whether it is a short list of numbers that a file's size can have: their product is cheap."""
    return (
        isinstance(numbers, list)
        and len(numbers) <= 8
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    )


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("its header has one name twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its header has the number {name}")
