"""The job scripts on a real Slurm of two nodes: to their end, and through what happens to jobs in a night."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LAUNCHER_VARIABLES, ROOT
from slurm import ENDED, Slurm, SlurmUnavailable, wait_for

from gala_mpi.status.command import status_of

ENVIRONMENT = Path(sys.executable).parent.parent
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2", "--mem-per-cpu=1G", "--time=20")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--mem-per-cpu=1G", "--time=20")
QUICK = ("--preset", "cartpole", "--total-steps", "2_000")
ENDLESS = ("--preset", "cartpole", "--total-steps", "1_000_000_000", "--progress-every-s", "1")

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(not (ENVIRONMENT / "bin" / "mpirun").exists(), reason="the environment brings no mpirun"),
]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHER_VARIABLES, "GALA_MPI_"))}
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Slurm({**clean, "GALA_MPI_ENV": str(ENVIRONMENT), "OMP_NUM_THREADS": "1"}))
        except SlurmUnavailable as error:
            if os.environ.get("GALA_MPI_REQUIRE_SLURM"):
                pytest.fail(f"a Slurm is required: {error}")
            pytest.skip(f"no Slurm: {error}")
        yield made


class Site:
    """A user's folder on a cluster, with the job scripts in it."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        (folder / "logs").mkdir()
        self._jobs: list[int] = []

    def submit(self, *command: str, **env: str) -> int:
        self._jobs.append(self.slurm.submit(self.folder, *command, env=env))
        return self._jobs[-1]

    def train(self, *args: str, nodes: tuple[str, ...] = TWO_NODES, **env: str) -> int:
        return self.submit(*nodes, "jobs/train.sbatch", *args, **env)

    def run(self, job: int) -> Path:
        return self.folder / "runs" / f"gala-mpi-{job}"

    def log(self, job: int) -> str:
        path = next(iter((self.folder / "logs").glob(f"*-{job}*.log")), None)
        return path.read_text(errors="replace") if path else ""

    def says(self, job: int, text: str, times: int = 1) -> None:
        """Wait until the job has said it so often, while it is neither over nor gone."""
        over: list[str] = []

        def said() -> bool:
            if self.log(job).count(text) >= times:
                return True
            assert not over, f"job {job} is {over[0]}, and has not said {text!r}:\n{self.log(job)}"
            if (state := self.slurm.fact(job, "JobState")) in ENDED:
                over.append(state)
            return False

        wait_for(said, f"{text} of job {job}: {self.log(job)}")

    def ends(self, job: int) -> int:
        code = self.slurm.exit_code(job)
        print(self.log(job))
        return code

    def ranks(self, job: int) -> list[int]:
        """The processes of the run's ranks, by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, KeyError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                variables = (entry / "environ").read_bytes().split(b"\0")
                if b"train" in words and any(b"python" in word for word in words[:1]):
                    of = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
                    if of[b"SLURM_JOB_ID"] == str(job).encode():
                        found[int(of.get(b"PMI_RANK") or of[b"SLURM_PROCID"])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        for job in self._jobs:
            self.slurm.run("scancel", str(job), check=False)
        for job in self._jobs:
            for pid in self.ranks(job):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def site(slurm: Slurm, tmp_path: Path) -> Iterator[Site]:
    made = Site(slurm, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_run_over_two_nodes_ends(site: Site, launcher: str) -> None:
    job = site.train(*QUICK, GALA_MPI_LAUNCHER=launcher)
    assert site.ends(job) == 0
    log = site.log(job)
    assert f", gala-mpi {job}, restart 0\n" in log and "job: 2 ranks of 1 core(s) on n[1-2]\n" in log
    assert "2 ranks x 8 simulators" in log and status_of(site.run(job)).code == 0


def test_a_job_goes_on_after_its_limit_and_after_a_requeue_and_ends_when_it_is_cancelled(site: Site) -> None:
    slurm = site.slurm
    job = site.train(*ENDLESS)
    site.says(job, "steps/s")
    # Its limit is near.
    slurm.warn(job)
    site.says(job, "job: goes on later: into the queue again. Slurm calls that CANCELLED ... DUE TO JOB REQUEUE")
    site.says(job, "goes on from")
    assert ", restart 1\n" in site.log(job)
    # Its ranks are killed with it, and leave their files in /dev/shm; both nodes are the same again.
    slurm.run("scontrol", "requeue", str(job))
    site.says(job, "goes on from", 2)
    # A user's scancel is the last word, though the job was just told of its limit.
    slurm.warn(job)
    slurm.run("scancel", str(job))
    site.ends(job)
    assert slurm.fact(job, "JobState") == "CANCELLED"
    assert status_of(site.run(job)).code == 75 and site.log(job).count("into the queue again") == 1


def test_a_job_that_a_user_tells_to_end_ends_in_order(site: Site) -> None:
    """scancel alone gives the ranks no time."""
    job = site.train(*ENDLESS)
    site.says(job, "steps/s")
    site.slurm.run("scancel", "--signal=USR1", str(job))
    assert site.ends(job) == 75
    assert "stopped (SIGUSR1)" in site.log(job) and status_of(site.run(job)).state == "stopped by a signal"


def test_a_job_that_is_preempted_goes_on_later(site: Site) -> None:
    slurm = site.slurm
    job = site.train(*ENDLESS)
    site.says(job, "steps/s")
    urgent = site.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    site.says(job, "into the queue again")
    assert slurm.exit_code(urgent) == 0
    site.says(job, "goes on from")
    assert "stopped (SIGTERM)" in site.log(job)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_the_survivors_of_a_killed_rank_tell_the_jobs_code(site: Site, launcher: str) -> None:
    steps = (
        "--preset",
        "cartpole",
        "--total-steps",
        "150_000",
        "--neighbour-timeout-s",
        "2",
        "--progress-every-s",
        "1",
    )
    job = site.train(*steps, nodes=("--nodes=1", "--ntasks=3", "--mem-per-cpu=1G"), GALA_MPI_LAUNCHER=launcher)
    site.says(job, "steps/s")
    os.kill(site.ranks(job)[2], signal.SIGKILL)
    assert site.ends(job) == 3
    assert "lost ranks: 2" in site.log(job)


def test_ranks_that_outlive_their_nodes_daemon_keep_the_run_until_they_end(site: Site) -> None:
    slurm = site.slurm
    job = site.train(*ENDLESS, nodes=("--nodelist=n2", *ONE_NODE))
    site.says(job, "steps/s")
    ranks = site.ranks(job)
    slurm.script("kill-node", "n2")
    try:
        # The node is down, and the job begins again on the other, if it is let.
        wait_for(lambda: slurm.fact(job, "JobState") == "PENDING", "the job is in the queue again")
        slurm.run("scontrol", "update", f"JobId={job}", "ReqNodeList=n1")
        site.says(job, "another job goes on with")
        assert site.ranks(job) == ranks and status_of(site.run(job)).segment == 0
    finally:
        slurm.script("start-node", "n2")
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    site.says(job, "goes on from")
    assert not set(site.ranks(job)) & set(ranks) and status_of(site.run(job)).segment == 1


def test_where_a_job_may_not_queue_itself_again_it_submits_itself_or_says_how_to_go_on(site: Site) -> None:
    slurm = site.slurm
    job = site.train(*ENDLESS, nodes=("--no-requeue", *TWO_NODES))
    site.says(job, "steps/s")
    slurm.warn(job)
    assert site.ends(job) == 75
    assert "set GALA_MPI_AGAIN=resubmit" in site.log(job)
    out = {"GALA_MPI_OUT": str(site.run(job)), "GALA_MPI_AGAIN": "resubmit"}
    again = site.train(*ENDLESS, nodes=("--no-requeue", *TWO_NODES[:3], "--time=1-00:00:00"), **out)
    site.says(again, "goes on from")
    slurm.warn(again)
    assert site.ends(again) == 75
    assert "Submitted batch job" in site.log(again), site.log(again)
    last = again + 1
    site.says(last, "goes on from")
    assert slurm.fact(last, "NumNodes") == "2" and slurm.fact(last, "TimeLimit") == "1-00:00:00"
    slurm.run("scancel", str(last))


def test_an_array_has_a_seed_a_folder_and_a_log_for_each_member(site: Site) -> None:
    slurm = site.slurm
    job = site.submit(*ONE_NODE, "--array=1-2", "jobs/array.sbatch", *QUICK)
    folder = site.folder / "runs" / f"array-{job}"
    wait_for(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}", check=False).strip(), "the array's end")
    for member in "12":
        assert f"\nseed = {member}\n" in (folder / member / "config.toml").read_text()
        assert (site.folder / "logs" / f"array-{job}-{member}.log").exists()
        assert status_of(folder / member).code == 0
    # A member that failed, alone, by the line of a file.
    shutil.rmtree(folder / "2")
    (site.folder / "members.txt").write_text("--seed 7\n--seed 8\n")
    env = {"GALA_MPI_OUT": str(folder), "GALA_MPI_MEMBERS": "members.txt"}
    assert slurm.exit_code(site.submit(*ONE_NODE, "--array=2", "jobs/array.sbatch", *QUICK, **env)) == 0
    assert "\nseed = 8\n" in (folder / "2" / "config.toml").read_text()
    # One job for all would be the same run over again.
    refused = site.submit(*ONE_NODE, "--array=1", "jobs/train.sbatch", *QUICK)
    assert slurm.exit_code(refused) == 2 and "use jobs/array.sbatch" in site.log(refused)


def test_a_member_of_an_array_that_is_told_goes_on_alone(site: Site) -> None:
    """The last member has the number of the whole array."""
    slurm = site.slurm
    job = site.submit(*ONE_NODE, "--array=1-2", "jobs/array.sbatch", *ENDLESS)
    logs = {member: site.folder / "logs" / f"array-{job}-{member}.log" for member in (1, 2)}

    def says(member: int, text: str) -> None:
        wait_for(lambda: logs[member].exists() and text in logs[member].read_text(), f"{text} of member {member}")

    for member in logs:
        says(member, "steps/s")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
    says(2, "into the queue again")
    says(2, "goes on from")
    assert "restart 1" not in logs[1].read_text() and "queue" not in logs[1].read_text()
    slurm.run("scancel", str(job))


def test_a_comparison_that_is_told_goes_on_where_it_was(site: Site) -> None:
    slurm = site.slurm
    budget = ("--preset", "cartpole", "--total-steps", "60_000", "--progress-every-s", "0.5")
    job = site.submit(*ONE_NODE, "jobs/compare.sbatch", *budget)
    folder = site.folder / "runs" / f"compare-{job}"
    wait_for(lambda: list(folder.glob("allreduce/checkpoints/rank-00001/segment-0-*")), "the second run")
    slurm.warn(job)
    site.says(job, "into the queue again")
    assert site.ends(job) == 0
    assert "gossip: has ended already" in site.log(job)
    found = {exchange: status_of(folder / exchange) for exchange in ("gossip", "allreduce", "none")}
    assert {one.code for one in found.values()} == {0} and found["allreduce"].segment == 1


def test_the_doctor_and_a_comparison_end(site: Site) -> None:
    doctor = site.submit(*ONE_NODE, "jobs/doctor.sbatch", "--out", ".")
    compare = site.submit(*ONE_NODE, "jobs/compare.sbatch", *QUICK)
    # More ranks than cores, here, is one that fails.
    assert site.ends(doctor) in (0, 1)
    assert "gala-mpi doctor: 2 rank(s)" in site.log(doctor)
    assert site.ends(compare) == 0
    folder = site.folder / "runs" / f"compare-{compare}"
    assert [status_of(folder / exchange).code for exchange in ("gossip", "allreduce", "none")] == [0, 0, 0]


def test_what_cannot_be_is_told_in_a_line_with_exit_code_2(site: Site) -> None:
    wrong = {
        "time limit: 00:05:00 cannot be used; expected at least 10 minutes": site.train(
            *QUICK, nodes=("--time=5", *ONE_NODE[:3])
        ),
        "each is a run of its own": site.train(*QUICK, GALA_MPI_LAUNCHER="srun", GALA_MPI_PMI="none"),
        "expected auto, srun or mpirun": site.train(*QUICK, GALA_MPI_LAUNCHER="rsh"),
        "is no virtual environment": site.train(*QUICK, GALA_MPI_ENV=str(site.folder)),
        "--out: '/proc/run' cannot be used; expected a folder that can be written": site.train(
            *QUICK, GALA_MPI_OUT="/proc/run"
        ),
    }
    for line, job in wrong.items():
        assert site.ends(job) == 2
        assert site.log(job).count(line) == 1, site.log(job)
    assert not (site.folder / "runs").exists()
