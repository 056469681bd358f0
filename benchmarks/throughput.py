"""Agent steps a second of Atari training, all cores together, beside stable-baselines3 and the machine's limit.

    pip install -c constraints.txt -e '.[peers]'
    python benchmarks/throughput.py --out throughput.json

For each game, in turn (A B A B): gala-mpi with one rank a core, and stable-baselines3's A2C in one process with all
cores and its own environment, of the same game, with as many simulators in all, the same network (this project's, as
its features extractor), the same rollout length, and RMSprop. Each run's first seconds are left out.

Before each game's runs the limit is measured, on all cores at once: the emulator alone, at random actions, and the peak
of torch's matrix product, in the precision of the run. With them a step takes at least

    1 / (steps a second of the emulator) + (floating-point operations of a step) / (peak)

on a core; a step's operations are those of its forward and backward pass and of its share of the bootstrap value, as
torch counts them. What both would do at the same time is not taken off: one core does one thing at a time.
`--precisions float32 bfloat16` runs both, which is of use where the processor has products of bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
from host import launcher

GAMES = ("ALE/Pong-v5", "ALE/Breakout-v5", "ALE/SpaceInvaders-v5")
ROLLOUT, FRAME_SKIP = 5, 4
# Of a run, at its beginning: workers start, memory and caches fill.
WARM_UP_S = 5.0


def speed(times: list[float], steps: list[int]) -> float:
    """Steps a second after the warm-up; `times` are seconds since the run began."""
    inside = [index for index, seconds in enumerate(times) if seconds > WARM_UP_S]
    first, last = inside[0], inside[-1]
    return (steps[last] - steps[first]) / (times[last] - times[first])


def ours(game: str, precision: str, args: argparse.Namespace) -> float:
    """One run of gala-mpi."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [launcher(), "-n", str(args.ranks), sys.executable, "-m", "gala_mpi", "train", "--env", game]
        command += ["--simulators", str(args.simulators), "--rollout-steps", str(ROLLOUT), "--device", "cpu"]
        command += ["--precision", precision, "--frame-skip", str(FRAME_SKIP), "--total-steps", "1_000_000_000"]
        command += ["--time-limit-s", str(args.seconds), "--record-every", "1", "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=args.seconds + 300)
        total = 0.0
        for rank in range(args.ranks):
            with h5py.File(folder / f"rank-{rank:05d}.h5", "r") as file:
                rows = file["updates"][:]
            total += speed(rows["time_s"].tolist(), rows["agent_steps"].tolist())
        return total


def peers(game: str, args: argparse.Namespace) -> float:
    """One run of stable-baselines3, in a process of its own."""
    command = [sys.executable, __file__, "--peer", game, "--seconds", str(args.seconds)]
    command += ["--simulators", str(args.ranks * args.simulators), "--peer-processes", str(args.peer_processes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=args.seconds + 300)
    return float(done.stdout.splitlines()[-1])


def run_peer(game: str, simulators: int, seconds: float, processes: int) -> float:
    """Train with stable-baselines3's A2C for `seconds`; its speed. `processes`: whether simulators get their own."""
    import ale_py
    import gymnasium
    import torch
    from stable_baselines3 import A2C
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

    from gala_mpi.learning.networks import AtariPolicy

    gymnasium.register_envs(ale_py)
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    class Body(BaseFeaturesExtractor):
        """The body of gala-mpi's policy; stable-baselines3 scales the frames and adds its heads."""

        def __init__(self, space: gymnasium.spaces.Box) -> None:
            super().__init__(space, features_dim=512)
            self.body = AtariPolicy(1, torch.Generator()).body
            # In the memory format that stable-baselines3 works with.
            for parameter in self.body.parameters():
                parameter.data = parameter.data.contiguous()

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            return self.body(observations)

    class Watch(BaseCallback):
        """Notes the steps at the end of each rollout, and ends the run."""

        def __init__(self) -> None:
            super().__init__()
            self.begin, self.times, self.steps = time.perf_counter(), [], []

        def _on_rollout_end(self) -> None:
            self.times.append(time.perf_counter() - self.begin)
            self.steps.append(self.num_timesteps)

        def _on_step(self) -> bool:
            return time.perf_counter() - self.begin < seconds

    env = make_atari_env(
        game,
        n_envs=simulators,
        vec_env_cls=SubprocVecEnv if processes else DummyVecEnv,
        # The wrapper skips frames itself.
        env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0},
        wrapper_kwargs={"frame_skip": FRAME_SKIP},
        vec_env_kwargs={"start_method": "forkserver"} if processes else {},
    )
    model = A2C(
        "CnnPolicy",
        VecFrameStack(env, 4),
        n_steps=ROLLOUT,
        device="cpu",
        policy_kwargs={"features_extractor_class": Body},
    )
    watch = Watch()
    model.learn(2**31 - 1, callback=watch, log_interval=10**9)
    model.env.close()
    return speed(watch.times, watch.steps)


def run_emulator(game: str, simulators: int, seconds: float) -> float:
    """Steps a second of this core's simulators at random actions."""
    import numpy as np

    from gala_mpi.config import EnvironmentConfig
    from gala_mpi.learning.environments import make_simulators

    made = make_simulators(EnvironmentConfig(env=game, simulators=simulators, frame_skip=FRAME_SKIP), 1)
    rng, steps = np.random.default_rng(0), 0
    made.reset(0)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        made.step(rng.integers(made.actions, size=simulators))
        steps += simulators
    return steps / (time.perf_counter() - begin)


def run_product(precision: str, seconds: float) -> float:
    """Floating-point operations a second of torch's matrix product on this core."""
    import torch

    torch.set_num_threads(1)
    side = 1024
    a, b, out = torch.rand(3, side, side).to(getattr(torch, precision))
    torch.mm(a, b, out=out)
    products, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        torch.mm(a, b, out=out)
        products += 1
    return 2 * side**3 * products / (time.perf_counter() - begin)


def operations(game: str) -> float:
    """Floating-point operations of a step in training."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gala_mpi.config import EnvironmentConfig
    from gala_mpi.learning.environments import make_simulators
    from gala_mpi.learning.networks import AtariPolicy

    made = make_simulators(EnvironmentConfig(env=game, simulators=1), 1)
    policy = AtariPolicy(made.actions, torch.Generator())
    frames = torch.zeros(1, *made.observation_shape, dtype=torch.uint8)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        policy(frames)
    with FlopCounterMode(display=False) as both:
        logits, values = policy(frames)
        (logits.sum() + values.sum()).backward()
    return both.get_total_flops() + forward.get_total_flops() / ROLLOUT


def on_all_cores(*worker: str) -> list[float]:
    """What a worker of this program measures on each core, all at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    started = [
        subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, __file__, *worker], stdout=subprocess.PIPE, text=True
        )
        for core in cores
    ]
    found = []
    for process in started:
        said, _ = process.communicate(timeout=300)
        if process.returncode:
            sys.exit(f"{' '.join(worker)} ended with exit code {process.returncode}")
        found.append(float(said.splitlines()[-1]))
    return found


def limit(game: str, args: argparse.Namespace) -> dict[str, Any]:
    """The roofline of this machine for one game."""
    emulator = on_all_cores("--emulator", game, "--simulators", str(args.simulators))
    products = {precision: on_all_cores("--product", precision) for precision in args.precisions}
    work = operations(game)
    steps = {
        precision: sum(1 / (1 / alone + work / peak) for alone, peak in zip(emulator, product, strict=True))
        for precision, product in products.items()
    }
    return {
        "emulator_steps_per_s": emulator,
        "product_flop_per_s": products,
        "flop_per_step": work,
        "steps_per_s": steps,
    }


def measure(game: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one game; prints them."""
    roof = limit(game, args)
    theirs: list[float] = []
    mine: dict[str, list[float]] = {precision: [] for precision in args.precisions}
    for _ in range(args.repeats):
        for precision, speeds in mine.items():
            speeds.append(ours(game, precision, args))
        theirs.append(peers(game, args))
    print(f"{game}: stable-baselines3 {statistics.median(theirs):,.0f} steps/s", flush=True)
    ratios, shares = {}, {}
    for precision, speeds in mine.items():
        highest = roof["steps_per_s"][precision]
        ratio = ratios[precision] = [own / other for own, other in zip(speeds, theirs, strict=True)]
        share = shares[precision] = [own / highest for own in speeds]
        middle = statistics.median(speeds)
        print(
            f"  gala-mpi, {precision}: {middle:,.0f} steps/s ({middle * FRAME_SKIP:,.0f} frames/s), ratio "
            f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}); {statistics.median(share):.2f} of "
            f"the limit, {highest:,.0f} steps/s",
            flush=True,
        )
    speeds_of_all = {**{f"gala-mpi, {name}": speeds for name, speeds in mine.items()}, "stable-baselines3": theirs}
    return {"limit": roof, "steps_per_s": speeds_of_all, "ratio": ratios, "share_of_limit": shares}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=list(GAMES))
    parser.add_argument("--ranks", type=int, default=len(os.sched_getaffinity(0)), help="one a core is the default")
    parser.add_argument("--simulators", type=int, default=16, help="of a rank")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--seconds", type=float, default=40, help="length of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-processes", type=int, choices=(0, 1), default=0, help="1: its simulators get processes")
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    for worker in ("--peer", "--emulator", "--product"):
        parser.add_argument(worker, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        print(run_peer(args.peer, args.simulators, args.seconds, args.peer_processes))
    elif args.emulator:
        print(run_emulator(args.emulator, args.simulators, 5))
    elif args.product:
        print(run_product(args.product, 5))
    else:
        if args.seconds < 2 * WARM_UP_S:
            parser.error(f"--seconds: {args.seconds:g} is too short; at least {2 * WARM_UP_S:g}")
        results = {game: measure(game, args) for game in args.games}
        if args.out:
            settings = {**vars(args), "out": None, "machine": platform.processor() or platform.machine()}
            args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
