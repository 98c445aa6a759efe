"""`tessella finetune`: every field of a recipe is a flag, in four groups as the recipe's files have them."""

import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

from tyro.conf import OmitArgPrefixes, Positional, arg

from tessella.commands.place import Result
from tessella.errors import RankError, TessellaError
from tessella.train.launch import LOST_ANOTHER, launch, wanted
from tessella.train.recipe import Recipe
from tessella.train.recipe.data import DataFields
from tessella.train.recipe.routing import RoutingFields
from tessella.train.recipe.run import RunFields
from tessella.train.recipe.ways import WaysFields

Group = TypeVar("Group", DataFields, WaysFields, RunFields, RoutingFields)


@dataclass(frozen=True)
class Finetune:
    recipe_file: Annotated[Positional[Path | None], arg(metavar="[RECIPE]", help="A TOML file; its keys are flags too.")] = None
    data: OmitArgPrefixes[DataFields] = field(default_factory=DataFields)
    """Which model is taught, from what, and what is held out to score on."""
    learning: OmitArgPrefixes[WaysFields] = field(default_factory=WaysFields)
    """Which parts learn, by which method, how fast and how long."""
    running: OmitArgPrefixes[RunFields] = field(default_factory=RunFields)
    """Where it computes, what it writes, when it scores and saves."""
    decoders: OmitArgPrefixes[RoutingFields] = field(default_factory=RoutingFields)
    """Teaching boxes, masks and pictures beside words; leave these out otherwise."""
    json: Path | None = None
    """Write the result there too; docs/json.md lists the keys."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Finetune":
        """With a recipe's values as those of the flags."""
        return cls(
            data=group_of(recipe, DataFields), learning=group_of(recipe, WaysFields), running=group_of(recipe, RunFields),
            decoders=group_of(recipe, RoutingFields),
        )  # fmt: skip

    @cached_property
    def recipe(self) -> Recipe:
        """What all groups say together. Raises ConfigError where they contradict each other."""
        groups = (self.data, self.learning, self.running, self.decoders)
        return Recipe(**{one.name: getattr(group, one.name) for group in groups for one in fields(group)})

    def run(self) -> Result:
        """Ends the program where ranks did the work (the first wrote --json), and in each rank but the first."""
        if wanted(self.recipe):
            sys.exit(launch(self.recipe, self.json))
        from tessella.exam import exam_of  # torch
        from tessella.train.loop import train  # torch, PEFT
        from tessella.train.world import join, leave  # torch

        world = join()
        try:
            result = train(self.recipe, exam=exam_of(self.recipe)).as_json()
        except RankError as error:
            print(f"tessella: {error}", file=sys.stderr)
            sys.exit(LOST_ANOTHER)
        except TessellaError:
            if world.main:
                self.page()  # a run that failed is looked at, too
            raise
        leave()
        if not world.main:
            sys.exit(130 if result["stopped_by"] == "interrupted" else 0)
        self.page()
        return result

    def page(self) -> None:
        """report.html beside what was learned; only where the run came far enough to have a folder of its own."""
        from tessella.runs.folder import is_run  # rich, matplotlib
        from tessella.runs.page import write_page  # matplotlib

        if is_run(self.recipe.output):
            print(f"page: {write_page(self.recipe.output)}", file=sys.stderr)


def group_of(recipe: Recipe, kind: type[Group]) -> Group:
    """The fields of one group of a recipe."""
    return kind(**{one.name: getattr(recipe, one.name) for one in fields(kind)})
