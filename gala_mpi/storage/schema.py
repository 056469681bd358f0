"""The tables of a rank's HDF5 file: every column with its type, unit and meaning.

This is the one place where they are documented; the units travel in the file. Times and counts of a row are
those at the moment it was made. Sums run since the rank's start, so that any two rows give the share of a
phase, or the messages, between them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from gala_mpi.stopwatch import PARTS

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    """One column: NumPy type, unit ("1" for a bare number) and meaning."""

    name: str
    type: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """One compound dataset, to which rows are only ever appended."""

    name: str
    row_is: str
    columns: tuple[Column, ...]

    def dtype(self, sketch_dimension: int) -> np.dtype[np.void]:
        """The row's compound type."""
        fields = [(c.name, c.type, (sketch_dimension,) if c.name == "sketch" else ()) for c in self.columns]
        return np.dtype(fields)

    def units(self) -> str:
        """JSON: column -> unit."""
        return json.dumps({column.name: column.unit for column in self.columns})


_WHEN = (
    Column("time_s", "<f8", "s", "since t0, the same instant on all ranks"),
    Column("update", "<i8", "updates", "updates that this rank has done"),
)
_STEPS = Column("agent_steps", "<i8", "steps", "steps of this rank's simulators")

TABLES = (
    Table(
        "updates",
        "one record, every --record-every updates",
        (
            *_WHEN,
            _STEPS,
            Column("policy_loss", "<f4", "1", "policy gradient term of the loss"),
            Column("value_loss", "<f4", "reward^2", "mean squared error of the value"),
            Column("entropy", "<f4", "nat", "mean entropy of the policy"),
            Column("grad_norm", "<f4", "1", "norm of the gradient before clipping"),
            Column("update_norm", "<f4", "1", "norm of the optimiser's change of the parameters at this update"),
            Column("explained_variance", "<f4", "1", "1 - var(returns - values) / var(returns), over the valid rows"),
            Column("rollout_s", "<f8", "s", "sum: collecting rollouts"),
            Column("learn_s", "<f8", "s", "sum: gradient and optimiser, without the exchange"),
            Column("exchange_s", "<f8", "s", "sum: exchange, waits included"),
            Column("wait_s", "<f8", "s", "sum: waiting for other ranks (the whole all-reduce counts)"),
            Column("messages_sent", "<i8", "messages", "sum: posted to out-neighbours"),
            Column("messages_mixed", "<i8", "messages", "sum: averaged into the parameters"),
            Column("messages_dropped", "<i8", "messages", "sum: replaced by a newer one before they were taken"),
            Column("messages_rejected", "<i8", "messages", "sum: not mixed since a value was not finite"),
            Column("divergences", "<i8", "1", "sum: updates after which the parameters were not finite"),
            Column("staleness", "<i8", "updates", "updates since the last mix"),
            Column("message_age_s", "<f8", "s", "age of the oldest message of the last mix, by both ranks' clocks"),
            Column("neighbour_distance", "<f8", "1", "mean norm of parameters - message at the last mix, before it"),
        ),
    ),
    Table(
        "profile",
        "one record, every --record-every updates; on a GPU parts are told apart with --profile only, the loss never",
        (*_WHEN, *(Column(f"{part}_s", "<f8", "s", f"sum: {meaning}") for part, meaning in PARTS.items())),
    ),
    Table(
        "episodes",
        "one finished episode",
        (
            *_WHEN,
            _STEPS,
            Column("env_index", "<i4", "1", "simulator within the rank"),
            Column("episode_return", "<f8", "reward", "sum of the rewards of the whole game, not clipped"),
            Column("length", "<i8", "steps", "agent steps of the whole game"),
        ),
    ),
    Table(
        "sketches",
        "one snapshot of the parameters, at the same instants on all ranks",
        (
            *_WHEN,
            Column("norm", "<f8", "1", "norm of the parameters, exact"),
            Column("sketch", "<f4", "1", "count sketch of the parameters; linear, the hash is the same on all ranks"),
        ),
    ),
    Table(
        "neighbours",
        "one record per in-neighbour, every --record-every updates",
        (
            *_WHEN,
            Column("rank", "<i4", "1", "the in-neighbour"),
            Column("staleness", "<i8", "updates", "updates since one of its messages was mixed"),
            Column("message_age_s", "<f8", "s", "age of its last mixed message, by both ranks' clocks"),
            Column("distance", "<f8", "1", "norm of parameters - message at its last mix, before it"),
            Column("lost", "?", "1", "nothing was heard of it for --neighbour-timeout-s"),
        ),
    ),
)
