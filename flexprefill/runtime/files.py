"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[int]:
    """Yields the descriptor of a new file, empty and to be written, that takes ``path``'s place at the end.

    What was there before is there until then, and stays if the block raises or the process dies. The new file's
    bytes are on the disk before it gets the name. A link stays one, and its target is replaced.

    Raises:
        ValueError: something that is no file has this name.
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"path must be a file or not exist yet, got {path}")
    name = f".flexprefill-{secrets.token_hex(8)}"
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor, nameless = _new_file(path.parent, folder, name)
        try:
            yield descriptor
            os.fsync(descriptor)
            if nameless:
                # with a folder's descriptor Python calls linkat, which alone follows this link
                os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)
            os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            raise
        finally:
            os.close(descriptor)
    finally:
        os.close(folder)


def write_at(descriptor: int, data: bytes | bytearray | memoryview, position: int) -> None:
    """Writes all of these bytes at a position of a file."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, position)
        position, rest = position + count, rest[count:]


def start_writing_back(descriptor: int, position: int, length: int) -> None:
    """Has the system put these bytes on the disk in the background, so that the end waits for less."""
    os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_DONTNEED)


def _new_file(parent: Path, folder: int, name: str) -> tuple[int, bool]:
    """A file to be written and whether it has no name: then nothing of it is left even if the process is killed."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not every file system can
            return os.open(parent, flags | os.O_TMPFILE, 0o666), True
    return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder), False


def check_path(path: object) -> None:
    """Raises TypeError unless it is a file name."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file name, got {type(path).__name__}")
