"""The configuration of a training run: frozen dataclasses, checked once where they are made.

The command line, the presets and the run's own record are all this one structure. A value that is not
allowed raises ConfigError, whose text is the one line a user sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from gala_mpi.exit_codes import EXIT_CONFIG

# Of a TOML file: a long one could be slow to read.
CONFIG_BYTES = 2**14


class UsageError(Exception):
    """What the user asked for cannot be done; the text is the one line that says why."""

    exit_code = EXIT_CONFIG


class ConfigError(UsageError):
    """A setting that cannot be used: names the field, the value and what is allowed.

    A name in capitals is that of an argument that has no option.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        option = name if name.isupper() else f"--{name.replace('_', '-')}"
        super().__init__(f"{option}: {value!r} cannot be used; expected {allowed}")


@contextlib.contextmanager
def reaching(name: str, value: object) -> Iterator[None]:
    """Ask the file system about a path that a user gave: where it does not answer, ConfigError names the setting."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(name, str(value), f"a path that can be reached ({reason})") from error


def at_home(name: str, path: Path) -> Path:
    """The path, with the user's home for `~`: a shell leaves it as it is in --out=~/runs. Raises ConfigError."""
    if not str(path).startswith("~"):
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(name, str(path), f"a user whose home is known after ~ ({error})") from error


def _at_least(section: object, lowest: float, *names: str, below: int = 2**63) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not lowest <= value < below:
            power = below.bit_length() - 1
            raise ConfigError(name, value, f"a number of at least {lowest:g}, below 2**{power}")


def _above_zero(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(name, value, "a finite number above 0")


def _fraction(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not 0 <= value <= 1:
            raise ConfigError(name, value, "a number from 0 to 1")


@dataclass(frozen=True)
class EnvironmentConfig:
    """The task and its simulators. The Atari settings act on ids that begin with ALE/ only."""

    env: str = "ALE/Pong-v5"
    """Gymnasium id: an Atari game (ALE/Pong-v5) or any task with a flat Box observation and Discrete
    actions (CartPole-v1); module:Id-v0 imports the module first, which registers it."""
    simulators: int = 16
    """Simulators of each rank."""
    frame_skip: int = 4
    """Atari: emulator frames an agent step lasts."""
    noop_max: int = 30
    """Atari: greatest number of random no-op steps at the start of a game."""
    episodic_life: bool = True
    """Atari: a lost life ends the return that is learned from (the game goes on)."""
    clip_rewards: bool = True
    """Atari: learn from the sign of the reward. Recorded returns are never clipped."""
    sticky_actions: float = 0.0
    """Atari: probability that the emulator repeats the previous action."""
    max_frames: int = 108_000
    """Atari: emulator frames after which a game is truncated."""
    simulator_timeout_s: float = 600.0
    """Seconds that a rollout may take: a simulator that hangs then ends its rank."""

    def __post_init__(self) -> None:
        # The emulators' own spelling: they are imported in any case.
        object.__setattr__(self, "env", self.env.removeprefix("ale_py:"))
        _above_zero(self, "simulator_timeout_s")
        _at_least(self, 1, "simulators", below=2**20)
        _at_least(self, 1, "frame_skip", "max_frames", below=2**31)
        _at_least(self, 0, "noop_max", below=2**31)
        _fraction(self, "sticky_actions")


@dataclass(frozen=True)
class LearnerConfig:
    """Advantage actor-critic with n-step returns and RMSprop."""

    rollout_steps: int = 5
    """Steps of every simulator between two updates (T)."""
    learning_rate: float = 7e-4
    """Learning rate for 16 simulators in all."""
    learning_rate_scaling: Literal["sqrt", "effective", "none"] = "sqrt"
    """sqrt: multiply the learning rate by sqrt(simulators of all ranks / 16); effective: the same with the topology's
    effective neighbours in place of all ranks (`gala-mpi topology` prints them); none: use it as it is. Under gossip
    a scaled rate goes down with the square root of the share of ranks that are neither lost nor done; with effective,
    only once those are fewer than the effective neighbours."""
    learning_rate_warmup: int = 1000
    """Updates in which the learning rate rises to what learning-rate-scaling makes of it; 0: none."""
    learning_rate_decay: Literal["none", "linear"] = "none"
    """linear: fall to zero at the end of the budget."""
    gamma: float = 0.99
    """Discount a step."""
    entropy_weight: float = 0.01
    """Weight of the policy's entropy in the loss."""
    value_weight: float = 0.5
    """Weight of the squared error of the value in the loss."""
    max_grad_norm: float = 0.5
    """Greatest norm of the gradient; longer ones are scaled down to it."""
    rmsprop_alpha: float = 0.99
    """Decay of RMSprop's running mean square."""
    rmsprop_epsilon: float = 1e-5
    """Term that keeps RMSprop's divisor above zero."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which the network below its heads computes; parameters, their gradients and the optimiser are float32.
    bfloat16 is faster on a CPU that multiplies it itself (AMX), much slower on others. On NVIDIA's GPUs convolutions in
    float32 are those of TF32, torch's default."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, for tasks with a flat observation."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "rollout_steps", below=2**20)
        _above_zero(self, "learning_rate", "max_grad_norm", "rmsprop_epsilon")
        _at_least(self, 0, "entropy_weight", "value_weight", "learning_rate_warmup")
        _fraction(self, "gamma", "rmsprop_alpha")
        if not self.hidden or not all(0 < width < 2**20 for width in self.hidden):
            raise ConfigError("hidden", self.hidden, "one or more widths from 1 to 2**20 - 1")


@dataclass(frozen=True)
class ExchangeConfig:
    """How ranks share what they learn."""

    exchange: Literal["gossip", "allreduce", "none"] = "gossip"
    """gossip: average whole policies with neighbours, never waiting; allreduce: average gradients over all
    ranks at every update (synchronous A2C); none: independent agents."""
    topology: str = "auto"
    """Who sends to whom under gossip. auto: a ring of up to 8 ranks; more on one node, or one a node:
    one-peer-exponential; else hierarchical (by node). Or another name that `gala-mpi topology --help` lists, or the
    path of an edge list. `gala-mpi topology` describes and draws each."""
    max_staleness: int | None = None
    """Updates without a message of a neighbour after which a rank waits for it; 0 waits at every update, None never.
    Over a topology that changes from update to update, any neighbour will do."""
    neighbour_timeout_s: float = 60.0
    """Seconds without a message after which a neighbour counts as lost, and the longest that any rank waits
    for another."""
    wire: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the parameters on the way to a neighbour."""
    delivery: Literal["auto", "inline", "background"] = "auto"
    """How messages are sent. inline: by the learner itself, on one node by stores into shared memory; background: by a
    communication thread; auto: inline to neighbours on the same node, background to others."""
    on_divergence: Literal["adopt", "stop"] = "adopt"
    """What a rank does whose parameters are not finite any more (it never sends them). adopt: go on with a
    neighbour's; stop: end its part of the run."""

    def __post_init__(self) -> None:
        if self.topology.startswith("~"):
            object.__setattr__(self, "topology", str(at_home("topology", Path(self.topology))))
        _at_least(self, 0, "max_staleness")
        _above_zero(self, "neighbour_timeout_s")


@dataclass(frozen=True)
class RecordConfig:
    """What a run leaves behind: an HDF5 file and checkpoints of each rank."""

    out: Path | None = None
    """Folder of the run; must not hold a run yet. By default a new folder under runs/."""
    record_every: int = 10
    """Updates between two rows of the tables updates, profile and neighbours."""
    flush_every_s: float = 5.0
    """Seconds between two writes to the file: the most that a killed run loses."""
    sketch_every_s: float = 10.0
    """Seconds between two sketches of the parameters."""
    sketch_dimension: int = 1024
    """Length of a sketch, a power of two; the relative error of a squared distance is sqrt(2 / dimension)."""
    progress_every_s: float = 10.0
    """Seconds between two lines of progress where the output is not a terminal."""
    checkpoint_every_s: float = 300.0
    """Seconds between two checkpoints of a rank: the most training that a killed run loses. One more at each end."""
    keep_checkpoints: int = 3
    """Checkpoints of each rank that are kept: the last ones, and beside them the best by mean return."""

    def __post_init__(self) -> None:
        if self.out is not None:
            object.__setattr__(self, "out", at_home("out", self.out))
        _at_least(self, 1, "record_every", "keep_checkpoints")
        _above_zero(self, "flush_every_s", "sketch_every_s", "progress_every_s", "checkpoint_every_s")
        if not 2 <= self.sketch_dimension <= 2**20 or self.sketch_dimension & (self.sketch_dimension - 1):
            raise ConfigError("sketch_dimension", self.sketch_dimension, "a power of two from 2 to 2**20")


@dataclass(frozen=True)
class RunConfig:
    """Budget, seed and device."""

    preset: str = "gala-atari"
    """Settings to start from: gala-atari, cartpole, or the path of a TOML file of your own."""
    resume: Path | None = None
    """Folder of a run to go on with, by the settings that it had but for those given here. Any number of ranks."""
    total_steps: int = 10_000_000
    """Agent steps of all ranks together (an Atari agent step is frame-skip frames)."""
    budget: Literal["shared", "per-rank"] = "shared"
    """shared: every rank ends when all together have taken total-steps; per-rank: each takes its equal share."""
    time_limit_s: float | None = None
    """Seconds of training, from this start on, after which the run ends even if steps are left."""
    seed: int = 1
    """Seed of the run; with the rank it fixes every random stream."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives. auto: a GPU of this node if there is one; a node's ranks are dealt out over its GPUs."""
    profile: bool = False
    """Print at the end where an update's time goes; on a GPU each part is waited for, which costs speed."""

    def __post_init__(self) -> None:
        if self.resume is not None:
            object.__setattr__(self, "resume", at_home("resume", self.resume))
        _at_least(self, 1, "total_steps")
        _above_zero(self, "time_limit_s")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "an integer from 0 to 2**63 - 1")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that fixes a run."""

    run: RunConfig = field(default_factory=RunConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    record: RecordConfig = field(default_factory=RecordConfig)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The sections as plain JSON values."""
        plain = dataclasses.asdict(self)
        for section, name in (("record", "out"), ("run", "resume")):
            path = plain[section][name]
            plain[section][name] = None if path is None else str(path)
        return plain


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("gala_mpi") / "presets"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(preset: str) -> TrainConfig:
    """The configuration that a preset's name, or the path of a TOML file, stands for."""
    if preset in preset_names():
        text = (resources.files("gala_mpi") / "presets" / f"{preset}.toml").read_text("utf-8")
    else:
        text = _read_preset(preset)
    config = read_config(text, "preset", preset)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, preset=preset))


def _read_preset(preset: str) -> str:
    path = at_home("preset", Path(preset))
    with reaching("preset", preset):
        if path.suffix != ".toml" or not path.is_file():
            raise ConfigError("preset", preset, f"one of {', '.join(preset_names())}, or the path of a .toml file")
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES + 1)
        if len(data) > CONFIG_BYTES:
            raise ValueError(f"it has more than {CONFIG_BYTES:,} bytes")
        return data.decode()
    except (OSError, ValueError) as error:
        raise ConfigError("preset", preset, f"a TOML file that can be read ({error})") from error


def read_config(text: str, option: str, value: str) -> TrainConfig:
    """The configuration in a TOML text that `option` led to with its `value`; ConfigError names these."""

    def refuse(allowed: str) -> ConfigError:
        return ConfigError(option, value, allowed)

    try:
        sections = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"a valid TOML file ({error})") from error
    config = TrainConfig()
    changed = {name: _section(refuse, config, name, values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def _section(refuse: Callable[[str], ConfigError], config: TrainConfig, name: str, values: object) -> Any:
    """The section of `config` with the file's `values`, each checked for its name and type."""
    section = getattr(config, name, None)
    if not dataclasses.is_dataclass(section) or not isinstance(values, dict):
        raise refuse(f"sections named run, environment, learner, exchange or record, not [{name}]")
    hints = get_type_hints(type(section))
    converted = {}
    for key, value in values.items():
        if key not in hints or key in ("preset", "resume", "out"):
            raise refuse(f"only known settings; [{name}] has no {key}")
        converted[key] = _convert(refuse, f"{name}.{key}", value, hints[key])
    return dataclasses.replace(section, **converted)  # type: ignore[type-var]


def _convert(refuse: Callable[[str], ConfigError], key: str, value: object, hint: Any) -> object:
    """A TOML value as the type that the field's annotation asks for."""
    if any(type(number) is int and abs(number) >= 2**63 for number in (value if isinstance(value, list) else [value])):
        raise refuse(f"{key} to have integers of 64 bits at most")
    options = get_args(hint)
    if getattr(hint, "__origin__", None) is Literal:
        if value in options:
            return value
        raise refuse(f"{key} to be one of {', '.join(map(str, options))}, not {value!r}")
    if getattr(hint, "__origin__", None) is tuple:
        if isinstance(value, list) and all(type(number) is int for number in value):
            return tuple(value)
        raise refuse(f"{key} to be a list of integers such as [64, 64], not {value!r}")
    kinds = [option for option in options if isinstance(option, type)] or [hint]
    for kind in kinds:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
    raise refuse(f"{key} to be of type {getattr(hint, '__name__', hint)}, not {value!r}")
