"""Code of the user's: what it raises is an error of its rank, whatever it is. Nothing in it ends the program by itself.

A simulator's module, constructor, wrapper, reset or step may call sys.exit, as programs with a window do when it is
closed, or argparse, or exit of C. The other ranks would wait for this one, and a batch system would take exit code 0
for a run that is done.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from gala_mpi import _native, output

END_OF_PROCESS = os._exit
"""The real one, for our own watchdogs: a user's code finds another in its place, see `user_code`."""
_inside = False
_watched_process = 0


class SimulatorError(RuntimeError):
    """A simulator gave what nothing can be learned from, or cannot begin. The text says which one, and what."""


class EndedProgramError(SimulatorError):
    """A user's code would have ended the program."""


@contextlib.contextmanager
def user_code(name: Callable[[], str]) -> Iterator[None]:
    """Run a user's code. `name()` is the part of it that runs; it stands beside what is raised.

    What would end the program (SystemExit, KeyboardInterrupt and the like, os._exit) becomes an EndedProgramError. An
    exit within C cannot be undone: the process ends with its stack, and exit code 1. So does one by os._exit(0) in a
    thread of the user's, from here on until `let_go`. Local; the main thread alone calls it. Does not nest.
    """
    global _inside, _watched_process
    os._exit = _end_of_process  # type: ignore[assignment]
    _inside, _watched_process = True, os.getpid()
    _native.guard_exit(True)
    try:
        yield
    except SimulatorError:
        raise
    except Exception as error:
        error.add_note(f"({name()})")
        raise
    except BaseException as error:
        raise EndedProgramError(f"{name()} would have ended the program ({kind_and_text(error)})") from error
    finally:
        _native.guard_exit(False)
        _inside = False


def let_go() -> None:
    """Let the process end as it is told to: all is done. Local."""
    os._exit = END_OF_PROCESS


def _end_of_process(code: int) -> NoReturn:
    """In place of os._exit."""
    # A child of fork ends as it means to.
    if os.getpid() == _watched_process:
        if _inside and threading.current_thread() is threading.main_thread():
            raise SystemExit(code)
        if code == 0:
            output.complain("error: a thread of the user's code has ended the program by os._exit(0); it was here:")
            output.complain("".join(traceback.format_stack()))
            code = 1
    END_OF_PROCESS(code)


def kind_and_text(error: BaseException) -> str:
    """An exception's name and its text, in one line."""
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:
        text = "its text cannot be had"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def summary(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{kind_and_text(error)}{place}"


def tell(error: BaseException, rank: int, size: int) -> None:
    """Print an error of this rank, with its traceback: of a SimulatorError that of the user's code alone, if any."""
    ours = isinstance(error, SimulatorError)
    shown = error.__cause__ if ours else error
    lines = "".join(traceback.format_exception(shown)).splitlines() if shown is not None else []
    for line in [*lines, *([f"{type(error).__name__}: {error}"] if ours else [])]:
        output.complain(f"[{rank}/{size}] {line}")
