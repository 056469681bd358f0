"""A small model checker: every state that a protocol can reach, and the shortest way to the first that is wrong."""

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A transition: whose it is (a landing belongs to its origin), what it does, and the state after it."""

    owner: str
    action: str
    state: Any


# A predicate on a state and on the steps enabled in it; false is a violation.
Invariant = Callable[[Any, tuple[Step, ...]], bool]


@dataclass(frozen=True)
class Result:
    """What an exploration found; `trace` is a shortest path from the initial state to the violation."""

    states: int
    violation: str | None = None
    trace: tuple[Step, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.violation or 'no invariant'} violated, {self.states} states seen"]
        for number, (owner, action, state) in enumerate(self.trace, 1):
            lines.append(f"{number:3} {owner:8} {action:40} {state}")
        return "\n".join(lines)


def explore(
    start: Hashable, successors: Callable[[Any], tuple[Step, ...]], invariants: Mapping[str, Invariant]
) -> Result:
    """Visit every reachable state, breadth first, and stop at the first that violates an invariant."""
    came_from: dict[Hashable, tuple[Hashable, Step] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        steps = successors(state)
        for name, holds in invariants.items():
            if not holds(state, steps):
                return Result(len(came_from), name, _trace_to(state, came_from))
        for step in steps:
            if step.state not in came_from:
                came_from[step.state] = (state, step)
                queue.append(step.state)
    return Result(len(came_from))


def _trace_to(state: Hashable, came_from: Mapping[Hashable, tuple[Hashable, Step] | None]) -> tuple[Step, ...]:
    trace: list[Step] = []
    while (link := came_from[state]) is not None:
        state, step = link
        trace.append(step)
    return tuple(reversed(trace))
