"""Reading a command's arguments into its frozen dataclass; what is wrong with them becomes one line."""

from __future__ import annotations

import contextlib
import io
import re
from typing import TypeVar, cast

import tyro

from gala_mpi import settings
from gala_mpi.config import UsageError

T = TypeVar("T")
# What the parser says, and what is said instead.
CLEARER = (
    (
        r"^Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)",
        r"\1: \2 cannot be used; expected an integer such as 1_000_000",
    ),
    (r"^Missing value for argument '(\S+)'\. .*", r"\1: no value is given; expected one"),
)


def parse(options: type[T], command: str, description: str, args: list[str], default: T | None = None) -> T:
    """The `options` that `args` describe, on top of `default`. Raises UsageError, whose text is one line."""
    _refuse_nothing(args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return _tyro(options, command, description, args, default)
    except SystemExit as error:
        lines, found = _lines(said.getvalue()), settings.sections(options)
        line = " ".join(lines)
        # The parser names what it misses, or cannot read, before what it does not know.
        if (unknown := _unknown(args, found)) and "Unrecognized" not in line:
            raise UsageError(f"{' and '.join(unknown)}: no such option (see gala-mpi {command} --help)") from error
        if missing := _missing(lines, found):
            raise UsageError(f"{' and '.join(missing)}: not given; {settings.usage(command, found)}") from error
        for pattern, ours in CLEARER:
            line = re.sub(pattern, ours, line)
        raise UsageError(f"{line} (see gala-mpi {command} --help)") from error


def _refuse_nothing(args: list[str]) -> None:
    """Raise UsageError for an option that is given nothing, by a variable that is not set, say: as a path, a here."""
    for index, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if arg == "" or (arg.startswith("--") and equals and not value):
            name = option or (args[index - 1] if index else "")
            raise UsageError(f"{name}: '' cannot be used; expected a value".lstrip(": "))


def help_text(options: type[T], command: str, description: str, default: T | None = None) -> str:
    """What `gala-mpi COMMAND --help` prints."""
    return settings.help_text(command, description, settings.sections(options, default))


def _tyro(options: type[T], command: str, description: str, args: list[str], default: T | None) -> T:
    made = tyro.cli(
        options,
        prog=f"gala-mpi {command}",
        description=description,
        args=args,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return cast(T, made)


def _missing(lines: list[str], found: list[settings.Section]) -> list[str]:
    """The settings that the parser misses. Each stands at the beginning of a line, before its meaning."""
    if not lines or not lines[0].startswith("Missing from"):
        return []
    first_words = {line.partition(" ")[0] for line in lines}
    needed = [setting.name for section in found for setting in section.settings if setting.required]
    return [name for name in needed if name in first_words]


def _unknown(args: list[str], found: list[settings.Section]) -> list[str]:
    """The options among `args` that there are not."""
    names = {name for section in found for setting in section.settings for name in setting.name.split(", ")}
    given = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    return [name for name in dict.fromkeys(given) if name not in names]


def _lines(box: str) -> list[str]:
    """The message of a parser's error box: the lines between its title and the next rule."""
    lines = [re.sub(r"^[\s│|]+|[\s│|]+$", "", line) for line in box.splitlines()]
    rules = [index for index, line in enumerate(lines) if re.fullmatch(r"[─╭╮╰╯-]{5,}", line)]
    body = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    return [line for line in body if line]
