"""Talk between ranks in which no wait is without a deadline: what a doctor may ask of a job that may be ill."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gala_mpi import output
from gala_mpi.exit_codes import EXIT_ERROR
from gala_mpi.mpi.waiting import wait_until

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

LONGEST_WAIT_S = 20.0
# Rank 0 speaks first; the others only if it cannot.
GRACE_S = 2.0


class Watch:
    """The deadline of the whole command: a thread that ends the process, and says what it was `doing`."""

    def __init__(self, name: str, deadline_s: float, rank: int) -> None:
        self._name, self._allowed_s = name, deadline_s
        self._end = time.monotonic() + deadline_s
        self.doing = "starting MPI"
        self._grace_s = GRACE_S if rank else 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def left_s(self) -> float:
        """Seconds to the deadline."""
        return max(self._end - time.monotonic(), 0.0)

    def patience_s(self) -> float:
        """Seconds to wait for one answer, so that there is time left to say that it did not come."""
        return min(LONGEST_WAIT_S, self.left_s() / 4)

    def _watch(self) -> None:
        time.sleep(self.left_s() + self._grace_s)
        late = f"not done within {self._allowed_s:g} s (--deadline-s), while {self.doing}"
        output.complain(f"{self._name}: error: {late}")
        os._exit(EXIT_ERROR)


class Peers:
    """Messages of Python objects between rank 0 and the others; `silent` are those that did not answer rank 0."""

    def __init__(self, comm: Intracomm, watch: Watch) -> None:
        self.comm, self.watch = comm, watch
        self.silent: set[int] = set()
        self._unsent: list[Request] = []

    def send(self, value: object, target: int, tag: int) -> None:
        """Send; a receiver that does not take it holds nobody up."""
        request = self.comm.isend(value, target, tag)
        if not wait_until(lambda: bool(request.test()[0]), self.watch.patience_s()):
            # Freed by nobody: the buffer must live as long as the request.
            self._unsent.append(request)

    def receive(self, source: int, tag: int, timeout_s: float, spin: bool = False) -> tuple[bool, Any]:
        """Whether a message came in time, and what it holds. `spin`: enter MPI all the time, without a sleep."""
        found: list[Any] = []

        def look() -> bool:
            found[:] = [self.comm.improbe(source, tag)]
            return found[0] is not None

        if not (_spin_until(look, timeout_s) if spin else wait_until(look, timeout_s)):
            return False, None
        return True, found[0].recv()

    def gather(self, value: object, tag: int, timeout_s: float) -> list[Any]:
        """On rank 0 the values of all ranks, None for those that do not answer; elsewhere an empty list."""
        if self.comm.rank:
            self.send(value, 0, tag)
            return []
        values: list[Any] = [value]
        end = time.monotonic() + timeout_s
        for source in range(1, self.comm.size):
            wait_s = 0.0 if source in self.silent else max(end - time.monotonic(), 0.0)
            came, got = self.receive(source, tag, wait_s)
            if not came:
                self.silent.add(source)
            values.append(got)
        return values

    def tell_all(self, value: Any, tag: int) -> Any:
        """What rank 0 gives as `value`, on all ranks. Others wait for it until the end of the watch."""
        if self.comm.rank:
            came, value = self.receive(0, tag, self.watch.left_s() + 2 * GRACE_S)
            if not came:
                raise TimeoutError("rank 0 does not answer")
            return value
        for target in range(1, self.comm.size):
            if target not in self.silent:
                self.send(value, target, tag)
        return value

    def meet(self, timeout_s: float) -> bool:
        """Wait for all ranks; whether they came in time. After a False, no rank may meet again."""
        return wait_until(self.comm.Ibarrier().Test, timeout_s)


def _spin_until(done: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > end:
            return False
        os.sched_yield()
    return True
