"""A task whose every episode is known in advance, as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class ScriptedEnv(gymnasium.Env[np.ndarray, np.int64]):
    """Plays `script` again and again: a list of episodes, each a list of (reward, terminated, truncated, lives).

    The observation is (episode, step): (e, 0) after the reset, (e, t) after step t.
    """

    observation_space = gymnasium.spaces.Box(-1, 1000, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, script: list[list[tuple[float, bool, bool, int]]]) -> None:
        self._script, self._episode, self._step = script, -1, 0
        self.actions: list[int] = []

    def _observation(self) -> np.ndarray:
        return np.array([self._episode, self._step], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._episode, self._step = (self._episode + 1) % len(self._script), 0
        return self._observation(), {"lives": self._script[self._episode][0][3]}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.actions.append(int(action))
        reward, terminated, truncated, lives = self._script[self._episode][self._step]
        self._step += 1
        return self._observation(), reward, terminated, truncated, {"lives": lives}


def vector(mode: AutoresetMode, *scripts: list[list[tuple[float, bool, bool, int]]]) -> SyncVectorEnv:
    """A vector of scripted tasks, one a script."""
    makers = [lambda script=script: ScriptedEnv(script) for script in scripts]
    return SyncVectorEnv(makers, autoreset_mode=mode)
