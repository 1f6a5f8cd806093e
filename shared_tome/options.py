"""What one option is: its label, help text and range for people, and the check of a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .methods import AUTO, MAX_LEVEL, METHODS


@dataclass(frozen=True)
class Option:
    """What a person sees of one option, and what values it takes."""

    label: str
    help: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] | None = None
    advanced: bool = False
    parts: tuple[str, ...] = ()  # an option of several numbers shows as one widget each
    new: Any = None  # what a new node or panel begins with, where that is not the default of code and older texts
    brief: str = ""  # one line in the place of `help`, where that is longer
    check: Callable[[Any], Any] | None = None  # of a text: gives it in one form, or raises ValueError

    @property
    def line(self) -> str:
        """The help in one line."""
        return self.brief or self.help.partition("\n")[0]


@dataclass(frozen=True)
class Widget:
    """One control of a user interface.

    default: what a new one shows. missing: what a request or a picture's text means that does not name it; None: the
    same.
    """

    name: str
    default: Any
    option: Option
    missing: Any = None

    @property
    def unnamed(self) -> Any:
        """The value where none is given."""
        return self.default if self.missing is None else self.missing


def widgets_of(fields: Iterable[dataclasses.Field]) -> list[Widget]:
    """The controls of options, in order; one of several parts becomes one control each."""
    found = []
    for field in fields:
        option: Option = field.metadata["option"]
        if not option.parts:
            new = field.default if option.new is None else option.new
            found.append(Widget(field.name, new, option, field.default))
        for part, default in zip(option.parts, field.default if option.parts else (), strict=True):
            one = dataclasses.replace(option, label=f"{option.label} {part}", parts=())
            found.append(Widget(f"{field.name}_{part}", default, one))
    return found


def option(default: Any, label: str, help: str, **kwargs: Any) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(label, help, **kwargs)})


def lines(table: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {getattr(entry, 'summary', entry)}." for name, entry in table.items())


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value in its canonical type. Raises ValueError naming option, value and range."""
    option: Option = field.metadata["option"]
    if option.check is not None:
        return option.check(value)
    if option.choices is not None:
        if field.name == "levels" and isinstance(value, Integral) and not isinstance(value, bool):
            value = str(value)
        if field.name == "levels" and isinstance(value, (tuple, list, set, frozenset)):
            value = ",".join(str(level) for level in value)
        if field.name == "levels" and isinstance(value, str) and value != "auto":
            return _checked_levels(value)
        if value not in option.choices:
            raise ValueError(f"{field.name} must be one of {', '.join(option.choices)}, got {value!r}")
        return value
    if isinstance(field.default, bool):
        if not isinstance(value, (bool, int)) or value not in (False, True):
            raise ValueError(f"{field.name} must be true or false, got {value!r}")
        return bool(value)
    if option.parts:
        if isinstance(value, Real):
            value = (value,) * len(option.parts)
        if not isinstance(value, (tuple, list)) or len(value) != len(option.parts):
            wanted = f"{len(option.parts)} whole numbers in {option.minimum} to {option.maximum}"
            raise ValueError(f"{field.name} must be {wanted}, got {value!r}")
        return tuple(_number(field.name, part, option, int) for part in value)
    return _number(field.name, value, option, type(field.default))


def _number(name: str, value: Any, option: Option, kind: type) -> Any:
    word = "a whole number" if kind is int else "a number"
    wanted = f"{name} must be {word} in {option.minimum} to {option.maximum}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are real, too
        raise ValueError(wanted)
    if not option.minimum <= value <= option.maximum or (kind is int and value != int(value)):  # NaN lies nowhere
        raise ValueError(wanted)
    return kind(value)


def _checked_levels(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) <= MAX_LEVEL for part in parts):
        raise ValueError(f"levels must be auto or numbers from 0 to {MAX_LEVEL} with commas, got {value!r}")
    return ",".join(str(level) for level in sorted({int(part) for part in parts}))


def check_together(config: Any) -> None:
    """Raises ValueError where values of a ToMeConfig, each possible by itself, are not together."""
    for name, otherwise in (("ratio_end", "stay at ratio"), ("whole", "by the ratio"), ("half", "by the ratio")):
        if -1.0 < getattr(config, name) < 0.0:
            raise ValueError(f"{name} must be -1 ({otherwise}) or lie in 0 to 1, got {getattr(config, name)}")
    if config.whole + config.half > 1.0 + 1e-9:
        raise ValueError(
            f"whole and half are shares in 0 to 1 that add up to 1 at most, got whole {config.whole} and half "
            f"{config.half}"
        )
    if config.exact_every == 1:
        raise ValueError("exact_every must be 0 (off) or a whole number in 2 to 16, got 1: each step would be exact")
    if config.start > config.end:
        raise ValueError(f"start must not be after end, got start {config.start} and end {config.end}")
    if config.decided.merged and config.levels != "auto":
        raise ValueError(f"decisions needs levels auto, got levels {config.levels!r}, which are always merged")
    named = config.decided.method
    if named is not None and config.method not in (AUTO, named):
        raise ValueError(f"decisions is of method {named}, got method {config.method!r}; set method to auto")
    for name in ("cross_attention", "mlp"):
        if getattr(config, name) and not config.kind.matches:
            able = ", ".join(key for key, kind in METHODS.items() if kind.matches)
            raise ValueError(f"{name} needs a method that matches tokens ({able}), got method {config.method!r}")
