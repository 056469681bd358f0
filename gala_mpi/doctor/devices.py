"""GPUs of a node, and whether the MPI library takes their memory. Local; torch is imported only where a GPU is."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

from gala_mpi.doctor.findings import FAIL, OK, WARN, Finding
from gala_mpi.doctor.libraries import CUDA
from gala_mpi.mpi.library import family


def devices(ranks: tuple[int, ...], library: str) -> list[Finding]:
    """What the GPUs of this node mean for its `ranks`. Local; takes seconds where there is a GPU."""
    present = gpus_present(Path("/dev"))
    usable = torch_devices() if present else 0
    return judge(present, usable, cuda_aware(), ranks, library)


def gpus_present(dev: Path) -> int:
    """GPUs by their device files, whatever torch can do with them."""
    nvidia = [path for path in dev.glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    return len(nvidia) or int((dev / "kfd").exists()) or int((dev / "dxg").exists())


def torch_devices() -> int | None:
    """GPUs that torch can use; None without torch."""
    if find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_aware() -> bool | None:
    """What the loaded MPI library says of itself; None if it cannot be asked."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text("utf-8", "replace").splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    for path in sorted(path for path in paths if Path(path).name.startswith("libmpi")):
        try:
            query = ctypes.CDLL(path).MPIX_Query_cuda_support
        except (OSError, AttributeError):
            continue
        return bool(query())
    return None


def judge(present: int, usable: int | None, aware: bool | None, ranks: tuple[int, ...], library: str) -> list[Finding]:
    """Findings on `present` GPUs of which torch can use `usable`, with an MPI library that is CUDA-aware or not."""
    says = {True: "is CUDA-aware", False: "is not CUDA-aware", None: "does not say whether it is CUDA-aware"}[aware]
    values = {"present": present, "usable": usable, "cuda_aware": aware}
    if not present:
        return [Finding("gpu.devices", OK, f"no GPU: policies live on the CPU; this MPI {says}", "", values, ranks)]
    if not usable:
        reason = "torch is not installed" if usable is None else "torch can use none"
        fix = "pip install a torch built for this driver's CUDA (nvidia-smi shows it), and unset CUDA_VISIBLE_DEVICES"
        return [Finding("gpu.devices", FAIL, f"{present} GPU(s), but {reason}", fix, values, ranks)]
    message = f"{usable} GPU(s) that torch can use for {len(ranks)} rank(s) of the node"
    findings = [Finding("gpu.devices", OK, message, "", values, ranks)]
    if aware:
        return [*findings, Finding("gpu.mpi", OK, f"this MPI {says}", "", {"cuda_aware": True}, ranks)]
    fix = CUDA.get(family(library), "an MPI library built for CUDA")
    message = f"this MPI {says}: messages go through host memory"
    return [*findings, Finding("gpu.mpi", WARN, message, fix, {"cuda_aware": aware}, ranks)]
