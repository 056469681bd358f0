"""A block of memory on every rank that the others reach by one-sided MPI, without its owner's help.

One `MPI.Win.Allocate`, or `Allocate_shared` inside a node, one `Lock_all(MODE_NOCHECK)` for the window's whole life,
no other lock ever (MPI-4.1, sections 12.5 and 12.7). Control words are touched only through atomics of one kind, by
their owner too: the processor's own where all ranks share the memory, else MPI's. Those are atomic against each other,
never against a load or store of the processor.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from gala_mpi import _native
from gala_mpi.files import first_line
from gala_mpi.mpi.library import family, netmod

PAGE_BYTES = 4096
WORD_BYTES = 8

Bytes = npt.NDArray[np.uint8]
MpiError = MPI.Exception


def node_leaders(comm: MPI.Intracomm) -> list[int]:
    """For each rank the lowest rank with which it shares memory, by the library's own word. Collective."""
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    leader = shared.allreduce(comm.rank, MPI.MIN)
    shared.Free()
    return comm.allgather(leader)


def library_version() -> str:
    """Name and version of the MPI library, in one line."""
    return " ".join(MPI.Get_library_version().strip("\x00 \n").splitlines()[0].split())


def may_call_from_threads() -> bool:
    """Whether the library lets two threads of a rank call it at once."""
    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


def may_hang_on_the_dead() -> bool:
    """Whether the call that starts an operation to a rank that has died may never return.

    MPICH over libfabric tries to connect for ever, with the library locked. Only what was seen not to is taken off:
    Open MPI, and MPICH over UCX.
    """
    version = MPI.Get_library_version()
    return family(version) != "openmpi" and not netmod(version, os.environ).startswith("ucx")


# Of what is done when the call returns.
DONE = MPI.REQUEST_NULL


def why_no_windows(comm: MPI.Intracomm) -> str:
    """Why this library has no windows over `comm` that can be used; empty if it has. Collective."""
    try:
        with Window(comm, WORD_BYTES):
            return ""
    except RuntimeError as error:
        return str(error)


class Window:
    """`nbytes` of page-aligned memory on this rank (ranks may differ), zeroed, open to every rank of `comm`.

    Making and freeing it are collective; all else is local. Making it raises RuntimeError where the library has none of
    the unified memory model. Offsets and sizes are in bytes, from the first
    page of the target's memory. In a window on which a second thread works (see `courier`) operations are started, and
    each is waited for alone. A flush, which may wait for all that the process has started, towards dead ranks too, and
    with the library locked (MPICH over libfabric), is not for it.

    A `shared` window is one over ranks of one node: what a rank writes it stores there itself, and its atomics are the
    processor's. Stores, then Win_sync, then an atomic on one side; the atomic, then Win_sync, then loads on the other:
    so the loads see the stores, by MPI-4.1, section 12.7, and by C11 too, as the atomics are sequentially consistent.
    """

    def __init__(self, comm: MPI.Intracomm, nbytes: int, *, shared: bool = False) -> None:
        info = MPI.Info.Create()
        info.Set("same_disp_unit", "true")
        info.Set("mpi_minimum_memory_alignment", str(PAGE_BYTES))
        # Control words see REPLACE and NO_OP only, which lets a library take its cheaper atomics.
        info.Set("accumulate_ops", "same_op_no_op")
        # In memory that is shared, each rank's part on pages of its own, near its core.
        info.Set("alloc_shared_noncontig", "true")
        # One page more than asked for: the alignment above is a hint that a library may ignore.
        allocate = MPI.Win.Allocate_shared if shared else MPI.Win.Allocate
        try:
            self._win = allocate(nbytes + PAGE_BYTES, 1, info, comm)
        except MpiError as error:
            raise RuntimeError(f"the MPI library cannot make windows ({first_line(error)})") from error
        info.Free()
        if self._win.Get_attr(MPI.WIN_MODEL) != MPI.WIN_UNIFIED:
            self._win.Free()
            raise RuntimeError("the memory model of windows is not MPI_WIN_UNIFIED")
        whole: Bytes = np.asarray(self._win.tomemory(), dtype=np.uint8)
        shift = -whole.ctypes.data % PAGE_BYTES
        # Pages may start at another place on every rank: an origin counts from the target's own shift.
        self._shifts: list[int] = comm.allgather(shift)
        self._memory: Bytes | None = whole[shift : shift + nbytes]
        self._shared: list[Bytes] = []
        if shared:
            parts = [np.asarray(self._win.Shared_query(rank)[0], dtype=np.uint8) for rank in range(comm.size)]
            self._shared = [part[begin:] for part, begin in zip(parts, self._shifts, strict=True)]
        # Scratch of the blocking atomics, which the learner's thread alone calls.
        self._word = np.zeros(1, np.int64)
        self._result = np.zeros(1, np.int64)
        self.rank = comm.rank
        self._memory[:] = 0
        self._win.Lock_all(MPI.MODE_NOCHECK)
        # Win_sync orders the stores above before other ranks' accesses; legal only inside the epoch.
        self._win.Sync()
        comm.Barrier()

    def memory(self, offset: int, nbytes: int) -> Bytes:
        """A view of this rank's own memory."""
        if self._memory is None:
            raise RuntimeError("the window is freed")
        return self._memory[offset : offset + nbytes]

    def shared_memory(self, target: int, offset: int, nbytes: int) -> Bytes | None:
        """A view of the target's memory, to be written before a `flush`; None if the window is not shared."""
        return self._shared[target][offset : offset + nbytes] if self._shared else None

    def put(self, data: npt.NDArray[Any], target: int, offset: int) -> None:
        """Start to write `data` (contiguous) into the target's memory; done after `flush`."""
        if self._shared:
            self._shared[target][offset : offset + data.nbytes] = data.reshape(-1).view(np.uint8)
            return
        place = [self._shifts[target] + offset, data.nbytes, MPI.BYTE]
        self._win.Put([data, data.nbytes, MPI.BYTE], target, place)

    def flush(self, target: int) -> None:
        """Return when all that this rank wrote into the memory of `target` is done there."""
        if self._shared:
            self.sync()
        else:
            self._win.Flush(target)

    def swap(self, target: int, offset: int, value: int) -> int:
        """Atomically write a control word, and return what was there before."""
        if self._shared:
            return _native.swap(self._shared[target][offset : offset + WORD_BYTES], value)
        self._word[0] = value
        return self._fetch_and_op(target, offset, MPI.REPLACE)

    def load(self, target: int, offset: int) -> int:
        """Atomically read a control word."""
        if self._shared:
            return _native.load(self._shared[target][offset : offset + WORD_BYTES])
        return self._fetch_and_op(target, offset, MPI.NO_OP)

    def _fetch_and_op(self, target: int, offset: int, op: MPI.Op) -> int:
        word, result = [self._word, 1, MPI.INT64_T], [self._result, 1, MPI.INT64_T]
        place = self._shifts[target] + offset
        self._win.Fetch_and_op(word, result, target, place, op)
        self._win.Flush(target)
        return int(self._result[0])

    def start_put(self, data: npt.NDArray[Any], target: int, offset: int) -> MPI.Request:
        """Start to write `data` (contiguous) into the target's memory, without ever waiting.

        Once the request is complete `data` may change; it may arrive later.
        """
        if self._shared:
            self.put(data, target, offset)
            return DONE
        place = [self._shifts[target] + offset, data.nbytes, MPI.BYTE]
        return self._win.Rput([data, data.nbytes, MPI.BYTE], target, place)

    def start_read(self, words: npt.NDArray[np.int64], target: int, offset: int) -> MPI.Request:
        """Start to read words of the target's memory, without ever waiting; complete once it has answered."""
        place = [self._shifts[target] + offset, words.nbytes, MPI.BYTE]
        return self._win.Rget([words, words.nbytes, MPI.BYTE], target, place)

    def sync(self) -> None:
        """Order this rank's loads and stores of its own memory against the one-sided accesses around them."""
        self._win.Sync()

    def free(self) -> None:
        """End the access epoch and free the memory. Collective; views of the memory must be gone."""
        if self._memory is not None:
            self._memory, self._shared = None, []
            self._win.Unlock_all()
            self._win.Free()

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other ranks may never come to the collective free: leave it to the abort.
        if error is None:
            self.free()
