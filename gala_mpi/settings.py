"""What there is to set: every field of a command's options with its values, default and meaning, read from the code.

`--help` and the documentation are both made of it. A field's meaning is the string that follows it in its class.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Wide enough for most names with their values; longer ones have a line of their own.
NAME_WIDTH = 26
WIDEST = 120
HARD_SPACE = "\xa0"
REQUIRED = "required"
VALUES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Setting:
    """A setting as the command line spells it: `values` is what may follow its name, `default` empty if it has none."""

    name: str
    values: str
    default: str
    meaning: str

    @property
    def option(self) -> str:
        """The option with its values."""
        return f"{self.name} {self.values}".rstrip()

    @property
    def required(self) -> bool:
        """Whether the command cannot do without it."""
        return self.default == REQUIRED or not self.name.startswith("-")


@dataclass(frozen=True)
class Section:
    """Settings that belong together."""

    name: str
    meaning: str
    settings: tuple[Setting, ...]


def sections(options: type, default: object | None = None) -> list[Section]:
    """The sections of a command's options, with the defaults of `default` in place of the class's own."""
    if default is None:
        # Not by its constructor, which some fields must be given.
        default = object.__new__(options)
        for field in dataclasses.fields(options):
            object.__setattr__(default, field.name, _default(field))
    nested = [field for field in dataclasses.fields(options) if dataclasses.is_dataclass(getattr(default, field.name))]
    if nested:
        return [_section(field.name, getattr(default, field.name)) for field in nested]
    return [_section("options", default)]


def usage(command: str, found: Sequence[Section]) -> str:
    """How the command is called: with what it needs, then with what it may be given."""
    needed = " ".join(setting.option for section in found for setting in section.settings if setting.required)
    return f"usage: gala-mpi {command} {needed} [OPTIONS]".replace("  ", " ")


def help_text(command: str, description: str, found: Sequence[Section]) -> str:
    """What `gala-mpi COMMAND --help` prints."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    lines = [usage(command, found), "", description]
    for section in found:
        lines += ["", f"{section.name}: {section.meaning}"]
        for setting in section.settings:
            lines += _paragraph(setting, width)
    return "\n".join(lines).replace(HARD_SPACE, " ")


def _paragraph(setting: Setting, width: int) -> Iterator[str]:
    # Not to be broken.
    default = f" (default:{HARD_SPACE}{setting.default})" if setting.default else ""
    if setting.default == REQUIRED:
        default = f" ({REQUIRED})"
    indent = " " * (NAME_WIDTH + 2)
    text = textwrap.wrap(setting.meaning + default, max(width - len(indent), 30), break_on_hyphens=False)
    head = f"  {setting.option}"
    if len(head) < len(indent):
        yield head.ljust(len(indent)) + text[0]
        text = text[1:]
    else:
        yield head
    yield from (indent + line for line in text)


def _section(name: str, values: object) -> Section:
    kind = type(values)
    hints, meanings = get_type_hints(kind, include_extras=True), _meanings(kind)
    found = tuple(
        _setting(field.name, hints[field.name], getattr(values, field.name), meanings[field.name])
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    )
    return Section(name, " ".join((inspect.getdoc(kind) or "").split()), found)


def _setting(name: str, hint: Any, value: object, meaning: str) -> Setting:
    extras = getattr(hint, "__metadata__", ())
    if extras:
        hint = get_args(hint)[0]
    if any("Positional" in repr(extra) for extra in extras):
        return Setting(name.upper(), "..." if get_origin(hint) is tuple else "", "", meaning)
    option = f"--{name.replace('_', '-')}"
    if hint is bool:
        return Setting(f"{option}, --no-{option[2:]}", "", "on" if value else "off", meaning)
    return Setting(option, _values(hint), _as_text(value), meaning)


def _values(hint: Any) -> str:
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, options)) + "}"
    if get_origin(hint) is tuple:
        return f"{_values(options[0])} ..."
    return _values(options[0]) if options else VALUES[hint]


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if value is None or value is REQUIRED:
        return "" if value is None else REQUIRED
    return f"{value:_}" if type(value) is int else str(value)


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _meanings(kind: type) -> dict[str, str]:
    """The string behind each field of a class, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), field.target.id
            found[field.target.id] = " ".join(str(following.value.value).split())
    return found
