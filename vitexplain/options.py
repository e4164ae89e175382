"""Options of methods and protocols: dataclass fields with help and allowed values, checked, listed, and read from text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from .errors import InputError, unknown_name

T = TypeVar("T", bound="HasOptions")


def option(default: Any, help: str, *, choices: tuple[Any, ...] = (), minimum: float | None = None) -> Any:
    """A dataclass field for an option: default, one line of help, and what values it takes."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True)
class Option:
    """One option: name, default, one line of help, allowed values (empty where any value of the type is)."""

    name: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()

    @property
    def values(self) -> str:
        """The values it takes, as text."""
        if self.choices:
            return " | ".join(map(str, self.choices))
        return "true | false" if isinstance(self.default, bool) else type(self.default).__name__


@dataclass(frozen=True, kw_only=True)
class HasOptions:
    """Base of what has a name and options; refuses values that do not fit."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check(self.name, spec, getattr(self, spec.name))

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The options it has."""
        return tuple(
            Option(spec.name, spec.default, spec.metadata["help"], spec.metadata["choices"])
            for spec in fields(cls)
            if spec.default is not MISSING
        )


def _check(owner: str, spec: Any, value: Any) -> None:
    """Refuse a value of the wrong type, outside the choices, or below the minimum."""
    default, choices, minimum = spec.default, spec.metadata["choices"], spec.metadata["minimum"]
    where = f"option {spec.name!r} of {owner}"
    if choices:
        if value not in choices:
            raise InputError(f"{where}: expected one of {', '.join(map(repr, choices))}, received {value!r}")
        return
    kinds = (int, float) if type(default) is float else (type(default),)
    if type(value) not in kinds:
        raise InputError(f"{where}: expected {type(default).__name__}, received {value!r}")
    if minimum is not None and not value >= minimum:
        raise InputError(f"{where}: expected at least {minimum}, received {value!r}")


def checked_count(name: str, value: Any, least: int, unit: str = "") -> int:
    """A whole number of what ``unit`` names.

    Raises:
        InputError: it is none, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        several = f"{unit}es" if unit.endswith("s") else unit and f"{unit}s"
        raise InputError(f"{name}: expected {f'{least} or more {several}'.strip()}, received {value!r}")
    return value


# -- from text -----------------------------------------------------------------------------------------------------------


def from_text(text: str, lookup: Callable[[str], type[T]]) -> T:
    """What ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE`` asks for.

    Raises:
        UnknownNameError: nothing has that name, or it has no such option.
        InputError: another form, or a value that does not fit.
    """
    name, colon, rest = text.partition(":")
    kind = lookup(name.strip())
    values: dict[str, Any] = {}
    for pair in rest.split(",") if colon else ():
        key, value = split_pair(pair)
        if key in values:
            raise InputError(f"option {key!r} of {kind.name}: expected once, received twice in {text!r}")
        values[key] = _value(key, value, kind)
    return kind(**values)


def split_pair(pair: str) -> tuple[str, str]:
    """Name and value of ``NAME=VALUE``."""
    name, equals, value = (part.strip() for part in pair.partition("="))
    if not (name and equals and value):
        raise InputError(f"option: expected NAME=VALUE, received {pair!r}")
    return name, value


def _value(name: str, text: str, kind: type[HasOptions]) -> Any:
    """A value in the type of the option of that name; one that is not of its type stays text, to be refused.

    Raises:
        UnknownNameError: there is no such option.
    """
    known = {each.name: each.default for each in kind.options()}
    if name not in known:
        raise unknown_name(f"option of {kind.name}", name, known)
    default = known[name]
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return type(default)(text)
    except ValueError:
        return text
