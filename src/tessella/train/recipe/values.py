"""The values of a recipe's fields: their bounds, their types by the field's hint, and their form in TOML."""

import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from tessella.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """low <= value <= high, or low < value when above is set."""

    low: float
    high: float = float("inf")
    above: bool = False

    def check(self, name: str, value: float | None) -> None:
        """Raise ConfigError when value (not None) lies outside."""
        if value is None or ((self.low < value if self.above else self.low <= value) and value <= self.high):
            return
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        high = f", and at most {self.high:g}" if self.high != float("inf") else ""
        raise ConfigError(f"{name} is {value}, must be {low}{high}")


WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path", types.NoneType: "left out"}


def alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def from_toml(value: Any, hint: Any) -> Any:
    """TOML's own types -> the field's: list -> tuple, str -> Path, int -> float. What does not fit is left for the type check."""
    kinds = alternatives(hint)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, list | tuple) and get_origin(hint) is tuple:
        return tuple(from_toml(item, get_args(hint)[0]) for item in value)
    return value


def check_type(name: str, value: Any, hint: Any) -> None:
    if not any(_is(value, kind) for kind in alternatives(hint)):
        raise ConfigError(f"{name} is {value!r}, must be {_name(hint)}")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind) and isinstance(value, str)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        fits = inner[-1] is Ellipsis or (isinstance(value, tuple) and len(value) == len(inner))
        return isinstance(value, tuple) and fits and all(_is(item, inner[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # a NaN is no number to run with
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"a list of {_name(inner[0])}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {_name(inner[0])}s"
    return " or ".join(WORDS[kind] if kind in WORDS else _name(kind) for kind in alternatives(hint))


def plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML takes JSON's escapes; DEL must be one
    return repr(value)
