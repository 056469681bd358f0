"""What the analysis makes of HDF5 files that no run wrote: one line that names them; nothing is read from elsewhere."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT
from test_analysis import episode, run_script, write_rank

sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz

from gala_mpi.storage import lease
from gala_mpi.storage.run_folder import rank_file


def make_run(folder: Path) -> Path:
    """A valid run of one rank; its file."""
    recorder = write_rank(folder, 0, size=1)
    episode(recorder, 1.0, 100, 10.0)
    recorder.close()
    return folder / "rank-00000.h5"


def replace_table(path: Path, make: object) -> None:
    with h5py.File(path, "r+") as file:
        dtype = file["episodes"].dtype
        attributes = dict(file["episodes"].attrs)
        del file["episodes"]
        make(file, dtype)  # type: ignore[operator]
        if "episodes" in file and isinstance(file.get("episodes", getlink=True), h5py.HardLink):
            file["episodes"].attrs.update(attributes)


def external_link(file: h5py.File, _dtype: np.dtype) -> None:
    file["episodes"] = h5py.ExternalLink(
        str(Path(file.filename).parent.parent / "other" / "rank-00000.h5"), "/episodes"
    )


def soft_link(file: h5py.File, _dtype: np.dtype) -> None:
    file["episodes"] = h5py.SoftLink("/updates")


def huge(file: h5py.File, dtype: np.dtype) -> None:
    file.create_dataset("episodes", (2**50,), dtype, maxshape=(None,), chunks=(1000,))


def huge_row(file: h5py.File, _dtype: np.dtype) -> None:
    file.create_dataset("episodes", (1,), np.dtype([("update", "<i8", (2**27,))]), chunks=(1,))


def virtual(file: h5py.File, dtype: np.dtype) -> None:
    layout = h5py.VirtualLayout((1,), dtype)
    layout[:] = h5py.VirtualSource(str(Path(file.filename).parent.parent / "other" / "rank-00000.h5"), "episodes", (1,))
    file.create_virtual_dataset("episodes", layout)


def external_data(file: h5py.File, dtype: np.dtype) -> None:
    file.create_dataset("episodes", (1,), dtype, external=[("/etc/passwd", 0, dtype.itemsize)])


def matrix(file: h5py.File, dtype: np.dtype) -> None:
    file.create_dataset("episodes", (2, 2), dtype)


def numbers(file: h5py.File, _dtype: np.dtype) -> None:
    file["episodes"] = np.arange(5.0)


def objects(file: h5py.File, _dtype: np.dtype) -> None:
    file.create_dataset("episodes", (1,), np.dtype([("update", h5py.ref_dtype)]))


def group(file: h5py.File, _dtype: np.dtype) -> None:
    file.create_group("episodes")


def bomb(file: h5py.File, dtype: np.dtype) -> None:
    """A chunk that is small in the file only."""
    rows = np.zeros(1, dtype)
    file.create_dataset("episodes", data=rows, maxshape=(None,), chunks=(2**21,), compression="gzip")


def words(file: h5py.File, dtype: np.dtype) -> None:
    file.create_dataset("episodes", (1,), np.dtype([(name, "S8") for name in dtype.names or ()]))


def update_alone(file: h5py.File, _dtype: np.dtype) -> None:
    file.create_dataset("episodes", (1,), np.dtype([("update", "<i8")]))


@pytest.mark.parametrize(
    "make",
    [
        external_link,
        soft_link,
        huge,
        huge_row,
        virtual,
        external_data,
        matrix,
        numbers,
        objects,
        group,
        update_alone,
        bomb,
        words,
    ],
)
def test_a_table_that_is_not_the_files_own_is_refused(make: object, tmp_path: Path) -> None:
    make_run(tmp_path / "other")
    path = make_run(tmp_path / "run")
    replace_table(path, make)
    done = run_script("learning_curves.py", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and str(path) in done.stderr
    assert not list((tmp_path / "run").glob("*.csv"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run_id", None),
        ("size", "many"),
        ("size", 2**62),
        ("size", -1),
        ("config", "{"),
        ("config", "[" * 100_000),
        ("resumed", "{}"),
        ("resumed", '{"time_s": -1, "agent_steps": 0, "updates": []}'),
        ("resumed", '{"time_s": 1, "agent_steps": 0, "updates": ["x"]}'),
        ("resumed", '{"time_s": 1, "agent_steps": 1%s, "updates": []}' % ("0" * 400)),
        ("schema", np.zeros(3)),
    ],
)
def test_attributes_that_no_run_writes_are_refused(name: str, value: object, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with h5py.File(path, "r+") as file:
        if name in file.attrs:
            del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    done = run_script("learning_curves.py", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and str(path) in done.stderr


@pytest.mark.parametrize("wrong", ["interval_s", "dimension", "length"])
def test_sketches_that_no_run_draws_are_refused(wrong: str, tmp_path: Path) -> None:
    for rank, length in ((0, 4), (1, 8 if wrong == "length" else 4)):
        recorder = write_rank(tmp_path / "run", rank, dimension=length)
        recorder.append("sketches", time_s=1.0, update=1, norm=1.0, sketch=np.ones(length, np.float32))
        recorder.close()
    with h5py.File(tmp_path / "run" / "rank-00000.h5", "r+") as file:
        if wrong != "length":
            file["sketches"].attrs[wrong] = "x" if wrong == "interval_s" else 0
    done = run_script("consensus.py", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "sketches" in done.stderr


def test_a_name_that_would_be_a_formula_is_drawn_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / r"$\frac$"
    path = make_run(run)
    with h5py.File(path, "r+") as file:
        file.attrs["env_id"] = r"$\frac$"
    for script in ("learning_curves.py", "consensus.py"):
        assert run_script(script, run).returncode == 0


WATCHED = """
import os, sys, time, runs
from pathlib import Path
runs.DEADLINE_S = 1.0
with runs._deadline(Path("file")):
    print("watched", flush=True)
    time.sleep(60)
"""


def test_who_watches_a_reader_that_is_gone_ends_nobody_else() -> None:
    """Orphans come to another process, which is to live."""
    shell = subprocess.Popen(
        [sys.executable, "-c", SUBREAPER, sys.executable, WATCHED], cwd=ROOT / "analysis", stdout=subprocess.PIPE
    )
    out, _ = shell.communicate(timeout=240)
    assert shell.returncode == 0 and out == b"watched\nalive\n"


SUBREAPER = """
import ctypes, signal, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
reader = subprocess.Popen([sys.argv[1], "-c", sys.argv[2]], stdout=subprocess.PIPE, text=True)
print(reader.stdout.readline(), end="", flush=True)
reader.kill()
reader.wait()
time.sleep(3)
print("alive")
"""


def test_names_that_are_no_ranks_are_not_opened(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for name in (
        "rank-0.h5",
        "rank-00001.h5.txt",
        "rank-00001.1.h5",
        "segment-1",
        "rank-99999999999.h5",
        "../rank-00001.h5",
    ):
        (tmp_path / "run" / name).write_bytes(b"not HDF5")
    assert run_script("learning_curves.py", tmp_path / "run").returncode == 0


@pytest.mark.parametrize("script", ["learning_curves.py", "consensus.py"])
def test_results_are_not_written_through_a_link(script: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    for name in ("learning-curve.png", "consensus.png"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    done = run_script(script, tmp_path / "run")
    assert done.returncode == 2 and "is no file of its own" in done.stderr
    assert (tmp_path / "precious").read_text() == "mine" and not list((tmp_path / "run").glob("*.csv"))


LOADERS = [fuzz.try_checkpoint, fuzz.try_facts, fuzz.try_config, fuzz.try_restore, fuzz.try_folder]


@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_inputs_are_read_or_refused(loader: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_S", 0.0)
    found = [loader(random.Random(f"test-{number}")) for number in range(3000)]  # type: ignore[operator]
    # Some damage is to what does not matter; most is not.
    assert set(found) <= {"read", "refused"} and found.count("refused") > 1000


def test_damaged_metrics_are_read_or_refused(tmp_path: Path) -> None:
    found = fuzz.try_files(1, fuzz.whole_file(tmp_path), str(tmp_path))
    kinds = [text.partition(":")[0] for text in found]
    assert kinds.count("read") > 0 and kinds.count("refused") > 0 and "error" not in kinds, found


def test_a_damaged_file_that_its_writer_left_open_does_not_hold_the_reader(tmp_path: Path) -> None:
    """HDF5 would wait for ever for a writer to mend it."""
    path = make_run(tmp_path / "run")
    recorder = write_rank(tmp_path / "other", 0, size=1)
    open_ones = bytearray(rank_file(tmp_path / "other", 0).read_bytes())
    # Past the superblock, so that it is opened.
    for place in range(60, 400):
        open_ones[place] ^= 0xFF
    recorder.close()
    path.write_bytes(open_ones)
    program = f"import runs; runs.DEADLINE_S = 2.0; from pathlib import Path; runs.read_run(Path({str(path.parent)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "analysis", capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0 and str(path) in done.stderr and "cannot be read" in done.stderr
