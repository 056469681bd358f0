"""A user's code that raises, ends the program or takes its signals: told, in order, without a hang."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Mpi, finish, rank_process
from test_cli import assert_closed

from gala_mpi.storage.checkpoint import CheckpointFolder, read
from gala_mpi.user_code import EndedProgramError, summary, tell, user_code

TRAIN = ("-m", "gala_mpi", "train", "--env", "tasks:Task-v0", "--simulators", "4")
SHORT, LONG = ("--total-steps", "4000"), ("--total-steps", "1_000_000_000")


def doing(task: str, rank: int | None = None) -> dict[str, str]:
    """The environment of a launch whose task does something in the wrong place."""
    found = {"PYTHONPATH": str(ROOT / "tests" / "train" / "programs"), "TASK": task}
    return found if rank is None else found | {"TASK_RANK": str(rank)}


@pytest.mark.parametrize(
    "error", [SystemExit(0), SystemExit(), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
def test_what_would_end_the_program_is_an_error_that_names_the_place(error: BaseException) -> None:
    with pytest.raises(EndedProgramError, match=rf"simulator 3 would .*\({type(error).__name__}") as found:  # noqa: SIM117
        with user_code(lambda: "simulator 3"):
            raise error
    assert found.value.__cause__ is error


def test_other_errors_stay_as_they_are_with_the_place_beside_them() -> None:
    with pytest.raises(KeyError) as found, user_code(lambda: "simulator 3"):
        raise KeyError("level")
    assert found.value.__notes__ == ["(simulator 3)"]
    assert summary(found.value).startswith("KeyError: 'level', ") and f"{__file__}:" in summary(found.value)


def test_the_end_of_a_process_is_an_error_within_and_its_own_without() -> None:
    real = os._exit
    with pytest.raises(EndedProgramError), user_code(lambda: "simulator 0"):
        os._exit(0)
    assert os._exit is real
    with user_code(lambda: "simulator 0"):
        # A child of fork, as multiprocessing makes them, ends as it means to.
        child = os.fork()
        if child == 0:
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


def test_a_watchdog_ends_a_process_that_is_within() -> None:
    code = (
        "import threading, time; from gala_mpi.user_code import user_code; import os\n"
        "with user_code(lambda: 'x'):\n"
        "    threading.Thread(target=lambda: os._exit(9)).start()\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=200).returncode == 9


def test_an_error_whose_text_cannot_be_had_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert summary(Broken()).startswith("Broken: ")
    tell(Broken(), 1, 2)
    assert "[1/2]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task", ["module:argparse", "constructor:exit", "constructor:interrupt", "reset:os._exit", "module:exit in C"]
)
def test_a_program_that_is_ended_before_the_first_step_leaves_nothing(one_mpi: Mpi, task: str, tmp_path: Path) -> None:
    done = one_mpi.run(1, *TRAIN, *SHORT, "--out", str(tmp_path / "run"), env=doing(task), timeout_s=90)
    assert done.returncode == 1, done.stderr
    assert "tasks.py" in done.stderr and "ended the program" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["step:sys.exit", "step:interrupt"])
def test_a_program_that_is_ended_in_a_step_can_be_gone_on_with(one_mpi: Mpi, task: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = one_mpi.run(1, *TRAIN, *SHORT, "--out", str(run), env=doing(task), timeout_s=90)
    assert done.returncode == 1, done.stderr
    assert "simulator 3 of this rank would have ended the program" in done.stderr
    assert "in here" in done.stderr and "ranks that ended by an error: 0" in done.stdout
    assert "stopped (rank 0 ended by an error, see above): " in done.stdout
    again = one_mpi.run(1, *TRAIN[:3], "--env", TRAIN[4], "--resume", str(run), env=doing(""), timeout_s=90)
    assert again.returncode == 0, again.stderr


def test_an_exit_within_c_is_told_with_the_stack(one_mpi: Mpi, tmp_path: Path) -> None:
    args = (*TRAIN, *LONG, "--out", str(tmp_path / "run"))
    done = one_mpi.run(1, *args, env=doing("step:exit in C"), timeout_s=90)
    assert done.returncode == 1, done.stderr
    assert "has ended the program from within C" in done.stderr and "in step" in done.stderr


@pytest.mark.check
def test_one_rank_whose_task_ends_the_program_ends_all_in_order(mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = mpi.run(3, *TRAIN, *LONG, "--out", str(run), env=doing("step:sys.exit", rank=1), timeout_s=90)
    assert done.returncode == 1, done.stderr
    assert "[1/3] SystemExit: 0" in done.stderr and "ranks that ended by an error: 1" in done.stdout
    for rank in (0, 2):
        assert read(CheckpointFolder(run, rank).newest_first()[0], 10**8).facts.update > 0


@pytest.mark.parametrize(("task", "rank"), [("module:argparse", 0), ("reset:interrupt", 2)])
def test_one_rank_that_is_ended_before_the_first_step_ends_all(mpi: Mpi, task: str, rank: int, tmp_path: Path) -> None:
    done = mpi.run(3, *TRAIN, *SHORT, "--out", str(tmp_path / "run"), env=doing(task, rank), timeout_s=90)
    assert done.returncode == 1, done.stderr
    assert f"[{rank}/3] EndedProgramError" in done.stderr
    assert list(tmp_path.iterdir()) == []


ENDS_SOON = "import sys; from gala_mpi import cli; cli.END_WITHIN_S = 5.0; sys.exit(cli.train(sys.argv[1:]))"


@pytest.mark.parametrize(("task", "code"), [("reset:leave a thread and fail", 2), ("step:leave a thread and exit", 1)])
def test_threads_that_are_left_do_not_hold_the_end_up(one_mpi: Mpi, task: str, code: int, tmp_path: Path) -> None:
    """Python would wait for them, and the launcher for Python."""
    args = ("-c", ENDS_SOON, *TRAIN[3:], *LONG, "--out", str(tmp_path / "run"))
    done = one_mpi.run(2, *args, env=doing(task), timeout_s=90)
    assert done.returncode == code, done.stderr


def test_a_thread_that_ends_the_program_is_told(one_mpi: Mpi, tmp_path: Path) -> None:
    args = (*TRAIN, *LONG, "--out", str(tmp_path / "run"))
    done = one_mpi.run(1, *args, env=doing("step:end in a thread"), timeout_s=90)
    assert done.returncode == 1 and "a thread of the user's code has ended the program" in done.stderr


@pytest.mark.parametrize("task", ["constructor:exit in C", "reset:kill"])
def test_a_start_that_is_ended_from_outside_can_be_gone_on_with(one_mpi: Mpi, task: str, tmp_path: Path) -> None:
    """Nothing of ours runs any more that could take the folder away: a refusal says what to do."""
    run = tmp_path / "run"
    assert one_mpi.run(2, *TRAIN, *SHORT, "--out", str(run), env=doing(task), timeout_s=90).returncode not in (0, 2)
    again = one_mpi.run(2, *TRAIN, *SHORT, "--out", str(run), env=doing(""), timeout_s=90)
    assert again.returncode == 2 and "(--resume goes on with one)" in again.stderr, again.stderr
    anew = one_mpi.run(2, *TRAIN, *SHORT, "--resume", str(run), env=doing(""), timeout_s=90)
    assert anew.returncode == 0 and "the run begins anew" in anew.stderr, anew.stderr


@pytest.mark.parametrize("task", ["reset:set torch", "step:close output"])
def test_what_is_set_for_the_whole_process_is_put_back(one_mpi: Mpi, task: str, tmp_path: Path) -> None:
    done = one_mpi.run(1, *TRAIN, *SHORT, "--out", str(tmp_path / "run"), env=doing(task), timeout_s=90)
    # The launcher calls the program by -m, so what stands in the end was said by the guarded stream.
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


@pytest.mark.parametrize(("size", "task"), [(1, "reset:fail"), (3, "constructor:fail")])
def test_a_task_that_does_not_begin_is_refused_again_and_again(
    one_mpi: Mpi, size: int, task: str, tmp_path: Path
) -> None:
    for _ in range(2):
        done = one_mpi.run(size, *TRAIN, *SHORT, "--out", str(tmp_path / "run"), env=doing(task), timeout_s=90)
        assert done.returncode == 2, done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("gala-mpi: error:")]
        assert len(said) == 1 and "--env: 'tasks:Task-v0'" in said[0]
        assert "ValueError: the level is missing" in said[0] and "tasks.py:" in said[0]
        assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["close:sys.exit", "close:fail"])
def test_simulators_that_do_not_close_take_nothing_back(one_mpi: Mpi, task: str, tmp_path: Path) -> None:
    done = one_mpi.run(2, *TRAIN, *SHORT, "--out", str(tmp_path / "run"), env=doing(task), timeout_s=90)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the simulators could not be closed") == 2
    assert_closed(tmp_path / "run", 2)


@pytest.mark.parametrize("task", ["constructor:take signals", "step:take signals in C"])
def test_signals_that_an_environment_has_taken_are_taken_back(mpi: Mpi, task: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = mpi.start(2, *TRAIN, *LONG, "--checkpoint-every-s", "0.5", "--out", str(run), env=doing(task))
    deadline = time.monotonic() + 240
    # Past the thousandth step of each, in which they are taken.
    while min(updates(run, 0), updates(run, 1)) < 100 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(rank_process(process.pid, 1), signal.SIGTERM)
    done = finish(process, 60)
    assert done.returncode == 75, done.stderr
    # Once a rank, though every simulator takes them.
    assert done.stderr.count("the environment has taken SIGTERM") == 2
    assert_closed(run, 2)


SETTLES = """
import signal
from gala_mpi.train import signals
with signals.heard_by(signals.StopRequest()):
    from mpi4py import MPI
    signals.settle()
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        before = signals._handler(number)
        signal.signal(number, signal.SIG_IGN)
        print(signals._take_back(), signals._take_back(), signals._handler(number) == before)
"""


def test_signals_are_taken_back_whole(mpi: Mpi) -> None:
    """With what a library had put before ours: MPICH learns of a rank's death by SIGUSR1."""
    done = mpi.run(1, "-c", SETTLES)
    assert done.stdout.splitlines() == [f"['{n}'] [] True" for n in ("SIGUSR1", "SIGHUP", "SIGTERM")], done.stderr


def updates(run: Path, rank: int) -> int:
    """The update of a rank's last checkpoint."""
    paths = CheckpointFolder(run, rank).newest_first()
    return int(paths[0].stem.rpartition("-")[2]) if paths else 0
