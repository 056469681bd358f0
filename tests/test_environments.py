"""Simulators at the edges of episodes, worked out by hand on scripted tasks, and on the real ones."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from scripted import ScriptedEnv, vector

from gala_mpi.config import ConfigError, EnvironmentConfig
from gala_mpi.environments import Episode, Simulators, Step, check_environment, make_simulators

NEXT, SAME = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
MODES = pytest.mark.parametrize("mode", [NEXT, SAME])

# Three steps, then the game is over; two steps, then it is cut short.
TERMINATES = [[(1.0, False, False, 1), (2.0, False, False, 1), (4.0, True, False, 1)]]
TRUNCATES = [[(8.0, False, False, 1), (16.0, False, True, 1)]]
# Three lives: the first is lost at step 2, the next at step 3, the last at step 5, with the game.
LIVES = [
    [
        (5.0, False, False, 3),
        (-7.0, False, False, 2),
        (2.0, False, False, 1),
        (0.0, False, False, 1),
        (3.0, True, False, 0),
    ]
]


def steps_of(simulators: Simulators, count: int, action: int = 0) -> list[Step]:
    simulators.reset(seed=1)
    return [simulators.step(np.full(simulators.count, action, np.int64)) for _ in range(count)]


def column(steps: list[Step], name: str, row: int = 0) -> list:
    return [getattr(step, name)[row].tolist() for step in steps]


def test_rows_that_only_reset_are_invalid_under_next_step_reset() -> None:
    steps = steps_of(Simulators(vector(NEXT, TERMINATES, TRUNCATES)), 8)
    # Three steps and a reset, again and again; two steps and a reset.
    assert column(steps, "valid", 0) == [True, True, True, False, True, True, True, False]
    assert column(steps, "valid", 1) == [True, True, False, True, True, False, True, True]
    assert column(steps, "terminated", 0) == [False, False, True, False, False, False, True, False]
    assert column(steps, "truncated", 1) == [False, True, False, False, True, False, False, True]


def test_every_row_is_valid_under_same_step_reset() -> None:
    steps = steps_of(Simulators(vector(SAME, TERMINATES, TRUNCATES)), 8)
    assert all(step.valid.all() for step in steps)
    assert column(steps, "terminated", 0) == [False, False, True, False, False, True, False, False]
    assert column(steps, "truncated", 1) == [False, True] * 4


@MODES
def test_a_truncated_row_brings_its_final_observation(mode: AutoresetMode) -> None:
    steps = steps_of(Simulators(vector(mode, TERMINATES, TRUNCATES)), 6)
    for step in steps:
        finals = [] if step.final_observations is None else step.final_observations.tolist()
        # The episode's second observation, never the next one's first.
        assert finals == [[0, 2]] * int(step.truncated.sum())
    assert sum(int(step.truncated.sum()) for step in steps) >= 2


@MODES
def test_statistics_are_those_of_whole_games(mode: AutoresetMode) -> None:
    steps = steps_of(Simulators(vector(mode, TERMINATES, TRUNCATES)), 12)
    ended = [episode for step in steps for episode in step.episodes]
    assert {e for e in ended if e.env_index == 0} == {Episode(0, 7.0, 3)}
    assert {e for e in ended if e.env_index == 1} == {Episode(1, 24.0, 2)}
    period = 1 if mode is NEXT else 0
    assert sum(e.env_index == 0 for e in ended) == 12 // (3 + period)
    assert sum(e.env_index == 1 for e in ended) == 12 // (2 + period)


@MODES
def test_termination_wins_over_truncation(mode: AutoresetMode) -> None:
    simulators = Simulators(vector(mode, [[(1.0, True, True, 1)]]))
    step = steps_of(simulators, 1)[0]
    assert step.terminated.tolist() == [True] and step.truncated.tolist() == [False]
    assert step.final_observations is None and step.episodes == [Episode(0, 1.0, 1)]


@MODES
def test_episodic_life_and_clipping_leave_the_recorded_game_whole(mode: AutoresetMode) -> None:
    simulators = Simulators(vector(mode, LIVES), clip_rewards=True, episodic_life=True)
    steps = steps_of(simulators, 5)
    assert column(steps, "rewards") == [1, -1, 1, 0, 1]
    assert column(steps, "terminated") == [False, True, True, False, True]
    assert [step.episodes for step in steps] == [[], [], [], [], [Episode(0, 3.0, 5)]]
    assert all(step.valid.all() for step in steps)
    # The next game begins with all lives: that is no life lost, and neither is the reset.
    following = [simulators.step(np.zeros(1, np.int64)) for _ in range(7)]
    lost = [step.terminated[0] for step in following]
    assert lost == (
        [False, False, True, True, False, True, False]
        if mode is NEXT
        else [False, True, True, False, True, False, True]
    )


def test_without_episodic_life_lost_lives_mean_nothing() -> None:
    steps = steps_of(Simulators(vector(SAME, LIVES)), 5)
    assert column(steps, "terminated") == [False, False, False, False, True]
    assert column(steps, "rewards") == [5, -7, 2, 0, 3]


@MODES
def test_fire_is_pressed_after_a_lost_life_and_its_row_is_not_learned_from(mode: AutoresetMode) -> None:
    env = vector(mode, LIVES)
    simulators = Simulators(env, episodic_life=True, fire_after_life=True)
    steps = steps_of(simulators, 5, action=2)
    task = env.envs[0].unwrapped
    assert isinstance(task, ScriptedEnv)
    # Lives were lost at steps 2 and 3: steps 3 and 4 press FIRE instead of what the policy chose.
    assert task.actions == [2, 2, 1, 1, 2]
    assert column(steps, "valid") == [True, True, False, False, True]
    # A second life lost in the row of FIRE still ends the return.
    assert column(steps, "terminated") == [False, True, True, False, True]
    assert steps[-1].episodes == [Episode(0, 3.0, 5)]


def test_breakout_ends_a_return_at_each_life_and_an_episode_at_each_game() -> None:
    simulators = make_simulators(EnvironmentConfig(env="ALE/Breakout-v5", simulators=4), threads=1)
    rng = np.random.default_rng(0)
    simulators.reset(seed=3)
    lost = episodes = invalid = 0
    for _ in range(1500):
        step = simulators.step(rng.integers(0, simulators.actions, 4))
        assert step.observations.shape == (4, 4, 84, 84) and step.observations.dtype == np.uint8
        assert set(step.rewards.tolist()) <= {0.0, 1.0}
        lost += int(step.terminated.sum())
        invalid += int((~step.valid).sum())
        episodes += len(step.episodes)
        for episode in step.episodes:
            assert episode.episode_return == int(episode.episode_return) >= 0 and episode.length > 20
    simulators.close()
    # Five lives a game: four lost in play, each followed by FIRE, and the last with the game.
    assert episodes >= 4
    assert 5 * episodes <= lost <= 5 * (episodes + 4)
    assert lost - episodes - 4 <= invalid <= lost - episodes


def test_atari_truncates_with_the_final_frames() -> None:
    simulators = make_simulators(EnvironmentConfig(simulators=2, max_frames=120, noop_max=1), threads=1)
    simulators.reset(seed=1)
    cut = 0
    for _ in range(80):
        step = simulators.step(np.zeros(2, np.int64))
        assert not step.terminated.any()
        if step.truncated.any():
            cut += 1
            assert step.final_observations is not None
            assert step.final_observations.shape == (int(step.truncated.sum()), 4, 84, 84)
            # The frames before the cut, not the first ones of the next game.
            rows = np.flatnonzero(step.truncated)
            assert (step.final_observations != step.observations[rows]).any()
    assert cut >= 2
    simulators.close()


@pytest.mark.parametrize("env", ["CartPole-v1", "ALE/Pong-v5"])
def test_the_same_seed_plays_the_same_game(env: str) -> None:
    games = []
    for _ in range(2):
        simulators = make_simulators(EnvironmentConfig(env=env, simulators=2), threads=1)
        rng = np.random.default_rng(5)
        seen = [simulators.reset(seed=11)]
        seen += [simulators.step(rng.integers(0, simulators.actions, 2)).observations.copy() for _ in range(60)]
        games.append(np.stack(seen))
        simulators.close()
    np.testing.assert_array_equal(games[0], games[1])


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("NoSuchTask-v1", "Gymnasium id"),
        ("no such task", "Gymnasium id"),
        ("ALE/NoSuchGame-v5", "known game"),
        ("Pendulum-v1", "Discrete actions"),
        ("FrozenLake-v1", "flat Box observations"),
    ],
)
def test_tasks_that_cannot_be_served_are_refused_by_name(env: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make_simulators(EnvironmentConfig(env=env, simulators=2), threads=1)
    assert f"--env: {env!r}" in str(refusal.value) and expected in str(refusal.value)


def test_known_tasks_pass_the_check() -> None:
    for env in ("CartPole-v1", "ALE/Breakout-v5"):
        check_environment(env)
