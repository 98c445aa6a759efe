"""`tessella finetune`: every field of a recipe is a flag."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from tessella.commands.place import Result
from tessella.train.recipe import Recipe


@dataclass(frozen=True)
class Finetune:
    recipe_file: Annotated[Positional[Path | None], arg(metavar="[RECIPE]", help="A TOML file; its keys are flags too.")] = None
    recipe: OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    json: Path | None = None
    """Write the result there too; docs/json.md lists the keys."""

    def run(self) -> Result:
        from tessella.train.loop import train  # torch, PEFT

        result = train(self.recipe)
        # Beside what was learned, so that `evaluate --recipe` can score what this run held out.
        (result.output / "recipe.toml").write_text(replace(self.recipe, resume=False).to_toml(), encoding="utf-8")
        return result.as_json()
