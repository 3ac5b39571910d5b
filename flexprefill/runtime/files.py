"""Files that appear whole or not at all, and bytes at a place in a file."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[int]:
    """Yields the descriptor of a new file, empty and to be written, that takes ``path``'s place at the end.

    What was there before is there until then, and stays if the block raises or the process dies. The new file's
    bytes are on the disk before it gets the name. It has the mode of the file it replaces, else that of the umask.
    A link stays one, and its target is replaced.

    Raises:
        ValueError: something that is no file has this name.
        OSError: the file cannot be made, or not take the place; the error names ``path``.
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
                os.fchmod(descriptor, mode)  # of which the umask took some
        yield descriptor
        with _errors_naming(path, target.parent):
            os.fsync(descriptor)
            if nameless:
                # with a folder's descriptor Python calls linkat, which alone follows this link
                os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)
            os.replace(name, target.name, src_dir_fd=folder, dst_dir_fd=folder)


def write_at(descriptor: int, data: bytes | bytearray | memoryview, position: int) -> None:
    """Writes all of these bytes at a position of a file."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, position)
        position, rest = position + count, rest[count:]


def read_at(descriptor: int, position: int, length: int) -> bytes:
    """These bytes of a file, fewer if it ends before."""
    pieces = [os.pread(descriptor, length, position)]  # mostly all: joining one piece copies nothing
    while pieces[-1] and (rest := length - sum(map(len, pieces))):
        pieces.append(os.pread(descriptor, rest, position + length - rest))
    return b"".join(pieces)


def start_writing_back(descriptor: int, position: int, length: int) -> None:
    """Has the system put these bytes on the disk in the background, so that the end waits for less."""
    if hasattr(os, "posix_fadvise"):  # macOS has none, and writes all of them at the end
        os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_DONTNEED)


def check_path(path: object) -> None:
    """Raises TypeError unless it is a file name."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file name, got {type(path).__name__}")


def _mode_of_file(path: Path) -> int | None:
    """The permissions of a file, None if nothing is there; raises ValueError if it is something else."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise ValueError(f"path must be a file or not exist yet, got {path}")
    return stat.S_IMODE(mode)


def _new_file(parent: Path, folder: int, name: str, mode: int) -> tuple[int, bool]:
    """A file to be written and whether it has no name: then nothing of it is left even if the process is killed."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):  # on Linux
        with contextlib.suppress(OSError):  # not every file system can
            return os.open(parent, flags | os.O_TMPFILE, mode), True
    return os.open(name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=folder), False


def _remove_if_there(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):  # what went wrong before says more
        os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def _errors_naming(path: str | os.PathLike[str], folder: Path) -> Iterator[None]:
    """An OSError inside becomes one that names the caller's path instead of the new file's passing name."""
    try:
        yield
    except OSError as error:
        reason = f"the folder {folder} is not writable" if error.errno in UNWRITABLE else error.strerror
        raise OSError(error.errno, reason, os.fspath(path)) from None
