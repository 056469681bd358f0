"""mpirun -n 2 gala-mpi bench: the cost of one exchange on this transport, beside memcpy, MPI's and gloo's all-reduce.

Exit codes: 0 measured, whether or not the bounds hold; 1 an error, or no end within --deadline-s; 2 an option that
cannot be used. What is timed and how it is made comparable: `exchange_cost`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gala_mpi import __version__, arguments, output
from gala_mpi.bench.costs import DELIVERY, GLOO, PACK, Costs
from gala_mpi.config import ConfigError, UsageError, at_home, reaching
from gala_mpi.doctor import libraries, placement
from gala_mpi.doctor.findings import FAIL, OK
from gala_mpi.doctor.peers import Watch
from gala_mpi.exit_codes import EXIT_CONFIG
from gala_mpi.gossip.shared_topology import topology_on_all_ranks
from gala_mpi.gossip.topology import called
from gala_mpi.mpi.collective import on_all_ranks
from gala_mpi.units import in_units

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from gala_mpi.bench.gloo import Gloo
    from gala_mpi.gossip.topology import Topology

BENCH_HELP = "Measure what an exchange costs, beside memcpy and all-reduce: mpirun -n 2 gala-mpi bench"
# When even the thread of the watch cannot run, since a call inside a library holds Python's lock.
LAST_RESORT_S = 5.0
# Of the deadline, shared by all sizes; the rest is for starting and for rounds that are begun.
MEASURE_SHARE = 0.5
LONGEST_START_S = 30.0


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and for how long."""

    parameters: tuple[int, ...] = (100_000, 866_000, 1_680_000)
    """Numbers of parameters. The defaults: a small policy, this project's Atari network, and the published one."""
    repeats: int = 30
    """Rounds of each size; fewer, but three, where they take long beside --deadline-s."""
    wire: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the parameters under way."""
    topology: str = "auto"
    """Any topology that training knows."""
    delivery: Literal["auto", "inline", "background"] = "auto"
    """How messages go out: inline, by a thread in the background, or inline to ranks of the same node only."""
    gloo: bool = True
    """Measure torch.distributed's gloo all-reduce too."""
    json: Path | None = None
    """Also write all figures, with the raw times, to this JSON file; `-`: to standard output, in place of tables."""
    deadline_s: float = 300.0
    """Seconds after which the command ends, done or not."""

    def __post_init__(self) -> None:
        if self.json is not None:
            object.__setattr__(self, "json", at_home("json", self.json))
        if not self.parameters or min(self.parameters) < 1:
            raise ConfigError("parameters", self.parameters, "numbers of at least 1")
        if self.repeats < 1:
            raise ConfigError("repeats", self.repeats, "a number of at least 1")
        # A thread cannot wait for longer than some centuries.
        if not 0 < self.deadline_s <= 1e8:
            raise ConfigError("deadline_s", self.deadline_s, "a number above 0, up to 1e8")


def parse(args: Sequence[str]) -> BenchOptions:
    """The options that `args` describe. Raises UsageError."""
    return arguments.parse(BenchOptions, "bench", BENCH_HELP, list(args))


def help_text(args: Sequence[str]) -> str:
    """What `gala-mpi bench --help` prints."""
    return arguments.help_text(BenchOptions, "bench", BENCH_HELP)


def start_watch(args: Sequence[str]) -> Watch:
    """Start the deadline, before MPI starts: that may hang too. Bad options are told later, on all ranks."""
    deadline_s = BenchOptions.deadline_s
    with contextlib.suppress(UsageError):
        deadline_s = parse(args).deadline_s
    rank = libraries.launch(os.environ).rank or 0
    # The traceback is rank 0's word when its watch cannot speak; the others need none.
    where = output.stderr() if rank == 0 else Path(os.devnull).open("w")  # noqa: SIM115 - open to the process's end
    faulthandler.dump_traceback_later(deadline_s + LAST_RESORT_S, exit=True, file=where)
    return Watch("gala-mpi bench", deadline_s, rank)


def run(args: Sequence[str], comm: Intracomm, watch: Watch) -> int:
    """Measure, and report on rank 0; returns the exit code. Collective."""
    watch.doing = "checking the options"
    launched = libraries.launch(os.environ)
    if comm.size == 1 and launched.size > 1 and launched.rank:
        # A run of its own, though launched with others: the first of them speaks for all.
        return EXIT_CONFIG
    options = on_all_ranks(comm, lambda: _check(args, comm))
    # Only now: torch takes seconds to import, and a bad option should be told at once.
    from gala_mpi.bench import cost_table
    from gala_mpi.bench.gloo import Gloo
    from gala_mpi.doctor.examination import own_facts
    from gala_mpi.mpi.window import node_leaders

    library = own_facts().library
    leaders = node_leaders(comm)
    topology = topology_on_all_ranks(options.topology, comm, [str(leader) for leader in leaders])
    places = _preflight(options, topology, comm, library)
    nodes = len(set(leaders))
    group = None
    if options.gloo and comm.size > 1:
        watch.doing = "starting gloo"
        start_s = min(LONGEST_START_S, watch.left_s() / 4)
        group = Gloo(comm, one_node=nodes == 1, start_s=start_s, call_s=watch.left_s())
    missing = _missing(options, comm.size, group)
    found = [_measure(options, parameters, topology, comm, watch, group) for parameters in options.parameters]
    if group is not None:
        group.free()
    if comm.rank == 0:
        sizes = [cost_table.summary(costs, missing) for costs in found if costs is not None]
        job = _job(options, topology, nodes, places, library)
        _tell(options, job, sizes, cost_table.as_text(job, sizes))
    watch.doing = "ending MPI"
    return 0


def _check(args: Sequence[str], comm: Intracomm) -> BenchOptions:
    """The options, if this many ranks can be measured with them. Raises UsageError."""
    options = parse(args)
    path = options.json
    if comm.rank == 0 and path is not None and path != Path("-"):
        with reaching("json", path):
            writable = not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
        if not writable:
            raise ConfigError("json", str(path), "a file in a folder that can be written, or -")
    return options


def _preflight(options: BenchOptions, topology: Topology, comm: Intracomm, library: str) -> list[placement.Placed]:
    """Where all ranks run. Raises UsageError where windows cannot be had. Collective."""
    from gala_mpi.doctor.preflight import ruinous
    from gala_mpi.gossip.mailbox import lay_out
    from gala_mpi.gossip.mailboxes import gossip_bytes

    largest = 4 * max(options.parameters)
    sources = topology.in_neighbours(comm.rank)
    # Beside gossip a mailbox of its own, into which and from which it copies.
    need = gossip_bytes(largest, len(sources), 0) + lay_out([largest])[1]
    places: list[placement.Placed] = comm.allgather(placement.placed(platform.node(), os.environ))
    sharing = sum(place.node == places[comm.rank].node for place in places)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def fits() -> None:
        # Beside the windows: the parameters, what they are restored from, and the gradient that comes with them.
        if sharing * (need + 3 * largest) > memory:
            allowed = f"what fits into the node's memory of {in_units(memory)}, ten times or more for each rank"
            raise ConfigError("parameters", max(options.parameters), allowed)

    on_all_ranks(comm, fits)
    for finding in ruinous(comm, need, None, library):
        if finding.status == FAIL and finding.check != "cores.binding":
            raise UsageError(f"{finding.message}; fix: {finding.fix}")
    return places


def _missing(options: BenchOptions, size: int, group: Gloo | None) -> dict[str, str]:
    """Why what may be left out is not measured, by name."""
    missing = {PACK: "float32 needs none"} if options.wire == "float32" else {}
    if size > 1:
        missing[DELIVERY] = "all messages go inline: they have arrived when post returns"
        missing[GLOO] = group.failure if group is not None else "--no-gloo"
    return missing


def _measure(
    options: BenchOptions, parameters: int, topology: Topology, comm: Intracomm, watch: Watch, group: Gloo | None
) -> Costs | None:
    """The costs of one size on rank 0, None elsewhere. Collective."""
    from gala_mpi.bench.exchange_cost import Measurement

    watch.doing = f"making the windows for {parameters:,} parameters"
    measurement = Measurement(
        comm,
        parameters,
        wire=options.wire,
        topology=topology,
        delivery=options.delivery,
        gloo=group if group is not None and not group.failure else None,
        watch=watch,
    )
    costs = measurement.run(options.repeats, MEASURE_SHARE * options.deadline_s / len(options.parameters))
    measurement.free()
    return costs


def _job(
    options: BenchOptions, topology: Topology, nodes: int, places: Sequence[placement.Placed], library: str
) -> dict[str, Any]:
    """What all sizes share."""
    chosen = {key: value for key, value in dataclasses.asdict(options).items() if key != "json"}
    chosen["topology"] = called(options.topology, topology)
    bindings = placement.bindings(places, libraries.launch(os.environ), library)
    return {
        "version": __version__,
        "mpi_library": " ".join(library.split("\n", 1)[0].split()),
        "machine": platform.machine(),
        "cores_of_node": places[0].node_cores,
        "load_average": os.getloadavg(),
        "ranks": topology.size,
        "nodes": nodes,
        **chosen,
        "oversubscribed": [finding.message for finding in bindings if finding.status != OK],
    }


def _tell(options: BenchOptions, job: Mapping[str, Any], sizes: Sequence[Mapping[str, Any]], text: str) -> None:
    """Print the tables, and write the JSON where it was asked for."""
    written = json.dumps({**job, "sizes": sizes}, indent=1)
    if options.json == Path("-"):
        output.say(written)
        return
    output.say(text)
    if options.json is not None:
        unfinished = options.json.with_name(f".{options.json.name}.{os.getpid()}")
        with reaching("json", options.json):
            unfinished.write_text(written + "\n", "utf-8")
            unfinished.replace(options.json)
