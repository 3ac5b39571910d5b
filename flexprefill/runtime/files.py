"""Files that appear whole or not at all, and bytes at a place in a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[int]:
    """Yields the descriptor of a new, empty file. At the end of the block it takes the place of ``path``.

    The old file stays until then. It also stays if the block raises or the process dies. The new file's bytes are on
    the disk before it gets the name. It keeps the old file's mode, or has the umask's if there was none. A link stays
    a link: its target is replaced.

    Raises:
        ValueError: Something that is no file has this name.
        OSError: The file cannot be made or put in place. The error names ``path``.
    """
    target = Path(os.path.realpath(path))
    name = f".flexprefill-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as cleanup:
        with _errors_naming(path, target.parent):
            mode = _mode_of_file(target)
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            cleanup.callback(os.close, folder)
            descriptor, nameless = _new_file(target.parent, folder, name, 0o666 if mode is None else mode)
            cleanup.callback(os.close, descriptor)
            cleanup.callback(_remove_if_there, name, folder)
            if mode is not None:
                os.fchmod(descriptor, mode)  # the umask took some of it
        yield descriptor
        with _errors_naming(path, target.parent):
            os.fsync(descriptor)
            if nameless:
                # Python calls linkat only if it is given a folder's descriptor, and link does not follow this link
                os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)
            os.replace(name, target.name, src_dir_fd=folder, dst_dir_fd=folder)


def write_at(descriptor: int, data: bytes | bytearray | memoryview, position: int) -> None:
    """Writes all of these bytes at a position of a file."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, position)
        position, rest = position + count, rest[count:]


def write_json(path: str | os.PathLike[str], record: Any) -> None:
    """Writes a record as JSON, whole or not at all."""
    with whole_file(path) as file:
        write_at(file, (json.dumps(record, indent=1) + "\n").encode(), 0)


def read_at(descriptor: int, position: int, length: int) -> bytes:
    """These bytes of a file. They are fewer if the file ends before."""
    pieces = [os.pread(descriptor, length, position)]  # mostly the only one, and joining one copies nothing
    while pieces[-1] and (rest := length - sum(map(len, pieces))):
        pieces.append(os.pread(descriptor, rest, position + length - rest))
    return b"".join(pieces)


def start_writing_back(descriptor: int, position: int, length: int) -> None:
    """Asks the system to put these bytes on the disk in the background. The end then waits for less."""
    if hasattr(os, "posix_fadvise"):  # macOS has none: it writes everything at the end
        os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_DONTNEED)


def check_path(path: object) -> None:
    """Raises TypeError unless it is a file name."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file name, got {type(path).__name__}")


def _mode_of_file(path: Path) -> int | None:
    """The permissions of a file, or None if nothing is there. Raises ValueError if it is no file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise ValueError(f"path must be a file or not exist yet, got {path}")
    return stat.S_IMODE(mode)


def _new_file(parent: Path, folder: int, name: str, mode: int) -> tuple[int, bool]:
    """A file to write, and whether it has no name. Without a name nothing is left if the process is killed."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):  # on Linux
        with contextlib.suppress(OSError):  # not every file system can
            return os.open(parent, flags | os.O_TMPFILE, mode), True
    return os.open(name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=folder), False


def _remove_if_there(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):  # an earlier error says more
        os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def _errors_naming(path: str | os.PathLike[str], folder: Path) -> Iterator[None]:
    """Turns an OSError into one that names the caller's path, not the new file's passing name."""
    try:
        yield
    except OSError as error:
        reason = f"the folder {folder} is not writable" if error.errno in UNWRITABLE else error.strerror
        raise OSError(error.errno, reason, os.fspath(path)) from None
