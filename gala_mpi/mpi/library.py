"""MPI libraries by the version string that each gives of itself."""

from __future__ import annotations

from collections.abc import Mapping

# Order matters: the libraries made from MPICH name it too.
FAMILIES = (("Open MPI", "openmpi"), ("CRAY", "cray"), ("Intel", "intel"), ("MVAPICH", "mvapich"), ("MPICH", "mpich"))
# MPICH reads each of its settings under three names.
NETMOD_VARIABLES = ("MPIR_CVAR_CH4_NETMOD", "MPIR_PARAM_CH4_NETMOD", "MPICH_CH4_NETMOD")


def family(version: str) -> str:
    """The family of an MPI library's version string."""
    return next((name for mark, name in FAMILIES if mark in version), "other")


def netmods(version: str) -> list[str]:
    """What a library made from MPICH can send messages between nodes by, such as "ofi" and "ucx"; its default first."""
    return next((line.split("ch4:")[1].split() for line in version.splitlines() if "ch4:" in line), [])


def netmod(version: str, environ: Mapping[str, str]) -> str:
    """The one of `netmods` that it takes in this environment; "" if that is not known."""
    return next((environ[name] for name in NETMOD_VARIABLES if environ.get(name)), "".join(netmods(version)[:1]))
