"""Files of a run: read without trusting them, written whole or not at all. Local."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
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
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        # What a killed writer left.
        scratch.unlink(missing_ok=True)
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_room(path: Path, nbytes: int) -> None:
    """Raise OSError if the file system has no room for so many bytes more beside `path`, or takes no file there."""
    scratch = path.with_name(f"{path.name}.room")
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
