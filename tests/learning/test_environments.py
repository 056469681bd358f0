"""Simulators at the edges of episodes, worked out by hand on scripted tasks, and on the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEnv, vector

from gala_mpi.config import ConfigError, EnvironmentConfig
from gala_mpi.learning.environments import Episode, SimulatorError, Simulators, Step, check_environment, make_simulators

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


def test_a_life_that_is_won_ends_nothing() -> None:
    # Three lives, then four, then three again: one is lost, at the third step.
    script = [[(0.0, False, False, 3), (0.0, False, False, 4), (0.0, False, False, 3), (0.0, True, False, 3)]]
    steps = steps_of(Simulators(vector(SAME, script), episodic_life=True, fire_after_life=True), 4)
    assert column(steps, "terminated") == [False, False, True, True]
    assert column(steps, "valid") == [True, True, True, False]


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


class Canned(VectorEnv[Any, Any, Any]):
    """Gives the steps of a list as they are, with whole arrays in `info`, as ALE's vector of simulators does."""

    def __init__(self, mode: AutoresetMode, steps: list[tuple]) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.num_envs = len(steps[0][1])
        self.single_observation_space, self.single_action_space = Box(-1, 1000, (1,)), Discrete(2)
        self._steps = iter(steps)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict]:
        return np.zeros((self.num_envs, 1), np.float32), {"lives": np.full(self.num_envs, 3)}

    def step(self, actions: np.ndarray) -> tuple:
        observations, rewards, terminated, truncated, info = next(self._steps)
        return np.array(observations)[:, None], np.array(rewards), np.array(terminated), np.array(truncated), info


@pytest.mark.parametrize(("ends", "cut"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_row_that_only_resets_counts_for_nothing_whatever_it_holds(ends: bool, cut: bool) -> None:
    simulators = Simulators(
        Canned(
            NEXT,
            [
                ([1, 1], [3.0, 1.0], [True, False], [False, False], {}),
                # The first simulator resets: its reward and its flags are of no game.
                ([0, 2], [100.0, 1.0], [ends, False], [cut, False], {}),
                ([1, 3], [5.0, 1.0], [False, False], [True, False], {}),
            ],
        )
    )
    first, reset, last = steps_of(simulators, 3)
    assert first.episodes == [Episode(0, 3.0, 1)]
    assert reset.valid.tolist() == [False, True]
    assert not reset.terminated.any() and not reset.truncated.any()
    assert reset.final_observations is None and reset.episodes == []
    # One step of reward 5: neither the 100 nor the step of the reset is in it.
    assert last.valid.all() and last.episodes == [Episode(0, 5.0, 1)]
    assert last.final_observations is not None and last.final_observations.tolist() == [[1]]


def test_final_observations_are_those_of_the_truncated_rows_in_order() -> None:
    info = {"final_obs": np.array([[10], [11], [12], [13]], np.float32)}
    flags = [False, True, False, True], [True, True, False, True]
    steps = [([0, 0, 7, 0], [1.0] * 4, flags[1], flags[0], info), ([1] * 4, [1.0] * 4, *flags, info)]
    both, some = steps_of(Simulators(Canned(SAME, steps)), 2)
    # Terminated in all that ended: nothing is left to bootstrap.
    assert both.terminated.tolist() == flags[1] and not both.truncated.any() and both.final_observations is None
    # Rows 1 and 3 terminated; row 0 alone was cut.
    assert some.truncated.tolist() == [True, False, False, False] and some.terminated.tolist() == flags[0]
    assert some.final_observations is not None and some.final_observations.tolist() == [[10]]
    cut = ([0] * 4, [1.0] * 4, [False] * 4, [True, False, False, True], info)
    finals = steps_of(Simulators(Canned(SAME, [cut])), 1)[0].final_observations
    assert finals is not None and finals.tolist() == [[10], [13]]


def test_a_life_can_be_lost_in_the_first_step_of_all() -> None:
    # Both begin with three lives.
    step = ([1, 1], [0.0, 0.0], [False, False], [False, False], {"lives": np.array([2, 3])})
    assert steps_of(Simulators(Canned(SAME, [step]), episodic_life=True), 1)[0].terminated.tolist() == [True, False]


@pytest.mark.parametrize("fire", [False, True])
@MODES
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_learner_sees_the_script_and_nothing_else(mode: AutoresetMode, fire: bool, seed: int) -> None:
    """Any games: the valid rows and the statistics are those of a plain walk through them, in either mode."""
    rng = np.random.default_rng(seed)
    script = []
    for _ in range(rng.integers(1, 4)):
        length, cut = int(rng.integers(1, 6)), bool(rng.integers(2))
        lives = np.sort(rng.integers(1, 4, length))[::-1].tolist()
        ends = [step == length - 1 for step in range(length)]
        script.append(
            [(float(rng.integers(-5, 6)), end and not cut, end and cut, lives[t]) for t, end in enumerate(ends)]
        )

    expected, games = [], []
    for number, game in enumerate(script * 30):
        before, pressed = game[0][3], False
        for t, (reward, terminated, truncated, lives) in enumerate(game):
            lost = lives < before and not (terminated or truncated)
            if not (fire and pressed):
                final = [number % len(script), t + 1] if truncated else None
                expected.append((float(np.sign(reward)), terminated or lost, truncated, final))
            before, pressed = lives, lost
        games.append(Episode(0, sum(step[0] for step in game), len(game)))

    simulators = Simulators(vector(mode, script), clip_rewards=True, episodic_life=True, fire_after_life=fire)
    steps = steps_of(simulators, 30)
    seen = [
        (
            step.rewards.item(),
            step.terminated.item(),
            step.truncated.item(),
            None if step.final_observations is None else step.final_observations[0].tolist(),
        )
        for step in steps
        if step.valid.item()
    ]
    ended = [episode for step in steps for episode in step.episodes]
    assert len(seen) >= 5 and seen == expected[: len(seen)]
    assert ended and ended == games[: len(ended)]


@MODES
def test_a_new_start_forgets_the_games_before_it(mode: AutoresetMode) -> None:
    # One life is lost at the second step, the game ends at the third.
    script = [[(1.0, False, False, 2), (2.0, False, False, 1), (4.0, True, False, 1)]]
    for played in (1, 2, 3):
        simulators = Simulators(vector(mode, script), episodic_life=True, fire_after_life=True)
        steps_of(simulators, played)
        first, second, third = steps_of(simulators, 3)
        # Neither a reset nor FIRE is still due, no life was lost at the start, and the sums begin at nothing.
        assert first.valid.all() and second.valid.all()
        assert [step.terminated.item() for step in (first, second, third)] == [False, True, True]
        assert third.episodes == [Episode(0, 7.0, 3)]


def test_breakout_ends_a_return_at_each_life_and_an_episode_at_each_game(monkeypatch: pytest.MonkeyPatch) -> None:
    simulators = make_simulators(EnvironmentConfig(env="ALE/Breakout-v5", simulators=4), threads=1)
    rng = np.random.default_rng(0)
    # What the emulator itself says of games and points, before anything is made of it.
    emulate, totals, games = simulators.env.step, np.zeros(4), []

    def watched(actions: np.ndarray) -> tuple:
        result = emulate(actions)
        totals[:] += result[1]
        for row in np.flatnonzero(result[2] | result[3]):
            games.append((row, totals[row]))
            totals[row] = 0
        return result

    monkeypatch.setattr(simulators.env, "step", watched)
    recorded = []
    simulators.reset(seed=3)
    lost = episodes = invalid = 0
    for _ in range(1500):
        step = simulators.step(rng.integers(0, simulators.actions, 4))
        assert step.observations.shape == (4, 4, 84, 84) and step.observations.dtype == np.uint8
        assert set(step.rewards.tolist()) <= {0.0, 1.0}
        lost += int(step.terminated.sum())
        invalid += int((~step.valid).sum())
        episodes += len(step.episodes)
        recorded += [(episode.env_index, episode.episode_return) for episode in step.episodes]
        for episode in step.episodes:
            assert episode.episode_return == int(episode.episode_return) >= 0 and episode.length > 20
    simulators.close()
    assert recorded == games and sum(points for _, points in games) > 0
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


def test_atari_settings_reach_the_emulator_and_final_frames_are_the_last_ones() -> None:
    """Frame for frame the emulator set up by hand, which resets at the next step and so shows the last frames."""
    from ale_py.vector_env import AtariVectorEnv

    config = EnvironmentConfig(
        env="ALE/Breakout-v5",
        simulators=2,
        frame_skip=3,
        noop_max=5,
        sticky_actions=0.25,
        max_frames=100,
        # Else FIRE would take the place of an action here and there.
        episodic_life=False,
    )
    by_hand = AtariVectorEnv(
        "breakout",
        2,
        num_threads=1,
        frameskip=3,
        noop_max=5,
        repeat_action_probability=0.25,
        max_num_frames_per_episode=100,
        autoreset_mode=NEXT,
        episodic_life=False,
        reward_clipping=False,
        use_fire_reset=True,
    )
    simulators = make_simulators(config, threads=1)
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(simulators.reset(seed=7), by_hand.reset(seed=7)[0])
    cut = np.zeros(2, np.bool_)
    while not cut.all():
        actions = rng.integers(0, 4, 2)
        step, shown = simulators.step(actions), by_hand.step(actions)
        playing = np.flatnonzero(~cut)
        np.testing.assert_array_equal(step.truncated[playing], shown[3][playing])
        for row in playing:
            if step.truncated[row]:
                assert step.final_observations is not None
                final = step.final_observations[np.flatnonzero(step.truncated).tolist().index(row)]
                np.testing.assert_array_equal(final, shown[0][row])
            else:
                np.testing.assert_array_equal(step.observations[row], shown[0][row])
        cut |= step.truncated
    simulators.close()
    by_hand.close()


@pytest.mark.parametrize("clip", [True, False])
def test_a_game_without_fire_plays_on_after_a_lost_life(clip: bool) -> None:
    config = EnvironmentConfig(env="ALE/MsPacman-v5", simulators=4, clip_rewards=clip, max_frames=1600)
    simulators = make_simulators(config, threads=1)
    rng = np.random.default_rng(2)
    simulators.reset(seed=1)
    # Long enough for every game to be over, or cut after 400 steps.
    steps = [simulators.step(rng.integers(0, simulators.actions, 4)) for _ in range(400)]
    simulators.close()
    ended = [episode for step in steps for episode in step.episodes]
    lost = sum(int(step.terminated.sum()) for step in steps) - sum(
        int(step.terminated[episode.env_index]) for step in steps for episode in step.episodes
    )
    # Action 1 is UP here: nothing is pressed, and so nothing is withheld from the learner.
    assert lost > 0 and all(step.valid.all() for step in steps)
    # Pills are worth 10 points each, the learner's rewards their signs.
    assert len(ended) >= 4 and all(episode.episode_return % 10 == 0 and episode.episode_return > 0 for episode in ended)
    assert max(step.rewards.max() for step in steps) == (1 if clip else pytest.approx(50, abs=40))


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


class Task(gymnasium.Env[np.ndarray, np.int64]):
    """Nothing but its spaces."""

    def __init__(self, shape: tuple[int, ...], start: int) -> None:
        self.observation_space, self.action_space = Box(0, 1, shape), Discrete(2, start=start)


@pytest.fixture
def tasks() -> Iterator[None]:
    """Two ids that are known, with spaces that cannot be served."""
    gymnasium.register("FromOne-v0", lambda: Task((3,), 1))
    gymnasium.register("Picture-v0", lambda: Task((8, 8), 0))
    yield
    del gymnasium.registry["FromOne-v0"], gymnasium.registry["Picture-v0"]


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("NoSuchTask-v1", "Gymnasium id"),
        ("no such task", "Gymnasium id"),
        ("ALE/NoSuchGame-v5", "known game"),
        ("ALE/Pong-ram-v5", "known game"),
        ("FromOne-v0", "Discrete actions from 0"),
        ("Picture-v0", "flat Box observations"),
        ("Pendulum-v1", "Discrete actions"),
        ("FrozenLake-v1", "flat Box observations"),
    ],
)
def test_tasks_that_cannot_be_served_are_refused_by_name(env: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make_simulators(EnvironmentConfig(env=env, simulators=2), threads=1)
    assert f"--env: {env!r}" in str(refusal.value) and expected in str(refusal.value)


def test_unknown_tasks_are_refused_before_one_is_made() -> None:
    for env in ("NoSuchTask-v1", "ALE/NoSuchGame-v5"):
        with pytest.raises(ConfigError, match=f"--env: '{env}'"):
            check_environment(env)


def test_known_tasks_pass_the_check() -> None:
    for env in ("CartPole-v1", "ALE/Breakout-v5"):
        check_environment(env)


@pytest.mark.parametrize("name", ["observations", "rewards", "rewards beyond float32", "final observations", "reset"])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_values_that_are_not_finite_are_refused_by_name(mode: AutoresetMode, name: str) -> None:
    env = vector(mode, LIVES, TRUNCATES)
    simulators = Simulators(env)
    reset, step = env.reset, env.step

    def broken_reset(**options: Any) -> Any:
        observations, info = reset(**options)
        if name == "reset":
            observations[1] = np.nan
        return observations, info

    def broken_step(actions: Any) -> Any:
        observations, rewards, terminated, truncated, info = step(actions)
        if name == "observations":
            observations[1, 0] = np.inf
        elif name.startswith("rewards"):
            rewards[1] = -np.inf if name == "rewards" else 1e39
        elif name == "final observations" and truncated[1]:
            (observations if mode == AutoresetMode.NEXT_STEP else info["final_obs"][1])[...] = np.nan
        return observations, rewards, terminated, truncated, info

    env.reset, env.step = broken_reset, broken_step  # type: ignore[method-assign]
    with pytest.raises(SimulatorError, match=r"simulator \d of this rank gave .* not finite"):
        simulators.reset(1)
        for _ in range(20):
            simulators.step(np.zeros(2, np.int64))
