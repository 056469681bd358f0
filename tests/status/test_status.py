"""`gala-mpi status`: a run's exit code by what it wrote, whatever its launcher said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import MPIS, Once

from gala_mpi.config import UsageError
from gala_mpi.status import command
from gala_mpi.status.command import StatusOptions, report, status_of
from gala_mpi.storage import lease
from gala_mpi.storage.lease import End, write_lease
from gala_mpi.storage.run_folder import run_id_of

KEYS = {"run", "state", "code", "segment", "steps", "total_steps"}


@pytest.fixture
def run(once: Once, tmp_path: Path) -> Path:
    """A copy of a finished run of one rank."""

    def make(folder: Path) -> None:
        args = ("-m", "gala_mpi", "train", "--preset", "cartpole", "--total-steps", "640", "--out", str(folder / "run"))
        assert next(iter(MPIS.values())).run(1, *args).returncode == 0

    return Path(shutil.copytree(once("status", make) / "run", tmp_path / "run"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_S", 0.1)


def test_a_finished_run_says_so(run: Path) -> None:
    said, code = report([str(run)])
    assert (said, code) == (f"{run}: finished, 640 of 640 steps, 1 start (exit code 0)", 0)
    said, code = report(["--json", str(run)])
    found = json.loads(said)
    assert found.keys() == KEYS and (found["state"], found["segment"], code) == ("finished", 0, 0)


@pytest.mark.parametrize("code", [1, 3, 4, 5, 75])
def test_the_exit_code_is_that_of_the_run(code: int, run: Path) -> None:
    write_lease(run, run_id_of(run), 0, End(ended=code != 5, code=code, steps=320))
    found = status_of(run)
    assert (found.code, found.steps, found.state) == (code, 320, command.MEANING[code])
    said, greatest = report([str(run), str(run), "--only", "code", "steps"])
    assert (said, greatest) == (f"{code} 320\n{code} 320", code)


def test_a_run_that_was_killed_can_be_resumed(run: Path) -> None:
    """Its steps are those of its last checkpoint."""
    write_lease(run, run_id_of(run), 0)
    found = status_of(run)
    assert (found.state, found.code, found.steps) == ("killed", 75, 640)
    assert report([str(run)])[0].endswith(f"(exit code 75); goes on with --resume {run}")
    # It was begun again, and killed before it had written a lease.
    write_lease(run, run_id_of(run), 0, End(ended=True, code=0))
    (run / "config.1.toml").write_bytes((run / "config.toml").read_bytes())
    assert status_of(run).state == "killed" and status_of(run).segment == 1


def test_a_run_of_an_older_version_has_ended(run: Path) -> None:
    write_lease(run, run_id_of(run), 0, End(ended=True))
    found = status_of(run)
    assert (found.state, found.code, found.steps) == (command.ENDED, 75, 640)


def test_damaged_checkpoints_have_no_steps(run: Path) -> None:
    write_lease(run, run_id_of(run), 0)
    for path in run.glob("checkpoints/rank-00000/*"):
        path.write_bytes(b"\xff" * 64)
    assert status_of(run).steps == 0
    # Killed before it had written more.
    for path in run.iterdir():
        if path.name not in ("run.json", "lease.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert status_of(run).total_steps == 0


@pytest.mark.parametrize("damage", ["run.json", "lease.json", "code", "config.toml"])
def test_what_is_no_run_is_told(damage: str, run: Path) -> None:
    if damage == "code":
        (run / "lease.json").write_text(json.dumps({"run_id": run_id_of(run), "segment": 0, "code": "0"}))
    else:
        (run / damage).write_text("nothing")
    with pytest.raises(UsageError, match=f"^RUN: '{run}' cannot be used; expected the folder of a run"):
        report([str(run)])


def test_what_is_no_run_among_several_has_a_line_of_its_own(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    picture.touch()
    said, code = report([str(picture), str(run)])
    first, second = said.splitlines()
    assert first.startswith(f"RUN: '{picture}' cannot be used") and second.startswith(f"{run}: finished") and code == 2
    assert "error" in json.loads(report(["--json", str(picture), str(run)])[0].splitlines()[0])


def test_runs_must_be_named(run: Path) -> None:
    with pytest.raises(UsageError, match=r"^RUN: not given; usage: gala-mpi status RUN \.\.\. \[OPTIONS\]"):
        report([])
    with pytest.raises(UsageError, match="--only"):
        report([str(run), "--only", "nothing"])
    assert StatusOptions((run,)).run == (run,)
