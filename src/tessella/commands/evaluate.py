"""`tessella evaluate`: its flags."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tessella.commands.place import Here, Place, Result


@dataclass(frozen=True)
class Evaluate:
    models: Annotated[
        Positional[tuple[str, ...]], arg(metavar="MODEL", help="One or more; the first is compared with the others.")
    ]
    data: tuple[Path, ...] = ()
    """Questions: JSON lines with question, image and answers; or any dataset that finetune reads."""
    recipe: Path | None = None
    """Score what this recipe holds out, as its run saw it; finetune leaves one in its output folder."""
    skills: bool = False
    """Score the built-in model's skills; --data is the folder that recipes/nano/make_data.py --stage skills wrote."""
    metric: Literal["exact", "contains", "choice", "anls"] = "exact"
    """What is right: the same words, holding them, the same letter, or near in spelling."""
    image_root: Path | None = None
    """Folder that picture paths of a dataset start from; default: where the data file lies."""
    choices: Literal["hidden", "shown", "both"] = "hidden"
    """FoodieQA: the choices are hidden, shown (for --metric choice), or both."""
    held_out: float | None = None
    """Of a dataset, score only what finetune holds out with the same number (a share, or a count) and seed; default: all."""
    seed: int = 0
    """Seed of the held-out split."""
    limit: int | None = None
    """Score only the first so many questions."""
    max_tokens: int = 32
    """Longest answer in tokens."""
    max_tiles: int | None = None
    """Most tiles a picture is cut into, 1 to 40; default: what each model says."""
    system: str | None = None
    """System message; default: the one of each model's template."""
    batch_items: int = 16
    """Questions that run together."""
    limit_megapixels: float = 100.0
    """Largest picture that is opened."""
    forgetting: bool = False
    """Ask general questions too, to see what was forgotten."""
    output: Path = Path("runs/evaluate")
    """Folder where answers are kept; a run that was stopped goes on from them."""
    html: Path | None = None
    """Write a report with pictures, answers and confusions there."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.evaluate.run import Settings  # torch
        from tessella.scoring import Questions, score  # torch

        questions = Questions(
            data=self.data,
            recipe=self.recipe,
            skills=self.skills,
            image_root=self.image_root,
            choices=self.choices,
            held_out=self.held_out,
            seed=self.seed,
            limit=self.limit,
            limit_megapixels=self.limit_megapixels,
            metric=self.metric,
            max_tokens=self.max_tokens,
        )
        settings = Settings(
            self.place.device, self.place.dtype, self.max_tiles, self.system, self.batch_items, self.limit_megapixels
        )
        return score(self.models, questions, settings, self.output, self.html, self.forgetting)
