"""Files of a run: read without trusting them, written whole or not at all. Local."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path


def read_file(path: Path, largest_bytes: int) -> bytes:
    """The content of a regular file. Raises OSError, and ValueError if it is none, or larger than that."""
    # A pipe would wait for its writer, and a link may lead anywhere.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > largest_bytes:
            raise ValueError(f"it is no file of at most {largest_bytes:,} bytes")
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


def check_room(path: Path, nbytes: int) -> None:
    """Raise OSError if the file system has no room for so many bytes more beside `path`, or takes no file there."""
    scratch = path.with_name(f"{path.name}.room.tmp")
    scratch.unlink(missing_ok=True)
    handle = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    try:
        scratch.unlink()
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        # Not every file system can tell.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    finally:
        os.close(handle)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]
