"""Routing is attached to a model that is to learn it, and the decoders' losses are taken beside the language model's.

In: a model and a recipe; then hidden states (T, D) of a pack.  Out: new parameters; a loss summed over the pack's routed rows.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessella.checkpoint.read import Loaded, use_routing
from tessella.errors import ConfigError
from tessella.image import normalise
from tessella.model.decoders.boxes import BoxConfig, BoxDecoder
from tessella.model.decoders.pictures import PictureConfig, PictureDecoder
from tessella.model.routing import Routing
from tessella.model.vision_language import VisionLanguageModel
from tessella.routes import Kind, routes_for
from tessella.train.multitask.rows import Placed
from tessella.train.recipe import Recipe
from tessella.transfer import sent


def as_tensor(picture: Image.Image, side: int) -> Tensor:
    """A picture -> (3, side, side) in -1 to 1."""
    small = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


LEVELS = 3  # of the tower, evenly spread up to its last layer


def attach(loaded: Loaded, recipe: Recipe) -> None:
    """Give a model the routing and decoders that a recipe asks for; what it has already stays as it was learned.

    Raises ConfigError where the model's pictures cannot be decoded.
    """
    if not recipe.decoders:
        return
    model = loaded.model
    if model.config.tile_rule != "closest" or not model.config.use_thumbnail:
        raise ConfigError(
            f"decoders need a whole view of each picture; this model cuts pictures by the rule {model.config.tile_rule!r} "
            f"{'with' if model.config.use_thumbnail else 'without'} a thumbnail: leave decoders out, or take an InternVL model"
        )
    chance = torch.Generator().manual_seed(recipe.seed)
    routing = model.routing
    if routing is None:
        routing = Routing(routes_for(model.config.language.vocab_size), model.config.language.hidden_size)
        table = model.language_model.model.embed_tokens.weight
        head = table if model.language_model.lm_head is None else model.language_model.lm_head.weight
        routing.begin(table, head, chance)
        use_routing(loaded, routing)
    if "boxes" in recipe.decoders and routing.boxes is None:
        routing.boxes = BoxDecoder(box_config(model))
    if "pictures" in recipe.decoders and routing.pictures is None:
        folder = None if recipe.diffusion is None else str(recipe.diffusion.resolve())
        routing.pictures = PictureDecoder(PictureConfig(model.config.language.hidden_size, folder=folder, pooled=folder is None))
    routing.to(model.device)


def box_config(model: VisionLanguageModel) -> BoxConfig:
    """The decoder's sizes for a model: three levels of its tower."""
    depth = model.vision_model.depth
    seen = sorted({max(1, round(depth * (level + 1) / LEVELS)) for level in range(LEVELS)})
    return BoxConfig(model.config.language.hidden_size, model.config.vision.hidden_size, tuple(seen))


@dataclass(frozen=True, eq=False)
class View:
    """What the decoders of one pack look at."""

    hidden: Tensor  # (T, D)
    tiles: Tensor  # (N, 3, S, S) uint8 of the pack
    tiles_of: Sequence[int]  # of each row


class Decoders:
    """The losses of a model's decoders."""

    def __init__(self, model: VisionLanguageModel, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.tower_learns = recipe.tower != "frozen"
        self.present = bool(recipe.decoders)

    def losses(self, view: View, aims: Sequence[Placed]) -> dict[Kind, Tensor]:
        """What each decoder that has something to learn here misses, summed over the rows; not weighted."""
        routing, found = self.model.routing, dict[Kind, Tensor]()
        if routing is None:
            return found
        boxes: dict[int, list[Placed]] = defaultdict(list)
        for one in aims:
            if one.kind == "boxes" and view.tiles_of[one.row]:
                boxes[one.row].append(one)
        if boxes and routing.boxes is not None:
            found["boxes"] = self._boxes(routing.boxes, view, list(boxes.values()))
        drawn = [one for one in aims if one.aim.picture is not None]
        if drawn and routing.pictures is not None:
            found["pictures"] = self._pictures(routing.pictures, view, drawn)
        return found

    def weight(self, kind: Kind) -> float:
        return self.recipe.boxes_weight if kind == "boxes" else self.recipe.pictures_weight

    def _pictures(self, decoder: PictureDecoder, view: View, drawn: Sequence[Placed]) -> Tensor:
        """Noise is taken from the true pictures; an [EDIT] sees the last picture of its row."""
        device = self.model.device
        states = _states(view.hidden, [[one.start] for one in drawn], drawn[0].route.queries)[:, 0]
        wanted = torch.stack([as_tensor(one.aim.picture, decoder.config.side_px) for one in drawn if one.aim.picture])
        before = torch.zeros((len(drawn), 3, *view.tiles.shape[-2:]))
        for place, one in enumerate(drawn):
            if one.route.name == "[EDIT]" and view.tiles_of[one.row]:
                before[place] = view.tiles[sum(view.tiles_of[: one.row + 1]) - 1].float() / 127.5 - 1
        looks = self.recipe.picture_noises
        return decoder.loss(states, wanted.to(device), before.to(device), looks=looks).sum()

    def _boxes(self, decoder: BoxDecoder, view: View, rows: Sequence[Sequence[Placed]]) -> Tensor:
        """Rows of truths about one picture each; K classes of the longest row, fillers behind the others'."""
        from tessella.train.multitask.boxloss import box_loss, targets_of  # scipy: an extra that plain teaching does without

        device, most = self.model.device, max(map(len, rows))
        last_tiles = [sum(view.tiles_of[: some[0].row + 1]) - 1 for some in rows]
        tiles = normalise(view.tiles[last_tiles].to(device), torch.float32, self.model.config.vision.statistics)
        starts = [[one.start for one in some] + [some[0].start] * (most - len(some)) for some in rows]
        words = _states(view.hidden, starts, rows[0][0].route.queries)
        asked = torch.tensor([[k < len(some) for k in range(most)] for some in rows], device=device)
        tower = self.model.vision_model
        with torch.set_grad_enabled(self.tower_learns and torch.is_grad_enabled()):
            levels = tower.levels(tiles.to(self.model.dtype), decoder.config.layers_seen)
        targets = targets_of([[one.aim for one in some] for some in rows], device)
        return box_loss(decoder(levels, tiles, words, asked), targets, asked).sum()


def _states(hidden: Tensor, starts: Sequence[Sequence[int]], queries: int) -> Tensor:
    """hidden (T, D), N rows of K places where queries begin -> (N, K, queries, D)."""
    first = torch.tensor(starts)[..., None] + torch.arange(queries)
    return hidden[sent(first, hidden.device)]
