"""`tessella inspect`: its flags."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tessella.commands.place import Here, Place, Result


@dataclass(frozen=True)
class Inspect:
    thing: Annotated[Positional[str], arg(metavar="THING", help="A picture, a dataset, or a model.")] = "tessella-nano"
    model: str | None = None
    """The model through whose eyes pictures and datasets are seen; default: the recipe's, or tessella-nano."""
    recipe: Path | None = None
    """Of a dataset: the recipe that it is to be taught with: its split, limits and packing. Without THING: the recipe's data."""
    forecast: bool = False
    """Of a dataset: measure a few passes here, and say how long the recipe takes, how much memory, and what to change."""
    places: int = 3
    """Of a dataset: how many places of each kind of fault are named; 0: all of them, as in --json."""
    output: Path | None = None
    """Of a picture: draw its tiles there; default: NAME-tiles.png here."""
    max_tiles: int | None = None
    """Most tiles a picture is cut into, 1 to 40; default: what the model says."""
    image_root: Path | None = None
    """Of a dataset: folder that picture paths start from; default: where the data file lies."""
    columns: tuple[str, ...] = ()
    """Of a dataset: columns that go by other names, "image=photo" "question=asked"; docs/data.md."""
    boxes: Literal["thousandths", "pixels"] = "thousandths"
    """Of a dataset: what the numbers in <box> count."""
    choices: Literal["hidden", "shown", "both"] = "hidden"
    """Of FoodieQA: the choices are hidden (answer in words), shown (answer a letter), or both."""
    limit_megapixels: float = 100.0
    """Largest picture that is opened."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.inspection import Look, inspect  # torch

        look = Look(
            self.model, self.output, self.max_tiles, self.image_root, self.choices, self.limit_megapixels, self.recipe,
            self.columns, self.boxes, self.places, self.forecast,
        )  # fmt: skip
        return inspect(self.thing, look, self.place.device, self.place.dtype)
