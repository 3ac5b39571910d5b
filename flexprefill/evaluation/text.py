"""Text: files on the machine, read when needed and never kept, and babble, which needs no files."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexprefill.errors import FlexPrefillError

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SUFFIXES = (".py", ".pyi", ".md", ".rst")
# packages under permissive licences (BSD), beside the standard library (PSF)
PACKAGES = ("torch", "numpy")
HELD_OUT = 16  # one file in so many
SEPARATOR = 0  # between files, a byte that no source has


def source_files(root: str | os.PathLike[str], suffixes: Sequence[str] = (".py",)) -> Iterator[Path]:
    """The files under a folder with one of these suffixes in a fixed order, without tests and installed packages."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(tuple(suffixes)))


def read_text(max_bytes: int = 2**22, *, held_out: bool) -> Tensor:
    """Source code and documentation of the standard library, torch and numpy as this machine has them.

    A checksum of its path below its package decides whether a file is held out. So the two parts share no file, and
    the same files are held out on every machine.

    Args:
        max_bytes: Where to stop reading, at least 1. Each place gives an equal part at most.
        held_out: True reads the files that training must not see; False reads all others.

    Returns:
        uint8 [bytes], files separated by a zero byte.

    Raises:
        FlexPrefillError: There is nothing to read.
    """
    roots = [sysconfig.get_path("stdlib")]
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        roots += list((found and found.submodule_search_locations) or [])[:1]
    parts: list[bytes] = []
    for root in roots:
        room = max_bytes // len(roots)
        for path in source_files(root, SUFFIXES):
            if room <= 0:
                break
            if _is_held_out(path.relative_to(root).as_posix()) == held_out:
                part = path.read_bytes()[: room - 1] + bytes([SEPARATOR])
                parts.append(part)
                room -= len(part)
    if not parts:
        raise FlexPrefillError(f"no text was found under {', '.join(roots)}")
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def babble(size: int, seed: int = 0) -> Tensor:
    """Lines of lower-case words of random letters, some words more frequent. The same text on every machine.

    Args:
        size: Bytes, at least 1.
        seed: Seed of the text.

    Returns:
        uint8 [size].
    """
    random = np.random.Generator(np.random.PCG64(seed))  # numpy keeps this stream from version to version
    letters = random.integers(ord("a"), ord("z") + 1, (2048, 8), dtype=np.uint8)
    lengths = random.integers(2, 9, 2048)
    lexicon = [row[:length].tobytes() for row, length in zip(letters, lengths, strict=True)]
    shares = np.cumsum(1 / np.arange(1, len(lexicon) + 1))  # Zipf's law
    ranks = np.searchsorted(shares, random.random(size // 3 + 1) * shares[-1])  # a word and its end are 3 bytes or more
    ends = np.where(np.arange(ranks.size) % 12 == 11, b"\n", b" ")
    joined = b"".join(lexicon[rank] + end for rank, end in zip(ranks.tolist(), ends.tolist(), strict=True))
    return torch.frombuffer(bytearray(joined[:size]), dtype=torch.uint8)


def passages(stream: Tensor, generator: torch.Generator, batch: int, length: int) -> Tensor:
    """Random stretches of a text.

    Args:
        stream: uint8 [bytes], at least ``length``, on the generator's device.
        generator: Draws where the stretches start.
        batch: Number of stretches.
        length: Bytes of a stretch.

    Returns:
        int64 [batch, length].

    Raises:
        ValueError: The text is too short.
    """
    if stream.numel() < length:
        raise ValueError(f"stream must have at least {length} bytes, got {stream.numel()}")
    device = generator.device
    starts = torch.randint(stream.numel() - length + 1, (batch, 1), generator=generator, device=device)
    return stream[starts + torch.arange(length, device=device)].long()


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT == 0
