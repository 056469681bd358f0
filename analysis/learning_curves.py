"""Learning curves of one or several runs: the mean return of the last episodes over all ranks.

    python analysis/learning_curves.py runs/pong
    python analysis/learning_curves.py runs/gossip runs/allreduce --x time --out figures

Writes learning-curve.png and learning-curve.csv to --out (by default the first run's folder). Columns of the CSV:
run (its folder's name, with those above where two are alike), time_s (since the run's t0), agent_steps (all ranks
together), episodes (finished so far), episode_return (of this one), mean_return (over the last --window of all ranks),
episodes_in_window (fewer at the start). Dotted lines in the drawing mark where a run was resumed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# A notebook may have left one in the environment that is not installed, on which the import of matplotlib fails.
if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from runs import Run, given_path, names, output, plain, read_run, run_script, say

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def total_steps(run: Run, time_s: np.ndarray) -> np.ndarray:
    """Agent steps of all ranks together at the given instants, interpolated between a rank's rows in time."""
    columns = ["rank", "segment", "time_s", "agent_steps"]
    known = pd.concat([run.table("updates")[columns], run.table("episodes")[columns]])
    total = np.zeros(len(time_s))
    # A segment that went on from others has its own ranks, which count from what those had.
    firsts = [run.segments[0], *(segment for segment in run.segments[1:] if segment.resumed is not None)]
    for first, following in zip(firsts, [*firsts[1:], None], strict=True):
        since = first.resumed["time_s"] if first.resumed else 0.0
        until = following.resumed["time_s"] if following and following.resumed else np.inf
        inside = (time_s >= since) & (time_s < until)
        numbers = known["segment"]
        part = known[(numbers >= first.number) & (numbers < (following.number if following else np.inf))]
        for rank in first.files.keys() | set(part["rank"]):
            rows = part[part["rank"] == rank].sort_values(["time_s", "agent_steps"])
            times = np.concatenate([[since], rows["time_s"]])
            steps = np.concatenate([[float(first.begins.get(rank, 0))], rows["agent_steps"]])
            total[inside] += np.interp(time_s[inside], times, steps)
    return total


def curve(run: Run, window: int, name: str = "") -> pd.DataFrame:
    """One row an episode, in the order of their ends over all ranks; columns as in the module's docstring."""
    episodes = run.table("episodes").sort_values("time_s", kind="stable")
    time_s, returns = episodes["time_s"].to_numpy(float), episodes["episode_return"].to_numpy(float)
    rolling = pd.Series(returns).rolling(window, min_periods=1)
    return pd.DataFrame(
        {
            "run": name or run.folder.resolve().name,
            "time_s": time_s,
            "agent_steps": np.round(total_steps(run, time_s)).astype(np.int64),
            "episodes": np.arange(1, len(returns) + 1),
            "episode_return": returns,
            "mean_return": rolling.mean().to_numpy(),
            "episodes_in_window": rolling.count().to_numpy().astype(np.int64),
        }
    )


def seams(run: Run) -> pd.DataFrame:
    """Where the run was resumed: columns time_s and agent_steps, as in `curve`, one row a segment that went on."""
    time_s = np.array([segment.resumed["time_s"] for segment in run.segments if segment.resumed], float)
    return pd.DataFrame({"time_s": time_s, "agent_steps": np.round(total_steps(run, time_s)).astype(np.int64)})


def draw(curves: list[pd.DataFrame], runs: dict[str, Run], x: str, window: int, path: Path) -> None:
    """Draw the curves, with the single episodes behind them."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    for index, (data, (name, run)) in enumerate(zip(curves, runs.items(), strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        along, resumed = (
            table["agent_steps"] / 1e6 if x == "steps" else table["time_s"] / 60 for table in (data, seams(run))
        )
        for number, place in enumerate(resumed):
            axes.axvline(place, color=colour, linewidth=0.8, linestyle=":", label="" if number else "resumed")
        axes.plot(along, data["episode_return"], ".", color=colour, alpha=0.15, markersize=3, markeredgewidth=0)
        axes.plot(along, data["mean_return"], color=colour, linewidth=1.8, label=plain(name))
    axes.set_xlabel("agent steps of all ranks (millions)" if x == "steps" else "time (minutes)")
    first = next(iter(runs.values()))
    axes.set_ylabel(f"episode return ({plain(first.unit('episodes', 'episode_return'))})")
    tasks = ", ".join(sorted({f"{plain(run.env_id)}, {run.sizes}" for run in runs.values()}))
    axes.set_title(f"{tasks}: mean of the last {window} episodes")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if all(data.empty for data in curves):
        axes.text(0.5, 0.5, "no episode has ended yet", transform=axes.transAxes, ha="center")
    else:
        axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=given_path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=given_path, help="folder for the results; by default that of the first run")
    parser.add_argument("--window", type=int, default=100, help="episodes to average over (default 100)")
    parser.add_argument("--x", choices=("steps", "time"), default="steps", help="what to draw against")
    args = parser.parse_args()
    if args.window < 1:
        parser.error(f"--window: {args.window} cannot be used; expected at least 1")
    runs = [read_run(folder) for folder in args.runs]
    named = dict(zip(names(runs), runs, strict=True))
    curves = [curve(run, args.window, name) for name, run in named.items()]
    out = args.out or args.runs[0]
    table, picture = output(out, "learning-curve.csv"), output(out, "learning-curve.png")
    pd.concat(curves).to_csv(table, index=False)
    draw(curves, named, args.x, args.window, picture)
    for data, run in zip(curves, runs, strict=True):
        if data.empty:
            say(f"{run.folder}: no episode has ended yet")
            continue
        last, full = data.iloc[-1], data[data["episodes_in_window"] == min(args.window, len(data))]
        say(
            f"{run.folder}: {len(data)} episodes, {last['agent_steps']:,} agent steps in {last['time_s']:,.0f} s; "
            f"mean return {last['mean_return']:.2f} at the end, {full['mean_return'].max():.2f} at best"
        )
    say(table, picture)


if __name__ == "__main__":
    run_script(main)
