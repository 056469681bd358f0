"""Files of a run: read without trusting them, written whole or not at all. Local."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

FALLOC_FL_KEEP_SIZE = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def regular_file(path: Path, largest_bytes: int) -> Iterator[BinaryIO]:
    """A regular file to read from. Raises OSError, and ValueError if it is none, or larger than that."""
    # A pipe would wait for its writer, and a link may lead anywhere.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > largest_bytes:
            raise ValueError(f"it is no file of at most {largest_bytes:,} bytes")
        yield file


def read_file(path: Path, largest_bytes: int) -> bytes:
    """The content of such a file."""
    with regular_file(path, largest_bytes) as file:
        return file.read(largest_bytes)


def write_file(path: Path, data: bytes) -> None:
    """Give `path` its content at once: it is on the disk before it has the name. Raises OSError."""
    _write(path, data, lambda scratch: scratch.replace(path))


def write_new_file(path: Path, data: bytes) -> None:
    """The same, of a file that must not be there yet, else FileExistsError."""
    _write(path, data, lambda scratch: give_new_name(scratch, path))


def give_new_name(scratch: Path, path: Path) -> None:
    """Rename a file to `path`, which must not be there yet, else FileExistsError."""
    try:
        os.link(scratch, path)
    except OSError as error:
        # Not every file system has links.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        scratch.rename(path)
    else:
        scratch.unlink()


def _write(path: Path, data: bytes, name: Callable[[Path], object]) -> None:
    # A name of its own: what a killed writer left, or another that writes the same just now, is nobody's obstacle.
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        name(scratch)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def set_aside(handle: int, nbytes: int) -> None:
    """Have the file system keep room for so many bytes more behind an open file, whose size stays as it is.

    Raises OSError if it has not so much free, beside what it keeps already, or if a quota is reached. Where the file
    system cannot keep room, a quota is not seen.
    """
    stat = os.fstatvfs(handle)
    # Not only behind the file: it may have holes, which are written later.
    if stat.f_bavail * stat.f_frsize < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        _fallocate(handle, os.fstat(handle).st_size, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def give_back(handle: int) -> None:
    """Give the file system back what was set aside behind an open file and not written. Raises OSError."""
    os.ftruncate(handle, os.fstat(handle).st_size)


def _fallocate(handle: int, begin: int, nbytes: int) -> None:
    """Linux' fallocate, in the mode that leaves the size as it is; Python has the other one."""
    if _LIBC.fallocate(handle, FALLOC_FL_KEEP_SIZE, ctypes.c_longlong(begin), ctypes.c_longlong(nbytes)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]
