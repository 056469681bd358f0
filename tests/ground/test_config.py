"""Configuration: what is allowed passes unchanged, what is not is refused by field, value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gala_mpi.config import ConfigError, TrainConfig, UsageError, load_preset, preset_names, read_config
from gala_mpi.gossip.topology import make_topology
from gala_mpi.storage.run_folder import as_toml
from gala_mpi.train import command as train_command


@pytest.mark.parametrize("preset", ["gala-atari", "cartpole"])
def test_presets_load_and_name_themselves(preset: str) -> None:
    assert preset in preset_names()
    assert load_preset(preset).run.preset == preset


def test_the_reference_preset_holds_the_settings_of_the_reference() -> None:
    config = load_preset("gala-atari")
    assert (config.environment.simulators, config.learner.rollout_steps) == (16, 5)
    assert (config.learner.gamma, config.learner.entropy_weight, config.learner.value_weight) == (0.99, 0.01, 0.5)
    assert (config.learner.rmsprop_alpha, config.learner.rmsprop_epsilon) == (0.99, 1e-5)
    assert (config.learner.max_grad_norm, config.learner.learning_rate_decay) == (0.5, "none")
    assert (config.environment.noop_max, config.environment.frame_skip) == (30, 4)
    assert config.environment.episodic_life and config.environment.clip_rewards
    assert config.environment.sticky_actions == 0


@pytest.mark.parametrize(
    ("args", "field", "value"),
    [
        (["--simulators", "0"], "--simulators", "0"),
        (["--total-steps", "-1"], "--total-steps", "-1"),
        (["--gamma", "1.5"], "--gamma", "1.5"),
        (["--learning-rate", "0"], "--learning-rate", "0.0"),
        (["--learning-rate", "nan"], "--learning-rate", "nan"),
        (["--time-limit-s", "inf"], "--time-limit-s", "inf"),
        (["--max-staleness", "-1"], "--max-staleness", "-1"),
        (["--sketch-dimension", "1000"], "--sketch-dimension", "1000"),
        (["--sketch-dimension", "4611686018427387904"], "--sketch-dimension", "from 2 to 2**20"),
        (["--rollout-steps", "9223372036854775807"], "--rollout-steps", "below 2**20"),
        (["--simulators", "2147483647"], "--simulators", "below 2**20"),
        (["--hidden", "2000000000"], "--hidden", "(2000000000,)"),
        (["--max-frames", "4294967296"], "--max-frames", "below 2**31"),
        (["--noop-max", "2147483648"], "--noop-max", "below 2**31"),
        (["--hidden", "64", "0"], "--hidden", "(64, 0)"),
        (["--out", ""], "--out", "''"),
        (["--out="], "--out", "''"),
        (["--env", ""], "--env", "''"),
        (["--resume", ""], "--resume", "''"),
        (["--out", "~nobody-of-this-name/x"], "--out", "'~nobody-of-this-name/x'"),
        (["--resume", "a" * 300], "--resume", "File name too long"),
        (["--preset", "a" * 300 + ".toml"], "--preset", "File name too long"),
        (["--seed", "-3"], "--seed", "-3"),
        (["--preset", "nope"], "--preset", "nope"),
        (["--exchange", "gosip"], "--exchange", "gosip"),
        (["--simulators", "many"], "--simulators", "many"),
        (["--simulatorz", "3"], "--simulatorz", "3"),
        (["--simulators"], "--simulators", ""),
        (["--hidden"], "--hidden", "()"),
        (["--total-steps", "1e6"], "--total-steps", "'1e6' cannot be used; expected an integer such as 1_000_000"),
    ],
)
def test_a_refusal_is_one_line_with_field_and_value(args: list[str], field: str, value: str) -> None:
    with pytest.raises(UsageError) as refusal:
        train_command.parse(args)
    text = str(refusal.value)
    assert "\n" not in text and field in text and value in text


@pytest.mark.parametrize("value", [64, -1, 2**62, 1.5, "x", "", True, [], [1], [1.5], [True], [[1]], {}, {"x": 1}])
def test_no_value_of_a_preset_is_a_surprise(value: object, tmp_path: Path) -> None:
    """Of any type, for every setting: it is taken, or refused in one line."""
    for section, settings in TrainConfig().as_dict().items():
        for name in settings:
            text = json.dumps(value).replace(":", " =")
            try:
                config = read_config(f"[{section}]\n{name} = {text}\n", "preset", "mine.toml")
            except ConfigError as refusal:
                assert "\n" not in str(refusal)
            else:
                assert type(getattr(getattr(config, section), name)) in (type(value), float, tuple)


def test_the_home_of_a_user_is_found_where_a_shell_leaves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In --out=~/x and in a preset it does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    mine = tmp_path / "mine.toml"
    mine.write_text('[exchange]\ntopology = "~/edges.txt"\n')
    config = train_command.parse(["--preset=~/mine.toml", "--out=~/runs/x"])
    assert config.record.out == tmp_path / "runs" / "x" and config.exchange.topology == str(tmp_path / "edges.txt")
    (tmp_path / "edges.txt").write_text("0 1\n1 0\n")
    assert make_topology("~/edges.txt", 2).in_edges == ((1,), (0,))


def test_a_path_stays_one_though_it_is_named_like_a_topology() -> None:
    assert train_command.parse(["--topology", "./ring"]).exchange.topology == "./ring"


def test_ale_s_own_spelling_of_a_game_is_the_game(tmp_path: Path) -> None:
    assert train_command.parse(["--env", "ale_py:ALE/Pong-v5"]).environment.env == "ALE/Pong-v5"
    # No file chooses code by it.
    preset = tmp_path / "preset.toml"
    preset.write_text('[environment]\nenv = "ale_py:ALE/Pong-v5"\n')
    assert train_command.parse(["--preset", str(preset)]).environment.env == "ALE/Pong-v5"


def test_arguments_override_the_preset() -> None:
    config = train_command.parse(
        ["--preset", "cartpole", "--total-steps", "40_000", "--no-clip-rewards", "--hidden", "8"]
    )
    assert config.environment.env == "CartPole-v1"
    assert (config.run.total_steps, config.environment.clip_rewards, config.learner.hidden) == (40_000, False, (8,))


@pytest.mark.parametrize("preset", ["gala-atari", "cartpole"])
def test_the_saved_configuration_is_a_preset_that_gives_the_same_run(preset: str, tmp_path: Path) -> None:
    args = ["--preset", preset, "--seed", "7", "--max-staleness", "3", "--out", "somewhere"]
    config = train_command.parse(args)
    saved = tmp_path / "config.toml"
    saved.write_text(as_toml(config), "utf-8")
    again = load_preset(str(saved))
    expected = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, preset=str(saved)),
        record=dataclasses.replace(config.record, out=None),
    )
    assert again == expected


@pytest.mark.parametrize(
    "text",
    [
        "[environment]\nsimulatorz = 3\n",
        "[elsewhere]\nenv = 'x'\n",
        "[environment]\nsimulators = 'three'\n",
        "[learner]\nlearning_rate_decay = 'cubic'\n",
        "[learner]\nhidden = [64, 'x']\n",
        "[learner]\nhidden = 64\n",
        "environment = 3\n",
        "not toml",
        f"[environment]\nenv = 0x{'f' * 5000}\n",
        f"[run]\ntotal_steps = 0x{'f' * 5000}\n",
        f"[learner]\nhidden = [{2**64}]\n",
        "# long\n" * 3000,
        "[record]\nout = '/anywhere'\n",
    ],
)
def test_a_bad_preset_file_is_refused(text: str, tmp_path: Path) -> None:
    preset = tmp_path / "bad.toml"
    preset.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match="--preset"):
        load_preset(str(preset))


@pytest.mark.parametrize("name", ["\U0001f600", "\x7f", '"', "\\u0041", "\n"])
def test_an_edge_list_may_have_any_name(name: str) -> None:
    config = train_command.parse(["--topology", name])
    assert read_config(as_toml(config), "resume", "run").exchange.topology == name


def test_a_preset_from_elsewhere_chooses_no_module(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text('[environment]\nenv = "evil:Task-v0"\n')
    with pytest.raises(ConfigError, match=r"--preset: .* needs no import, or --env evil:Task-v0 beside it"):
        train_command.parse(["--preset", str(preset)])
    assert train_command.parse(["--preset", str(preset), "--env", "evil:Task-v0"]).environment.env == "evil:Task-v0"


def test_every_setting_is_explained_in_the_help() -> None:
    text = train_command.help_text([])
    for section in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(getattr(TrainConfig(), section.name)):
            assert f"--{field.name.replace('_', '-')}" in text, field.name
