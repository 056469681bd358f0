"""Other settings than the defaults, found by themselves: what a test tries with each, it tries with a new one too."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gala_mpi.config import EnvironmentConfig, LearnerConfig, RecordConfig, RunConfig

Section = EnvironmentConfig | LearnerConfig | RecordConfig | RunConfig


def choices(section: type[Any]) -> list[Any]:
    """The defaults of a section, and each other choice that a setting of it offers by name: an optimiser, say."""
    found = [section()]
    for name, kind in get_type_hints(section).items():
        if get_origin(kind) is Literal:
            found += [section(**{name: value}) for value in get_args(kind) if value != getattr(section(), name)]
    return found


def named(section: Section) -> str:
    """What differs from the defaults, as a test's name."""
    plain = dataclasses.asdict(type(section)())
    return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(section).items() if v != plain[k]) or "defaults"


def with_another(section: Section, name: str) -> Any:
    """The section with another value of one setting."""
    value, kind = getattr(section, name), get_type_hints(type(section))[name]
    if get_origin(kind) is Literal:
        other = next(one for one in get_args(kind) if one != value)
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int):
        # A power of two stays one.
        other = 2 * value or 1
    elif isinstance(value, float):
        other = value / 2 or 0.5
    elif isinstance(value, tuple):
        other = value[:1]
    else:
        other = "CartPole-v1"
    return dataclasses.replace(section, **{name: other})


LEARNERS: list[LearnerConfig] = choices(LearnerConfig)
