"""What benchmarks need to know of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path


def launcher() -> str:
    """The mpirun that belongs to this Python."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    return found or sys.exit("no mpirun beside this Python or on the PATH")


def machine() -> str:
    """Processor and cores, in one line."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
