"""What a file is that is no mask file, as far as its bytes tell."""

from __future__ import annotations

import codecs
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

from flexprefill.store.container import HEADER_LIMIT, LENGTH_BYTES, parse_json
from flexprefill.store.contents import FORMAT

FIRST_BYTES = 4096  # that are looked at
JSON_LIMIT = 2**26  # bytes; what is longer is not read to find out whether it is JSON
OTHER = "a file of some other kind"
BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF-": "a PDF file",
    b"\x1f\x8b": "a gzip file",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF\r\n": "an HDF5 file",
    b"GGUF": "a GGUF file of weights",
    b"version https://git-lfs": "a pointer of Git LFS, whose file was not fetched",
    # protocol 2, and the number that torch.save wrote before it wrote zip archives
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "a file of torch.save in its old format",
    **{bytes([0x80, protocol]): "a Python pickle" for protocol in range(2, 6)},
}


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """What is at a path, with its article; None if it may be a mask file, damaged or not, or cannot be read."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return "a folder"
        if not stat.S_ISREG(mode):
            return None
        with open(path, "rb") as file:
            first, size = file.read(FIRST_BYTES), os.fstat(file.fileno()).st_size
        if not first:
            return "an empty file"
        if FORMAT.encode() in first:
            return None
        return _safetensors(path, first, size) or _marked(path, first) or _text(path, first, size) or OTHER
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None


def _safetensors(path: str | os.PathLike[str], first: bytes, size: int) -> str | None:
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if first[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or length > HEADER_LIMIT:
        return None
    if length > size - LENGTH_BYTES:
        return "a safetensors file that is cut short"
    with open(path, "rb") as file:
        header = file.read(LENGTH_BYTES + length)[LENGTH_BYTES:]
    try:
        fields: dict[str, Any] = parse_json(header.decode())
    except (ValueError, RecursionError):
        return None
    names = [name for name in fields if name != "__metadata__"]
    return f"a safetensors file of weights or other tensors, such as {names[0]!r}" if names else "a safetensors file"


def _marked(path: str | os.PathLike[str], first: bytes) -> str | None:
    for beginning, kind in BEGINNINGS.items():
        if first.startswith(beginning):
            return kind
    return _archive(path) if first.startswith(b"PK\x03\x04") else None


def _archive(path: str | os.PathLike[str]) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(name).name for name in archive.namelist()]
    except (zipfile.BadZipFile, NotImplementedError):
        return "a damaged zip archive"
    if "data.pkl" in names:
        return "a file of torch.save"
    return "a NumPy archive" if names and all(name.endswith(".npy") for name in names) else "a zip archive"


def _text(path: str | os.PathLike[str], first: bytes, size: int) -> str | None:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(first, final=size <= len(first))
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html")):
        return "an HTML page"
    if start.startswith(("{", "[")) and size <= JSON_LIMIT:
        try:
            json.loads(Path(path).read_bytes())
            return "a JSON file"
        except (ValueError, RecursionError):
            pass
    return "a text file"
