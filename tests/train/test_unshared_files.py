"""Files that a start reads, where some ranks have them and others do not: as on file systems that nodes do not share.

A path below /proc/self/cwd leads each process to its own folder, and rank 0 runs in another one than the rest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Mpi

COMMANDS = {
    "train": ("train", "--preset", "cartpole", "--total-steps", "2_000", "--out", "{out}/run"),
    "doctor": ("doctor", "--deadline-s", "60", "--out", "{out}"),
    "bench": ("bench", "--parameters", "1000", "--repeats", "1", "--no-gloo", "--deadline-s", "60"),
}
LIBRARY = """
import torch, gala_mpi
from mpi4py import MPI
try:
    with gala_mpi.Gossip(torch.nn.Linear(2, 2), MPI.COMM_WORLD, TOPOLOGY) as gossip:
        gossip.step()
        print(f"edges {gossip.topology.in_edges}\\n", end="")
except gala_mpi.DisagreementError as error:
    print(f"refused: {error}\\n", end="")
"""
RING = "0 1\n1 2\n2 0\n"
MODULE = """
import gymnasium
gymnasium.register("There-v0", lambda: gymnasium.make("CartPole-v1").unwrapped)
"""


def apart(mpi: Mpi, tmp_path: Path, rank_0: dict[str, str], others: dict[str, str]) -> Mpi:
    """The library with rank 0 in a folder of its own, which holds these files."""
    for name, files in (("rank-0", rank_0), ("others", others)):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    script = tmp_path / "apart.sh"
    script.write_text(
        f'cd {tmp_path}/others\n[ "${{PMI_RANK:-$OMPI_COMM_WORLD_RANK}}" = 0 ] && cd {tmp_path}/rank-0\nexec "$@"\n'
    )
    return replace(mpi, under=("sh", str(script)))


def args_of(command: str, tmp_path: Path) -> list[str]:
    return ["-m", "gala_mpi", *(arg.format(out=tmp_path) for arg in COMMANDS[command])]


def one_line(stderr: str, command: str) -> str:
    (line,) = [line for line in stderr.splitlines() if "error:" in line]
    assert "Traceback" not in stderr, (command, stderr)
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_an_edge_list_need_be_on_rank_0_alone(mpi: Mpi, command: str, tmp_path: Path) -> None:
    mpi = apart(mpi, tmp_path, {"edges.txt": RING}, {})
    done = mpi.run(3, *args_of(command, tmp_path), "--topology", "/proc/self/cwd/edges.txt")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("size", [1, 3])
def test_an_edge_list_that_rank_0_has_not_is_refused_at_once(
    one_mpi: Mpi, size: int, command: str, tmp_path: Path
) -> None:
    mpi = apart(one_mpi, tmp_path, {}, {"edges.txt": RING})
    done = mpi.run(size, *args_of(command, tmp_path), "--topology", "/proc/self/cwd/edges.txt")
    assert done.returncode == 2, done.stderr
    assert "--topology: '/proc/self/cwd/edges.txt' cannot be used" in one_line(done.stderr, command)
    assert not (tmp_path / "run").exists()


def test_the_library_takes_the_edges_that_rank_0_reads(mpi: Mpi, tmp_path: Path) -> None:
    program = LIBRARY.replace("TOPOLOGY", repr("/proc/self/cwd/edges.txt"))
    seen = apart(mpi, tmp_path, {"edges.txt": RING}, {"edges.txt": "0 2\n2 1\n1 0\n"})
    done = seen.run(3, "-m", "mpi4py", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("edges ((2,), (0,), (1,))") == 3
    (tmp_path / "rank-0" / "edges.txt").unlink()
    done = seen.run(3, "-m", "mpi4py", "-c", program)
    assert done.returncode == 0 and done.stdout.count("refused: rank 0: --topology") == 3, done.stderr


@pytest.mark.parametrize("having", ["rank 0", "others"])
def test_a_module_of_an_environment_must_be_on_all_ranks(one_mpi: Mpi, having: str, tmp_path: Path) -> None:
    files = {"there.py": MODULE}
    mpi = apart(one_mpi, tmp_path, *((files, {}) if having == "rank 0" else ({}, files)))
    done = mpi.run(3, *args_of("train", tmp_path), "--env", "there:There-v0")
    assert done.returncode == 2, done.stderr
    assert "a module that can be imported before the colon" in one_line(done.stderr, "train")
    assert not (tmp_path / "run").exists()


def test_a_preset_need_be_on_rank_0_alone(one_mpi: Mpi, tmp_path: Path) -> None:
    mpi = apart(one_mpi, tmp_path, {"mine.toml": '[environment]\nenv = "CartPole-v1"\nsimulators = 2\n'}, {})
    args = args_of("train", tmp_path)
    args[args.index("cartpole")] = "mine.toml"
    done = mpi.run(3, *args)
    assert done.returncode == 0, done.stderr
