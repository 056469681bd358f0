"""What `gala-mpi bench` reports: every cost or why it is missing, and ratios that are quotients of what it shows.

How long anything takes is not tested: the machine may be busy.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import Cluster
from conftest import Mpi

from gala_mpi.doctor.placement import cores_of_node

COMMAND = ("-m", "gala_mpi", "bench")
SMALL = ("--parameters", "1000", "20_000", "--repeats", "4")
ALONE = {"memcpy", "average"}
TOGETHER = {"Allreduce", "gloo"}
NAMES = {"memcpy", "average", "pack", "post", "take", "mix", "exchange", "delivery", "Allreduce", "gloo"}
RATIOS = [("post", "memcpy"), ("mix", "average"), ("exchange", "Allreduce"), ("exchange", "gloo")]


def check(report: dict[str, Any], rounds: int = 4) -> dict[str, Any]:
    """Whether the report says everything, and nothing that its own figures contradict; its first size."""
    for size in report["sizes"]:
        costs = size["costs"]
        assert set(costs) == NAMES
        measured = {name for name in NAMES if costs[name]}
        assert set(size["not_measured"]) == NAMES - measured and all(size["not_measured"].values())
        assert 0 < size["rounds"] <= rounds and size["mixed"] == (1 if report["ranks"] > 1 else None)
        for name in measured:
            assert set(costs[name]) == ({"all"} if name in TOGETHER else {"one", "all"})
            for figures in costs[name].values():
                times = figures["times_s"]
                assert len(times) == size["rounds"] and min(times) > 0 and figures["cpu_s"] >= 0
                assert 0 <= figures["preempted"] <= 1
                found = [figures[key] for key in ("quartile_1_s", "median_s", "quartile_3_s")]
                assert found == pytest.approx(np.percentile(times, [25, 50, 75]).tolist())
        assert [(ratio["numerator"], ratio["denominator"]) for ratio in size["ratios"]] == RATIOS
        assert [ratio["bound"] for ratio in size["ratios"]] == [1.3, 1.5, 0.25, None]
        for ratio in size["ratios"]:
            above, below = costs[ratio["numerator"]], costs[ratio["denominator"]]
            for mode in ("one", "all"):
                beside = below.get(mode, below.get("all"))
                if mode in above and beside:
                    assert ratio[mode] == pytest.approx(above[mode]["median_s"] / beside["median_s"])
                else:
                    assert ratio[mode] is None
    first: dict[str, Any] = report["sizes"][0]
    return first


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON on standard output, and nothing beside it."""
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("size", [1, 2, 4])
def test_table_and_json_hold_all_costs(mpi: Mpi, size: int, tmp_path: Path) -> None:
    done = mpi.run(size, *COMMAND, *SMALL, "--json", "costs.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
    report = json.loads((tmp_path / "costs.json").read_text())
    first = check(report)
    assert (report["ranks"], report["nodes"], report["parameters"]) == (size, 1, [1000, 20_000])
    assert [costs["parameters"] for costs in report["sizes"]] == [1000, 20_000]
    measured = {name for name in NAMES if first["costs"][name]}
    assert measured == (ALONE if size == 1 else NAMES - {"pack", "delivery"})
    assert first["message_bytes"] == 4000
    lines = done.stdout.splitlines()
    starts = {name: [line for line in lines if line.strip().startswith(f"{name} ")] for name in measured}
    assert all(len(starts[name]) >= 2 for name in measured), done.stdout
    for above, below in RATIOS:
        assert sum(f"{above} / {below}" in line for line in lines) == 2
    for name in NAMES - measured:
        assert sum(line.startswith("not measured: ") and name in line for line in lines) == 1
    assert any(line.rstrip().endswith("bound") for line in lines)
    crowded = size > cores_of_node()
    assert bool(report["oversubscribed"]) >= crowded
    assert ("OVERSUBSCRIBED" in done.stdout) == bool(report["oversubscribed"])


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_narrow_wire_is_packed_and_halves_the_message(one_mpi: Mpi, wire: str, tmp_path: Path) -> None:
    args = ("--wire", wire, "--no-gloo", "--topology", "complete", "--json", "-")
    report = report_of(one_mpi.run(3, *COMMAND, *SMALL, *args, cwd=tmp_path))
    first = check(report)
    assert first["costs"]["pack"] and first["message_bytes"] == 2000
    assert first["not_measured"]["gloo"] == "--no-gloo"


def test_background_delivery_is_timed_until_arrival(mpi: Mpi, tmp_path: Path) -> None:
    args = ("--delivery", "background", "--no-gloo", "--json", "-")
    first = check(report_of(mpi.run(2, *COMMAND, *SMALL, *args, cwd=tmp_path)))
    assert first["ways"] == [["background"], ["background"]]
    for mode in ("one", "all"):
        post, delivery = (first["costs"][name][mode] for name in ("post", "delivery"))
        assert delivery["median_s"] > post["median_s"]


def test_between_hosts_messages_go_in_the_background(cluster: Cluster, mpi: Mpi, tmp_path: Path) -> None:
    """One host has a rank, and the other two: the rank at work is one whose messages leave its host."""
    spread = cluster.mpi(mpi, ranks_per_host=2)
    args = ("--topology", "ring", "--parameters", "50_000", "--repeats", "3", "--json", "-")
    report = report_of(spread.run(3, *COMMAND, *args))
    first = check(report)
    assert report["nodes"] == 2 and first["ways"] == [["inline"], ["background"], ["background"]]
    delivery = first["costs"]["delivery"]
    # 0.2 MB take 1.6 ms on a link of 1 Gbit/s, whatever else they wait for.
    assert min(min(delivery[mode]["times_s"]) for mode in delivery) > 0.5e-3
    assert first["costs"]["gloo"], first["not_measured"]


@pytest.mark.check
def test_without_gloo_the_rest_is_measured(one_mpi: Mpi, tmp_path: Path) -> None:
    env = {"GLOO_SOCKET_IFNAME": "nosuch0"}
    done = one_mpi.run(2, *COMMAND, *SMALL, "--json", "costs.json", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = check(json.loads((tmp_path / "costs.json").read_text()))
    assert "gloo does not start: " in first["not_measured"]["gloo"]
    assert "not measured: gloo (gloo does not start: " in done.stdout
    assert first["costs"]["Allreduce"]


@pytest.mark.parametrize(
    ("size", "args", "named"),
    [
        *((size, ("--parameters", "1000", "0"), "--parameters") for size in (1, 2, 4)),
        *((size, ("--topology", "moebius"), "--topology") for size in (1, 2, 4)),
        *((size, ("--parameters", "1_000_000_000_000"), "--parameters") for size in (1, 2, 4)),
        (2, ("--parameters",), "--parameters"),
        (2, ("--repeats", "0"), "--repeats"),
        (2, ("--deadline-s", "-1"), "--deadline-s"),
        (2, ("--wire", "float64"), "--wire"),
        (2, ("--delivery", "pigeon"), "--delivery"),
        (2, ("--json", "no/such/folder.json"), "--json"),
        (2, ("--sizes", "3"), "--sizes"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    one_mpi: Mpi, size: int, args: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    done = one_mpi.run(size, *COMMAND, *args, timeout_s=60, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("gala-mpi: error: ")]
    assert done.returncode == 2 and len(said) == 1 and named in said[0], done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_the_deadline_ends_it(mpi: Mpi, tmp_path: Path) -> None:
    done = mpi.run(2, *COMMAND, "--deadline-s", "0.5", timeout_s=60, cwd=tmp_path)
    assert done.returncode != 0 and "not done within 0.5 s (--deadline-s), while " in done.stderr
