"""Consensus of a run: the distance of every rank's parameters to the mean of all ranks, over time.

    python analysis/consensus.py runs/pong

The paper's claim is that agents stay within an epsilon-ball of one another. Distances come from count sketches that
all ranks drew at the same instants; the relative standard error of a squared distance is sqrt(2 / dimension).
Writes consensus.png and consensus.csv to --out (by default the run's folder). Columns of the CSV: instant (number
of the sketch's interval since t0), time_s, ranks (how many drew a sketch in it), rank, update (of that rank),
distance_to_mean, relative_distance (distance_to_mean / mean_norm), mean_norm (of the mean of the ranks).
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
from runs import Run, RunError, given_path, output, plain, read_run, run_script, say

COLUMNS = ["instant", "time_s", "ranks", "rank", "update", "distance_to_mean", "relative_distance", "mean_norm"]


def distances(run: Run) -> pd.DataFrame:
    """One row a rank and instant that at least two ranks have; columns as in the module's docstring."""
    sketches = run.table("sketches")
    interval_s, _ = sketching(run)
    lengths = sorted(set(map(len, sketches["sketch"])))
    if len(lengths) > 1:
        raise RunError(f"{run.folder}: sketches have {' and '.join(map(str, lengths))} numbers; expected one length")
    sketches["instant"] = np.floor(sketches["time_s"] / interval_s).astype(np.int64)
    sketches = sketches.drop_duplicates(["instant", "rank"])
    parts = []
    for _, group in sketches.groupby("instant"):
        if len(group) < 2:
            continue
        drawn = np.stack(group["sketch"].to_list()).astype(float)
        mean = drawn.mean(axis=0)
        part = group[["instant", "time_s", "rank", "update"]].copy()
        part["ranks"] = len(group)
        part["distance_to_mean"] = np.linalg.norm(drawn - mean, axis=1)
        part["mean_norm"] = np.linalg.norm(mean)
        part["relative_distance"] = part["distance_to_mean"] / part["mean_norm"]
        parts.append(part[COLUMNS])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def sketching(run: Run) -> tuple[float, int]:
    """The seconds between two sketches, and the numbers of each."""
    attributes = run.attributes("sketches")
    try:
        interval_s, dimension = float(attributes["interval_s"]), int(attributes["dimension"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.folder}: interval or dimension of sketches is no number ({error})") from error
    if not (0 < interval_s < np.inf and dimension > 0):
        raise RunError(f"{run.folder}: sketches of {dimension} numbers each {interval_s:g} s; expected some above 0")
    return interval_s, dimension


def draw(data: pd.DataFrame, run: Run, path: Path) -> None:
    """Draw every rank's distance, their mean and their greatest."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    # A line through one instant would not show.
    marker = "o" if data["instant"].nunique() == 1 else None
    for _, rows in data.groupby("rank"):
        minutes = rows["time_s"] / 60
        axes.plot(minutes, rows["distance_to_mean"], color="#56b4e9", linewidth=0.6, alpha=0.6, marker=marker)
    if data.empty:
        axes.text(0.5, 0.5, "no two ranks have drawn a sketch yet", transform=axes.transAxes, ha="center")
    else:
        by_instant = data.groupby("instant").agg(
            time_s=("time_s", "mean"), mean=("distance_to_mean", "mean"), greatest=("distance_to_mean", "max")
        )
        for column, color, label in (("greatest", "#d55e00", "greatest"), ("mean", "#0072b2", "mean of ranks")):
            axes.plot(
                by_instant["time_s"] / 60, by_instant[column], color=color, linewidth=1.6, label=label, marker=marker
            )
        axes.legend(frameon=False)
    error = np.sqrt(2 / sketching(run)[1])
    axes.set_title(f"{plain(run.env_id)}, {run.sizes}: consensus distance (squared: standard error {error:.1%})")
    axes.set_xlabel("time (minutes)")
    axes.set_ylabel("distance of parameters to the mean of all ranks")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=given_path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=given_path, help="folder for the results; by default that of the run")
    args = parser.parse_args()
    run = read_run(args.run)
    data = distances(run)
    out = args.out or args.run
    table, picture = output(out, "consensus.csv"), output(out, "consensus.png")
    data.to_csv(table, index=False)
    draw(data, run, picture)
    if data.empty:
        say(f"{run.folder}: no two ranks have drawn a sketch yet")
    else:
        distance = data["distance_to_mean"]
        say(
            f"{run.folder}: {data['instant'].nunique()} instants, {run.sizes}; distance to the mean: median "
            f"{distance.median():.3g}, greatest (epsilon) {distance.max():.3g}, "
            f"{data['relative_distance'].max():.2%} of the mean's norm"
        )
    say(table, picture)


if __name__ == "__main__":
    run_script(main)
