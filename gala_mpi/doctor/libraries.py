"""MPI libraries and launchers: which one this is, whether they fit each other, and what is set where.

Pure functions of values that the caller reads; nothing here calls MPI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gala_mpi.doctor.findings import FAIL, OK, WARN, Finding
from gala_mpi.mpi.library import family, netmod, netmods

# A launcher's variables for the number of ranks and the rank. Slurm's come last: they are inherited by what
# another launcher starts inside an allocation.
LAUNCHERS = (
    ("the mpirun of Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("the mpirun of MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("the mpirun of MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("Slurm", "SLURM_NTASKS", "SLURM_PROCID"),
)

LOCAL_SIZES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")

LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")

SRUN = {
    "openmpi": "srun --mpi=pmix",
    "cray": "srun --mpi=cray_shasta",
    "intel": "export I_MPI_PMI_LIBRARY=libpmi2.so (with its path) and srun --mpi=pmi2",
}

BIND = {
    "openmpi": "mpirun --map-by core --bind-to core (or --bind-to none)",
    "cray": "srun --cpu-bind=cores (or aprun -cc depth)",
    "intel": "export I_MPI_PIN_DOMAIN=auto (or I_MPI_PIN=off)",
    "mvapich": "export MV2_ENABLE_AFFINITY=0",
    "mpich": "mpirun -bind-to core",
}

THREADS = {
    "cray": "export MPICH_MAX_THREAD_SAFETY=multiple",
    "mvapich": "export MV2_ENABLE_AFFINITY=0",
    "intel": "source setvars.sh of an Intel MPI whose default library is release_mt (I_MPI_LIBRARY_KIND=release_mt)",
    "openmpi": "an Open MPI that ompi_info lists with 'MPI_THREAD_MULTIPLE: yes'",
    "mpich": "an MPICH configured with --enable-threads=multiple",
}

CUDA = {
    "openmpi": "an Open MPI built --with-cuda (ompi_info --parsable --all | grep cuda_support)",
    "cray": "export MPICH_GPU_SUPPORT_ENABLED=1, and load craype-accel-*",
    "intel": "export I_MPI_OFFLOAD=1",
    "mvapich": "export MV2_USE_CUDA=1",
    "mpich": "an MPICH configured --with-cuda, and MPIR_CVAR_ENABLE_GPU=1",
}


@dataclass(frozen=True)
class Launch:
    """What the launcher's variables say of this process; no launcher: an empty name, and one rank."""

    launcher: str = ""
    size: int = 1
    rank: int | None = None


def launch(environ: Mapping[str, str]) -> Launch:
    """What the environment says of the launcher."""
    for launcher, size_name, rank_name in LAUNCHERS:
        size, rank = environ.get(size_name, ""), environ.get(rank_name, "")
        # Slurm's number of tasks alone is the allocation's, seen from a login shell.
        if size.isdigit() and rank.isdigit():
            # With --mpi=pmi2 or pmix srun sets the variables of the others too.
            by_srun = (environ.get("SLURM_STEP_NUM_TASKS"), environ.get("SLURM_PROCID")) == (size, rank)
            return Launch("srun" if by_srun else launcher, int(size), int(rank))
    return Launch()


def ranks_here(found: Launch, environ: Mapping[str, str]) -> int:
    """Ranks on this node by the launcher's word; all of them where it says nothing of nodes."""
    given = (environ.get(name, "") for name in LOCAL_SIZES)
    return next((int(value) for value in given if value.isdigit()), found.size)


def speaks_for_node(found: Launch, environ: Mapping[str, str]) -> bool:
    """Whether this is the first rank of its node by the launcher's word; rank 0 where it says nothing of nodes."""
    given = (environ.get(name, "") for name in LOCAL_RANKS)
    return next((value == "0" for value in given if value.isdigit()), not found.rank)


def singletons(found: Launch, size: int, library: str) -> list[Finding]:
    """FAIL if the launcher started more ranks than the MPI library sees: they are separate runs of one rank."""
    if size > 1 or found.size == 1:
        return []
    name = family(library)
    if found.launcher in ("srun", "Slurm"):
        fix = f"{SRUN.get(name, 'srun --mpi=pmi2')} (srun --mpi=list shows what this Slurm has)"
        fix += f"; or {mpirun_of(name)} -n {found.size}; for one rank on purpose: srun -n 1"
    else:
        fix = f"start with {mpirun_of(name)}, or load the MPI library that this launcher belongs to"
    message = f"{found.launcher} started {found.size} ranks, but each is a run of its own (MPI_COMM_WORLD has 1 rank)"
    return [Finding("ranks.launch", FAIL, message, fix, {"launched": found.size, "size": size}, (0,))]


def mpirun_of(name: str) -> str:
    """The launcher that belongs to a family."""
    owner = {"openmpi": "Open MPI", "intel": "Intel MPI", "mvapich": "MVAPICH", "mpich": "MPICH"}.get(name, "this MPI")
    return f"the mpirun of {owner}"


def ranks(found: Launch, nodes: list[str], library: str) -> list[Finding]:
    """How many ranks there are on how many nodes, or that they are singletons. `nodes[r]` is the node of rank r."""
    apart = singletons(found, len(nodes), library)
    if apart:
        return apart
    per_node = [nodes.count(node) for node in dict.fromkeys(nodes)]
    fewest, most = min(per_node), max(per_node)
    spread = f"{most}" if fewest == most else f"{fewest} to {most}"
    by = f", started by {found.launcher}" if found.launcher else ", without a launcher"
    message = f"{len(nodes)} rank(s) on {len(per_node)} node(s), {spread} a node{by}"
    return [Finding("ranks.launch", OK, message, "", {"size": len(nodes), "ranks_per_node": per_node})]


def thread_level(level: str, nodes: int, library: str, environ: Mapping[str, str]) -> Finding:
    """Whether threads may call MPI, which delivery to other nodes in the background needs."""
    values = {"granted": level}
    if level == "multiple":
        return Finding("mpi.threads", OK, "MPI_THREAD_MULTIPLE is granted", "", values)
    said = f"MPI_THREAD_{level.upper()} is granted, not MPI_THREAD_MULTIPLE"
    if nodes == 1:
        return Finding("mpi.threads", OK, f"{said}, which one node does not need", "", values)
    fix = THREADS.get(family(library), "an MPI library built for MPI_THREAD_MULTIPLE")
    if environ.get("MPI4PY_RC_THREAD_LEVEL", "multiple") != "multiple":
        fix = "unset MPI4PY_RC_THREAD_LEVEL"
    return Finding("mpi.threads", WARN, f"{said}: messages to other nodes hold up every update", fix, values)


def lost_ranks(nodes: int, library: str, environ: Mapping[str, str]) -> list[Finding]:
    """WARN if this library ends ranks with those of other nodes that die; docs/compatibility.md has what was seen."""
    if nodes == 1 or not netmod(library, environ).startswith("ucx"):
        return []
    fix = "export MPIR_CVAR_CH4_NETMOD=ofi" if "ofi" in netmods(library) else "an MPICH built with ch4:ofi"
    message = "MPICH over UCX: a rank that has a message under way to one of another node that dies is ended too"
    return [Finding("mpi.lost-ranks", WARN, message, fix, {"netmod": "ucx"})]


def windows(problem: str, library: str) -> Finding:
    """Whether there are windows, and of the memory model that a run needs; `problem` says why not, or is empty."""
    values = {"usable": not problem}
    if not problem:
        return Finding("mpi.window", OK, "the memory model of windows is MPI_WIN_UNIFIED", "", values)
    fix = "another MPI library or transport"
    if family(library) == "openmpi":
        # Its pt2pt serves no threads.
        fix = f"export OMPI_MCA_osc=sm,rdma,ucx; or {fix}"
    return Finding("mpi.window", FAIL, problem, fix, values)


def bind_fix(found: Launch, library: str, cores: int) -> str:
    """How to give every rank `cores` cores of its own."""
    if found.launcher in ("srun", "Slurm"):
        return f"srun --cpus-per-task={cores} --cpu-bind=cores"
    return BIND.get(family(library), "the launcher's option against binding") + ", and no taskset before it"
