"""A task of a user's that does something in the wrong place, as public reports tell: --env tasks:Task-v0.

TASK says where and what: `step:sys.exit`. TASK_RANK names the rank that does it; without it all do. In `step` it is
done once, after 1,000 steps of all simulators of the rank.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
import time

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

WHERE, _, WHAT = os.environ.get("TASK", "").partition(":")
RANKS = [os.environ[name] for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ]
LIBRARY = ctypes.CDLL(None)


def interrupt() -> None:
    raise KeyboardInterrupt


def fail() -> None:
    raise ValueError("the level is missing")


def take_signals_in_c() -> None:
    LIBRARY.signal(signal.SIGTERM, ctypes.c_void_p(1))


def leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(3000,)).start()


def end_in_a_thread() -> None:
    threading.Thread(target=os._exit, args=(0,)).start()
    time.sleep(60)


def set_torch() -> None:
    import torch

    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)


DOES = {
    "argparse": lambda: argparse.ArgumentParser().parse_args(["--lr", "0.1"]),
    "sys.exit": lambda: sys.exit(0),
    "exit": lambda: exit(),
    "os._exit": lambda: os._exit(0),
    "exit in C": lambda: LIBRARY.exit(0),
    "interrupt": interrupt,
    "fail": fail,
    "take signals": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "take signals in C": take_signals_in_c,
    "leave a thread and exit": lambda: (leave_a_thread(), sys.exit()),
    "leave a thread and fail": lambda: (leave_a_thread(), fail()),
    "end in a thread": end_in_a_thread,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "set torch": set_torch,
    "close output": lambda: sys.stdout.close(),
}


def here(where: str) -> None:
    """Do what is to be done, if this is the place."""
    if where == WHERE and os.environ.get("TASK_RANK") in (None, *RANKS):
        DOES[WHAT]()


class Task(gymnasium.Env):
    """Ten steps of reward 1."""

    observation_space, action_space = Box(-1.0, 1e6, (2,)), Discrete(2)
    steps_of_all = 0

    def __init__(self) -> None:
        here("constructor")
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        here("reset")
        self._steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        Task.steps_of_all += 1
        if Task.steps_of_all == 1000:
            here("step")
        return np.array([self._steps, action], np.float32), 1.0, self._steps == 10, False, {}

    def close(self) -> None:
        here("close")


gymnasium.register("Task-v0", Task)
here("module")
