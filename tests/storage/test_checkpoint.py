"""Checkpoint files: what was written comes back, other bytes are refused by name, and names stand for whole files."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from choices import LEARNERS, named, with_another
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from gala_mpi import files
from gala_mpi.config import ConfigError, LearnerConfig, TrainConfig
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.learning.environments import Episode
from gala_mpi.learning.learner import Learner
from gala_mpi.learning.networks import MLPPolicy
from gala_mpi.storage import checkpoint
from gala_mpi.storage.checkpoint import (
    BEST,
    CheckpointError,
    CheckpointFolder,
    Facts,
    Tensors,
    decode,
    encode,
    ranks_with_checkpoints,
    read,
)
from gala_mpi.storage.resume import FIXED, Resumption, check_changes
from gala_mpi.train.checkpointer import ENOUGH_EPISODES, Checkpointer, Identity, flat_tensors

FACTS = Facts(
    run_id="f" * 32,
    segment=0,
    rank=1,
    size=2,
    update=7,
    agent_steps=280,
    total_steps=560,
    episodes=3,
    time_s=1.5,
    best_return=-math.inf,
    recent=[[0.5, 20.0], [1.0, 21.5]],
    counters={"messages_sent": 7, "message_age_s": math.nan},
    seconds={"forward": 0.25},
    neighbours={"0": 6},
    config={"run": {"seed": 1}},
)
TENSORS: Tensors = {
    "parameters.w": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "parameters.b": np.float32(3.0).reshape(()),
    "actions.stream": np.arange(50, dtype=np.uint8),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3)),
}
WHOLE = encode(TENSORS, FACTS)


def accept(_: object) -> None:
    """Any checkpoint will do."""


def update(number: int, segment: int = 0) -> Facts:
    return dataclasses.replace(FACTS, update=number, segment=segment)


def test_what_is_written_comes_back() -> None:
    facts, tensors = decode(WHOLE)
    assert repr(facts) == repr(FACTS)
    assert tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], values)
        assert tensors[name].dtype == values.dtype and tensors[name].shape == values.shape


def test_a_file_that_is_cut_off_anywhere_is_refused() -> None:
    for length in range(len(WHOLE)):
        with pytest.raises(ValueError):
            decode(WHOLE[:length])


def test_a_byte_that_is_changed_anywhere_is_refused() -> None:
    for place in range(len(WHOLE)):
        for change in (1, 0x80, 0xFF):
            changed = bytearray(WHOLE)
            changed[place] ^= change
            # Spaces that fill the header may be others, as long as all that they surround is the same.
            try:
                facts, tensors = decode(bytes(changed))
            except ValueError:
                continue
            assert repr(facts) == repr(FACTS), place
            assert all(np.array_equal(tensors[name], values) for name, values in TENSORS.items()), place


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.integers(0, len(WHOLE)), st.integers(0, 30))
def test_any_bytes_give_a_checkpoint_or_are_refused(noise: bytes, place: int, skipped: int) -> None:
    for data in (noise, WHOLE[:place] + noise + WHOLE[place + skipped :]):
        with contextlib.suppress(ValueError):
            decode(data)


def forged(change: Any) -> bytes:
    """A file with another set of facts, and the digest that goes with it."""
    values = {"format": 1, **dataclasses.asdict(FACTS)}
    change(values)
    made = dataclasses.replace(FACTS)
    object.__setattr__(made, "to_json", lambda: json.dumps(values))
    return encode(TENSORS, made)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(format=2),
        lambda v: v.pop("update"),
        lambda v: v.update(more=1),
        lambda v: v.update(update=-1),
        lambda v: v.update(update=1.5),
        lambda v: v.update(update=True),
        lambda v: v.update(agent_steps=10**30),
        lambda v: v.update(rank=2),
        lambda v: v.update(size=2**62),
        lambda v: v.update(total_steps=2**60),
        lambda v: v.update(counters={"messages_sent": 1e300}),
        lambda v: v.update(neighbours={"9" * 5000: 1}),
        lambda v: v.update(size=0),
        lambda v: v.update(time_s=math.nan),
        lambda v: v.update(time_s="1"),
        lambda v: v.update(run_id=3),
        lambda v: v.update(recent=[[1.0]]),
        lambda v: v.update(recent=[[1.0, math.nan]]),
        lambda v: v.update(recent=[[1.0, 2.0]] * 101),
        lambda v: v.update(recent={}),
        lambda v: v.update(counters={"messages_sent": "many"}),
        lambda v: v.update(counters=[]),
        lambda v: v.update(neighbours={"../x": 1}),
        lambda v: v.update(neighbours={"1": -4}),
        lambda v: v.update(config=None),
    ],
)
def test_facts_that_no_run_writes_are_refused(change: Any) -> None:
    with pytest.raises(ValueError):
        decode(forged(change))


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(save({"a": np.zeros(3)}))
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins.")
    (tmp_path / "whole.safetensors").write_bytes(WHOLE)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "whole.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert read(tmp_path / "whole.safetensors", len(WHOLE)).facts.update == 7
    for name in ("other", "pickle", "link", "folder", "pipe", "missing"):
        with pytest.raises(CheckpointError, match=rf"{name}.safetensors: cannot be used: \S"):
            read(tmp_path / f"{name}.safetensors", 10**6)
    with pytest.raises(CheckpointError, match="at most"):
        read(tmp_path / "whole.safetensors", len(WHOLE) - 1)
    # Of a size that no memory has, without any of it on the disk.
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(CheckpointError, match="at most"):
        read(tmp_path / "huge.safetensors", 10**6)


def test_the_last_ones_are_kept_and_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 1, 2)
    assert folder.newest_first() == [] and ranks_with_checkpoints(tmp_path) == []
    for number in (5, 10, 100, 1000):
        folder.save(TENSORS, update(number), best=number == 10)
    folder.save(TENSORS, update(999, segment=1), best=False)
    names = ["segment-1-update-000000000999.safetensors", "segment-0-update-000000001000.safetensors"]
    assert [path.name for path in folder.newest_first()] == names
    assert sorted(path.name for path in folder.path.iterdir()) == [BEST, *sorted(names)]
    assert read(folder.path / BEST, 10**6).facts.update == 10
    assert ranks_with_checkpoints(tmp_path) == [1]


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 0, 1)
    folder.save(TENSORS, update(1), best=False)
    others = ["segment-0-update-.safetensors", "segment--1-update-5.safetensors", "notes.txt", "segment-0-update-9.pt"]
    for name in others:
        (folder.path / name).write_text("mine")
    (tmp_path / "checkpoints" / "rank-00000x").mkdir()
    folder.save(TENSORS, update(2), best=False)
    assert [path.name for path in folder.newest_first()] == ["segment-0-update-000000000002.safetensors"]
    assert all((folder.path / name).read_text() == "mine" for name in others)
    assert ranks_with_checkpoints(tmp_path) == [0]


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/rank-00003"])
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="link"):
        CheckpointFolder(run, 3, 1)
    assert ranks_with_checkpoints(run) == ([] if name == "checkpoints" else [3])
    # Nor through the name of a file to come.
    folder = CheckpointFolder(tmp_path / "other", 0, 1)
    folder.path.mkdir(parents=True)
    (elsewhere / "precious").write_text("mine")
    for scratch in (f"{BEST}.tmp", BEST):
        (folder.path / scratch).symlink_to(elsewhere / "precious")
    folder.save(TENSORS, update(1), best=True)
    assert (elsewhere / "precious").read_text() == "mine"
    assert read(folder.path / BEST, 10**6).facts.update == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, 0, 1)
    folder.save(TENSORS, update(1), best=True)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        folder.save(TENSORS, update(2), best=True)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_best_one_that_cannot_be_written_costs_no_other(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 0, 3)
    assert folder.best_return(10**6, accept) == -math.inf
    (folder.path / BEST).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        folder.save(TENSORS, dataclasses.replace(update(1), best_return=5.0), best=True)
    assert read(folder.newest_first()[0], 10**6).facts.update == 1
    (folder.path / BEST).rmdir()
    folder.save(TENSORS, dataclasses.replace(update(2), best_return=400.0), best=True)
    assert folder.best_return(10**6, accept) == 400.0

    def foreign(one: checkpoint.Checkpoint) -> None:
        raise CheckpointError(f"{one.path}: of another run")

    assert folder.best_return(10**6, foreign) == -math.inf
    (folder.path / BEST).write_bytes(b"damaged")
    assert folder.best_return(10**6, accept) == -math.inf


def test_who_was_taken_for_dead_leaves_alone_what_is_anothers(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 0, 3)
    folder.path.mkdir(parents=True)
    being_written = folder.path / "segment-1-update-000000000009.safetensors.0123456789ab.tmp"
    being_written.touch()
    folder.save(TENSORS, dataclasses.replace(update(8), best_return=4.0), best=True)
    assert being_written.exists() and folder.best_return(10**6, accept) == -math.inf
    folder.save(TENSORS, dataclasses.replace(update(9, segment=1), best_return=5.0), best=True)
    folder.save(TENSORS, dataclasses.replace(update(10), best_return=4.0), best=True)
    assert not being_written.exists()
    assert folder.best_return(10**6, accept) == 5.0 and len(folder.newest_first()) == 3


def test_what_is_in_the_way_of_tidying_up_costs_no_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 0, 1)
    (folder.path / "old.tmp").mkdir(parents=True)
    folder.save(TENSORS, update(1), best=False)
    assert read(folder.newest_first()[0], 10**6).facts.update == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_synchronise_folders_will_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    files.write_new_file(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_numbers_of_a_run_that_blows_up_can_be_read() -> None:
    """Finite, as in a loss of float32 or a return, but large; else it would refuse its own checkpoints."""
    large = dataclasses.replace(
        FACTS,
        best_return=1e200,
        recent=[[1.0, -1e300]],
        counters={"neighbour_distance": 3.4e42},
        seconds={"forward": math.inf},
    )
    assert repr(decode(encode(TENSORS, large))[0]) == repr(large)


def learner_of(config: LearnerConfig, seed: int = 1) -> tuple[FlatParameters, Learner]:
    flat = FlatParameters(MLPPolicy(4, config.hidden, 2, torch.Generator().manual_seed(seed)))
    return flat, Learner(flat, config, 1e-2)


def checkpointer(
    folder: CheckpointFolder,
    rank: int,
    size: int,
    *,
    synchronous: bool = False,
    learner: tuple[FlatParameters, Learner] | None = None,
) -> Checkpointer:
    """One of a rank without a network, or with that of a learner. Checkpoints are due every 300 s."""
    plain = SimpleNamespace(data=torch.zeros(2), by_name=lambda values: {"w": values}), SimpleNamespace(state={})
    flat, learning = learner or plain
    exchange = SimpleNamespace(
        synchronous=synchronous, counters=SimpleNamespace(), in_neighbours=[], go_on_from=lambda *_: None
    )
    parts: Any = SimpleNamespace(
        flat=flat,
        learner=learning,
        collector=SimpleNamespace(state=dict),
        exchange=exchange,
        board=SimpleNamespace(total_steps=0, go_on_from=lambda *_: None),
        stopwatch=SimpleNamespace(seconds={}),
    )
    return Checkpointer(folder, parts, Identity("0" * 32, 0, rank, size, {}), 300.0)


@pytest.mark.parametrize("synchronous", [False, True])
def test_ranks_write_one_after_the_other_but_those_in_step(synchronous: bool, tmp_path: Path) -> None:
    written: dict[int, list[int]] = {}
    for rank in range(4):
        mine = checkpointer(CheckpointFolder(tmp_path, rank, 50), rank, 4, synchronous=synchronous)
        written[rank] = []
        for now_s in range(0, 1800, 5):
            if mine.due(now_s):
                mine.save(now_s, 0, now_s)
                written[rank].append(now_s)
    # At the start, and then every 300 s.
    first = [300 if synchronous else 75 * rank or 300 for rank in range(4)]
    assert written == {rank: [0, *range(first[rank], 1800, 300)] for rank in range(4)}


def test_a_checkpoint_that_failed_is_tried_again_and_the_best_needs_some_episodes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    mine = checkpointer(CheckpointFolder(run, 0, 50), 0, 1)
    mine.save(1, 0, 10.0)
    assert mine.failing and "make room, or put the folder back" in caplog.text and not mine.due(299.0)
    run.mkdir()
    mine.note_episodes([Episode(0, 7.0, 1)] * (ENOUGH_EPISODES - 1), 20.0)
    assert mine.due(300.0)
    mine.save(2, 0, 300.0)
    folder = CheckpointFolder(run, 0)
    assert not mine.failing and not (folder.path / BEST).exists()
    for number, episode_return in enumerate((7.0, 1.0, 9.0), start=3):
        mine.note_episodes([Episode(0, episode_return, 1)] * 100, 400.0)
        mine.save(number, 0, 400.0)
    assert read(folder.path / BEST, 10**6).facts.update == 5 and folder.best_return(10**6, accept) == 9.0


@pytest.mark.parametrize("choice", LEARNERS, ids=named)
def test_the_optimiser_goes_on_from_a_checkpoint_as_if_nothing_had_been(choice: LearnerConfig, tmp_path: Path) -> None:
    random_numbers = torch.Generator().manual_seed(1)
    before, after = learner_of(choice, seed=1), learner_of(choice, seed=2)

    def step(flat: FlatParameters, learner: Learner, gradient: torch.Tensor) -> None:
        flat.grad.copy_(gradient)
        learner._step(1e-2, measure=False)
        learner.updates += 1

    for _ in range(3):
        step(*before, torch.randn(before[0].size, generator=random_numbers))
    # A state that stays zero is none, or is not the one that `_optimise` works on.
    assert all(values.any() for values in before[1].state.values()), before[1].state.keys()
    folder = CheckpointFolder(tmp_path, 0)
    (tmp_path / "run.json").write_text('{"run_id": "%s"}' % ("0" * 32))
    checkpointer(folder, 0, 1, learner=before).save(before[1].updates, 0, 10.0)
    found = read(folder.newest_first()[0], 10**6)
    resumption = Resumption(found, found, own=False, size_before=1, agent_steps=[0], updates=[3], time_s=10.0)
    checkpointer(folder, 0, 1, learner=after).restore(resumption)
    gradient = torch.randn(before[0].size, generator=random_numbers)
    for flat, learner in (before, after):
        step(flat, learner, gradient)
    tensors = [flat_tensors(*one) | {"updates": torch.tensor(one[1].updates)} for one in (before, after)]
    for name, values in tensors[0].items():
        assert torch.equal(values, tensors[1][name]), name


def held(config: LearnerConfig) -> dict[str, torch.Size]:
    """What a checkpoint holds of the learner, by name."""
    flat, learner = learner_of(config)
    return {
        prefix + name: value.shape
        for prefix, values in flat_tensors(flat, learner).items()
        for name, value in flat.by_name(values).items()
    }


def test_a_setting_that_changes_what_a_checkpoint_holds_is_fixed() -> None:
    """Else a run could be resumed with it, and each of its checkpoints would be refused as if it were damaged."""
    plain = LearnerConfig()
    names = [field.name for field in dataclasses.fields(plain)]
    others = [*LEARNERS, *(with_another(plain, name) for name in names)]
    unfit = [other for other in others if held(other) != held(plain)]
    must_be = {name for other in unfit for name in names if vars(other)[name] != vars(plain)[name]}
    assert "hidden" in must_be
    assert must_be <= set(FIXED), f"add {must_be - set(FIXED)} to FIXED in gala_mpi/storage/resume.py"


@pytest.mark.parametrize("name", FIXED)
def test_a_run_goes_on_with_no_other_value_of_what_is_fixed(name: str) -> None:
    before = TrainConfig()
    section = next(section for section, values in before.as_dict().items() if name in values)
    now = dataclasses.replace(before, **{section: with_another(getattr(before, section), name)})
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: .*, as in the run in runs/it"):
        check_changes(before, now, Path("runs/it"))
    assert check_changes(before, before, Path("runs/it")) == []


def test_a_run_in_whose_place_another_is_leaves_that_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its folder was removed, and given to a new run."""
    mine = checkpointer(CheckpointFolder(tmp_path, 0, 1), 0, 1)
    (tmp_path / "run.json").write_text('{"run_id": "%s"}' % ("1" * 32))
    CheckpointFolder(tmp_path, 0).save(TENSORS, update(1), best=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    mine.save(2, 0, 10.0)
    assert mine.failing and "no checkpoint can be written ([Errno 2] another run has its place" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "run.json").write_text('{"run_id": "%s"}' % ("0" * 32))
    mine.save(3, 0, 400.0)
    assert not mine.failing


def test_a_run_whose_folder_is_gone_gets_no_new_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CheckpointFolder(tmp_path / "gone", 0, 1).save(TENSORS, FACTS, best=False)
    assert not (tmp_path / "gone").exists()


WRITER = """
import sys
from pathlib import Path
import numpy as np
from dataclasses import replace
from gala_mpi.storage.checkpoint import CheckpointFolder, read
from gala_mpi.config import RecordConfig
from gala_mpi.storage.recorder import Recorder
from gala_mpi.storage.run_folder import rank_file
row = {"time_s": 0.0, "agent_steps": 1, "env_index": 0, "episode_return": 1.0, "length": 1}
run, segment = Path(sys.argv[1]), int(sys.argv[2])
facts = replace(read(run / "facts.safetensors", 10**6).facts, segment=segment)
metrics = rank_file(run, 0, segment)
metrics.parent.mkdir(exist_ok=True)
recorder = Recorder(metrics, {"segment": segment}, RecordConfig(), 1)
folder = CheckpointFolder(run, 0, 3)
print("writing", flush=True)
for number in range(1, 1 << 60):
    for _ in range(20):
        recorder.append("episodes", **row, update=number)
    recorder.flush()
    about = replace(facts, update=number)
    folder.save({"big": np.full(50_000, number, np.float32)}, about, best=number % 3 == 0)
    print(number, flush=True)
"""


@pytest.mark.slow
def test_killed_a_hundred_times_at_random_instants_all_files_can_be_read(tmp_path: Path) -> None:
    """What a line on the pipe said was done is there: rows and checkpoint of that number, or of a later one."""
    import h5py

    from gala_mpi.storage.run_folder import rank_file

    program = tmp_path / "writer.py"
    program.write_text(WRITER)
    (tmp_path / "facts.safetensors").write_bytes(WHOLE)
    chance = random.Random(1)
    for segment in range(100):
        process = subprocess.Popen(
            [sys.executable, str(program), str(tmp_path), str(segment)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split("\n")[:-1]
        process.stdout.close()
        process.wait(10)
        done = int(said[-1]) if said else 0
        with h5py.File(rank_file(tmp_path, 0, segment), "r", swmr=True, locking=False) as file:
            rows = file["episodes"][:]
        assert done * 20 <= len(rows) <= (done + 1) * 20 and len(rows) % 20 == 0
        assert rows["update"].tolist() == [1 + index // 20 for index in range(len(rows))]
        folder = CheckpointFolder(tmp_path, 0, 3)
        for path in [*folder.newest_first(), folder.path / BEST]:
            if path.exists():
                found = read(path, 10**6)
                assert (found.tensors["big"] == found.facts.update).all()
        of_segment = [path for path in folder.newest_first() if path.name.startswith(f"segment-{segment}-")]
        if done:
            assert read(of_segment[0], 10**6).facts.update in (done, done + 1)
    # What the killed ones left unfinished does not pile up.
    assert len(list(folder.path.glob("*.tmp"))) <= 2


def test_the_weights_can_be_read_by_safetensors_alone() -> None:
    assert {"parameters.w", "parameters.b"} <= load(WHOLE).keys()
