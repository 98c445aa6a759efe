"""`tessella evaluate`: its flags."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tessella.commands.place import Here, Place, Result
from tessella.errors import ConfigError


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
    scenes: int | None = None
    """Score boxes, masks, grounding and routing on so many held-out scenes instead (docs/boxes.md)."""
    scene_kinds: tuple[str, ...] = ("detect", "everything", "ground", "segment", "text", "name", "count", "talk")
    """What is asked of them; beside these, draw and edit."""
    scene_style: str = "twemoji"
    """Drawing style of those scenes."""
    scene_objects: int = 5
    """Most foods in a scene."""
    scene_foods: int | None = None
    """Only the first so many of the shipped foods; default: all."""
    scene_photos: Path | None = None
    """Folder of photographs: the grounds of half of the scenes; default: drawn grounds alone."""
    coco: tuple[Path, ...] = ()
    """COCO-style files of your own pictures, scored like scenes."""
    judge: Path | None = None
    """With scene kind draw: a file for an independent judge of drawn foods, a small network that saw the shipped drawings alone;
    it is taught and put there when the file is not there (minutes on a CPU)."""
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

        if self.scenes is not None or self.coco:
            return self._run_scenes()
        if self.judge is not None:
            raise ConfigError("--judge goes with --scenes and --scene-kinds draw; leave it out")
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

    def _run_scenes(self) -> Result:
        from tessella.evaluate.run import Settings  # torch
        from tessella.evaluate.scenes import SceneWish, score_scenes  # torch

        given = {"--data": self.data, "--recipe": self.recipe, "--skills": self.skills, "--forgetting": self.forgetting}
        extra = [name for name, value in given.items() if value]
        if extra:
            raise ConfigError(f"--scenes and --coco ask their own questions; leave {' and '.join(extra)} out")
        if self.scenes is not None and self.scenes < 1:
            raise ConfigError(f"scenes is {self.scenes}, must be at least 1")
        if self.judge is not None and "draw" not in self.scene_kinds:
            raise ConfigError("--judge looks at drawn foods; say --scene-kinds draw, or leave it out")
        wish = SceneWish(
            count=min(self.scenes or 0, self.limit or self.scenes or 0),
            kinds=self.scene_kinds,
            style=self.scene_style,
            photos=self.scene_photos,
            most_objects=self.scene_objects,
            foods=self.scene_foods,
            seed=self.seed,
            coco=self.coco,
            image_root=self.image_root,
            max_tokens=max(self.max_tokens, 160),
            judge=self.judge,
        )
        settings = Settings(
            self.place.device, self.place.dtype, self.max_tiles, self.system, self.batch_items, self.limit_megapixels
        )
        return score_scenes(self.models, wish, settings, self.html)
