"""`tessella finetune`: every field of a recipe is a flag."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from tessella.commands.place import Result
from tessella.errors import RankError, TessellaError
from tessella.train.launch import LOST_ANOTHER, launch, wanted
from tessella.train.recipe import Recipe


@dataclass(frozen=True)
class Finetune:
    recipe_file: Annotated[Positional[Path | None], arg(metavar="[RECIPE]", help="A TOML file; its keys are flags too.")] = None
    recipe: OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    json: Path | None = None
    """Write the result there too; docs/json.md lists the keys."""

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
