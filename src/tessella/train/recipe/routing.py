"""What a model is to learn beside words: boxes, masks and pictures, and the scenes that teach them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessella.errors import ConfigError
from tessella.foods import STYLES
from tessella.train.recipe.values import Bounds

SceneKind = Literal["detect", "everything", "ground", "segment", "text", "name", "count", "talk", "draw", "edit"]
SCENE_KINDS: tuple[SceneKind, ...] = ("detect", "everything", "ground", "segment", "text", "name", "count", "talk")


@dataclass(frozen=True)
class RoutingFields:
    """Decoders, and scenes composed on the fly."""

    decoders: tuple[Literal["boxes", "pictures"], ...] = ()
    """Teach routing tokens and these decoders: "boxes" ([DET], [GRD], [SEG]), "pictures" ([GEN], [EDIT])."""
    decoder_learning_rate: float | None = None
    """Peak learning rate of routing tokens, queries and decoders; default: learning_rate."""
    boxes_weight: float = 1.0
    """Weight of the loss of boxes and masks beside the language model's."""
    coco: tuple[Path, ...] = ()
    """COCO-style JSON files of your own pictures (boxes, polygons, run lengths); image_root says where the pictures lie."""
    captions: tuple[Path, ...] = ()
    """JSON lines with caption and picture (and before, to edit) that teach drawing; image_root says where the pictures lie."""
    pictures_weight: float = 1.0
    """Weight of the loss of pictures beside the language model's."""
    picture_noises: int = 1
    """Noised copies of each picture that a step learns from: what runs through the language model once teaches so many times."""
    diffusion: Path | None = None
    """Folder in Stable Diffusion 1.5's form that draws in place of the built-in decoder; it stays as it is."""
    scenes: int = 0
    """Scenes of the shipped foods, composed while teaching, in an epoch; they come beside the data."""
    held_out_scenes: int = 0
    """Scenes in the held-out drawing style that are scored while teaching."""
    scene_kinds: tuple[SceneKind, ...] = SCENE_KINDS
    """What is asked of scenes, each as often; a kind named twice is asked twice as often."""
    scene_styles: tuple[str, ...] = STYLES[:-1]
    """Drawing styles of the scenes that teach; the last shipped one stays for scoring."""
    scene_objects: int = 5
    """Most foods in a scene."""
    scene_foods: int | None = None
    """Only the first so many of the shipped foods; default: all."""
    scene_photos: Path | None = None
    """Folder of photographs: the grounds of half of the scenes; default: drawn grounds alone."""

    def check_routing(self) -> None:
        """Raise ConfigError for what no bound and no type catches."""
        unknown = [style for style in self.scene_styles if style not in STYLES]
        if unknown or not self.scene_styles:
            raise ConfigError(f"scene_styles is {list(self.scene_styles)}; name some of {', '.join(STYLES)}")
        if not self.scene_kinds:
            raise ConfigError(f"scene_kinds is empty; name some of {', '.join(SCENE_KINDS)}, draw, edit")
        if (self.scenes or self.held_out_scenes) and "pictures" not in self.decoders:
            drawn = [kind for kind in self.scene_kinds if kind in ("draw", "edit")]
            if drawn:
                raise ConfigError(f'scene_kinds names {", ".join(drawn)}, which needs decoders = ["pictures"]')
        if self.coco and "boxes" not in self.decoders:
            raise ConfigError('coco files teach boxes and masks, which needs decoders = ["boxes"]')
        if self.captions and "pictures" not in self.decoders:
            raise ConfigError('captions teach drawing, which needs decoders = ["pictures"]')
        if self.diffusion is not None and "pictures" not in self.decoders:
            raise ConfigError('diffusion is given, which needs decoders = ["pictures"]')
        boxed = [kind for kind in self.scene_kinds if kind in ("detect", "everything", "ground", "segment")]
        if self.scenes and boxed and "boxes" not in self.decoders:
            raise ConfigError(f'scene_kinds names {", ".join(boxed)}, which needs decoders = ["boxes"]; or name other kinds')


ROUTING_RANGES = {
    "decoder_learning_rate": Bounds(0, 1, above=True),
    "boxes_weight": Bounds(0),
    "pictures_weight": Bounds(0),
    "picture_noises": Bounds(1, 64),
    "scenes": Bounds(0, 10_000_000),
    "held_out_scenes": Bounds(0, 10_000),
    "scene_objects": Bounds(1, 12),
    "scene_foods": Bounds(1),
}
