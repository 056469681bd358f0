"""MPI libraries by the version string that each gives of itself."""

from __future__ import annotations

# Order matters: the libraries made from MPICH name it too.
FAMILIES = (("Open MPI", "openmpi"), ("CRAY", "cray"), ("Intel", "intel"), ("MVAPICH", "mvapich"), ("MPICH", "mpich"))


def family(version: str) -> str:
    """The family of an MPI library's version string."""
    return next((name for mark, name in FAMILIES if mark in version), "other")
