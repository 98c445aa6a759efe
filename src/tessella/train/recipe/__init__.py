"""A recipe: every choice of a training run, flat and frozen, checked where it is made.

In: a TOML file (flat, one key a field) and what the command line overrides.  Out: Recipe.
Each field is also a flag of `tessella finetune`; its docstring is the flag's help.  Paths are relative to where the command runs.
The fields stand in data.py, ways.py, routing.py and run.py, each with its bounds.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from tessella.errors import ConfigError
from tessella.train.recipe.data import DATA_FREE_ON_RESUME, DATA_RANGES, DataFields
from tessella.train.recipe.routing import ROUTING_RANGES, RoutingFields
from tessella.train.recipe.run import RUN_FREE_ON_RESUME, RUN_RANGES, RunFields
from tessella.train.recipe.values import alternatives, check_type, from_toml, plain, toml
from tessella.train.recipe.ways import WAYS_FREE_ON_RESUME, WAYS_RANGES, WaysFields

RANGES = {**DATA_RANGES, **WAYS_RANGES, **ROUTING_RANGES, **RUN_RANGES}
# May differ between a run and its resumption: where it runs, how it is cut into passes, what is written.
FREE_ON_RESUME = frozenset((*DATA_FREE_ON_RESUME, *WAYS_FREE_ON_RESUME, *RUN_FREE_ON_RESUME))


@dataclass(frozen=True)
class Recipe(RunFields, RoutingFields, WaysFields, DataFields):  # the fields of the last come first
    """What to teach, from what, and how."""

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            value = getattr(self, name)
            check_type(name, value, hint)
            if isinstance(value, int) and float in alternatives(hint):
                object.__setattr__(self, name, float(value))  # 1 and 1.0 are one recipe and have one fingerprint
        for name, bounds in RANGES.items():
            bounds.check(name, getattr(self, name))
        self.check_data()
        self.check_ways(only_decoders=bool(self.decoders))
        self.check_routing()

    def settled(self) -> dict[str, Any]:
        """The fields that must not change on resume, as plain JSON values."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self) if field.name not in FREE_ON_RESUME}

    def fingerprint(self) -> str:
        """Hash of settled(): equal for runs that may go on from each other."""
        return hashlib.sha256(json.dumps(self.settled(), sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

    def changes_from(self, settled: Mapping[str, Any]) -> tuple[str, ...]:
        """What differs from the settled() of an earlier run: "learning_rate was 0.0002, is 0.0001"."""
        mine = self.settled()
        names = sorted(mine.keys() | settled.keys())
        return tuple(f"{n} was {settled.get(n)}, is {mine.get(n)}" for n in names if settled.get(n) != mine.get(n))

    def to_toml(self) -> str:
        """The recipe as TOML that load_recipe reads back to an equal one; fields that are None are left out."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "".join(f"{name} = {toml(value)}\n" for name, value in values if value is not None)


def load_recipe(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from TOML (or the defaults when path is None) and set the overrides, field name -> value.

    Raises ConfigError: no such file, broken TOML (with line), unknown key (with the nearest known one), wrong type, out of range.
    """
    raw = {} if path is None else _read_toml(path)
    where = "overrides" if path is None else str(path)
    hints = _hints()
    for key in (*raw, *(overrides or {})):
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(hints)}"
            raise ConfigError(f'{where}: unknown key "{key}"{hint}')
    values = {**raw, **(overrides or {})}
    return Recipe(**{name: from_toml(value, hints[name]) for name, value in values.items()})


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe; give a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _hints() -> dict[str, Any]:
    return get_type_hints(Recipe)
