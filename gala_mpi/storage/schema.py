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

# Readers refuse another. A new column leaves it; a column that goes, or means something else, raises it.
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
        "one record, every --record-every updates, and at the update after which a rank ends since it diverged",
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

READING = {
    "policy_loss": "near 0, of either sign, and noisy. Bad: its size grows from update to update",
    "value_loss": "falls, and is of the size of the returns' variance. Bad: infinite, or it rises for good",
    "entropy": "begins at the logarithm of the number of actions, and falls slowly. Bad: 0 before the task is solved",
    "grad_norm": "a few times `--max-grad-norm` at most. Bad: far above it for long, 0, or not a number",
    "update_norm": "a small, steady share of the parameters' norm (table `sketches`). Bad: 0, or jumps. NaN alone: not "
    "measured, in the last row of a rank that diverged",
    "explained_variance": "rises towards 1. Bad: 0 to four digits for hundreds of updates: the critic is dead. NaN "
    "alone: as `update_norm`",
    "rollout_s": "grows by the same amount in each update",
    "learn_s": "grows by the same amount in each update",
    "exchange_s": "about a hundredth of `rollout_s` and `learn_s` together. Bad: a tenth and more",
    "wait_s": "0 under gossip without `--max-staleness`. Bad: most of `exchange_s`",
    "messages_sent": "one for each out-neighbour and update",
    "messages_mixed": "nearly as many as the in-neighbours send. Bad: it stands still",
    "messages_dropped": "few among equals, many where a neighbour is faster",
    "messages_rejected": "0. Bad: anything else",
    "divergences": "0. Bad: anything else; the learning rate may be too high",
    "staleness": "0 or 1 in most rows. Bad: it grows without an end",
    "message_age_s": "about the time of an update. Bad: that of many. Slightly below 0 where clocks differ",
    "neighbour_distance": "levels off, far below the parameters' norm. Bad: it grows: the ranks drift apart",
    "episode_return": "rises, with noise",
    "norm": "changes slowly. Bad: jumps",
    "distance": "as `neighbour_distance` of the table `updates`",
    "lost": "False. Bad: True for a rank that still runs",
}
"""What good and bad values of a column look like: of each of `updates`, and of those of other tables to be watched."""
