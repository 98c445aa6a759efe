"""Patch features become visual tokens: the one seam between a tower and a language model.

In: features (N, P, P, C) of N tiles, or (N, 1 + P * P, C) with the class token, which a Q-Former takes.
Out: (N, slots, D), ready for the slots of the prompt; config.slots_per_tile counts them.
N tiles, P patches a side, C vision width, D language width, S visual tokens of all pictures.
A connector folds the map of patches, or leaves it, and then runs its layers, which are one nn.Sequential: the numbers of the
layers are the names in the checkpoint. A new kind is a line in CONNECTORS.
Source: InternVL 1.5, arXiv:2404.16821; LLaVA, arXiv:2304.08485 and arXiv:2310.03744; LLaVA-NeXT of haotian-liu/LLaVA at c121f04;
MiniGPT-4 of Vision-CAIR/MiniGPT-4 at d94738a; DeCo, arXiv:2405.20985.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.config import ConnectorConfig, ModelConfig
from tessella.geometry import Window
from tessella.model.qformer import Queries


def pixel_shuffle(x: Tensor, factor: int = 2, version: str = "v2") -> Tensor:
    """Fold each factor x factor square of patches into one patch that is factor**2 times as deep.

    x (N, H, W, C), H and W multiples of factor -> (N, H/factor * W/factor, C * factor**2), tokens row by row.
    A folded patch holds its square row by row: channel = (row * factor + column) * C + c.
    version "v1" leaves the map transposed, as InternVL 1.x before ps_version did; "v2" does not.
    Raises ValueError when H or W is no multiple of factor.
    Source: InternVL 1.5, arXiv:2404.16821; equal to pixel_shuffle of OpenGVLab/InternVL at 2410d1d.
    """
    n, h, w, c = x.shape
    if h % factor or w % factor:
        raise ValueError(f"pixel_shuffle: {h} x {w} patches do not fold by {factor}")
    x = x.reshape(n, h // factor, factor, w // factor, factor, c)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x.permute(*order).reshape(n, -1, c * factor**2)


def concatenate(x: Tensor, count: int) -> Tensor:
    """Join each count neighbours, in the order of the rows, into one. x (N, P, P, C) -> (N, P * P / count, C * count)."""
    n, h, w, c = x.shape
    return x.reshape(n, h * w // count, c * count)


def average(x: Tensor, factor: int) -> Tensor:
    """The mean of each factor x factor square of patches. x (N, P, P, C) -> (N, (P / factor)**2, C)."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), factor).flatten(2).transpose(1, 2)


def in_line(x: Tensor) -> Tensor:
    """The patches one after another. x (N, P, P, C) -> (N, P * P, C); what lies in line already stays as it is."""
    return x.flatten(1, -2)


def one_layer(config: ConnectorConfig, width: int, out: int) -> list[nn.Module]:
    return [nn.Linear(width, out, bias=config.bias)]


def two_layers(config: ConnectorConfig, width: int, out: int) -> list[nn.Module]:
    return [nn.Linear(width, out, bias=config.bias), nn.GELU(), nn.Linear(out, out, bias=config.bias)]


def normed_layers(config: ConnectorConfig, width: int, out: int) -> list[nn.Module]:
    return [nn.LayerNorm(width), *two_layers(config, width, out)]


def query_layers(config: ConnectorConfig, width: int, out: int) -> list[nn.Module]:
    assert config.qformer is not None, "the config says so"
    return [Queries(config.qformer), nn.Linear(config.qformer.hidden_size, out, bias=config.bias)]


@dataclass(frozen=True)
class Kind:
    """fold: features (N, P, P, C) -> (N, …, C'); deepened: C' is C times factor**2; layers: of width C' -> (N, slots, D)."""

    fold: Callable[[Tensor, ModelConfig], Tensor]
    deepened: bool
    layers: Callable[[ConnectorConfig, int, int], list[nn.Module]]


CONNECTORS = {
    "pixel_shuffle": Kind(lambda x, config: pixel_shuffle(x, version=config.pixel_shuffle_version), True, normed_layers),
    "linear": Kind(lambda x, _: in_line(x), False, one_layer),
    "mlp": Kind(lambda x, _: in_line(x), False, two_layers),
    "pool": Kind(lambda x, config: average(x, config.connector.factor), False, two_layers),
    "concat": Kind(lambda x, config: concatenate(x, config.connector.factor**2), True, one_layer),
    "qformer": Kind(lambda x, _: in_line(x), False, query_layers),
}


class Connector(nn.Sequential):
    """One kind of connector. image_newline (D,): the learned token behind each row of a picture's map, where there is one."""

    def __init__(self, config: ModelConfig):
        kind = CONNECTORS[config.connector.kind]
        width, out = config.vision.hidden_size, config.language.hidden_size
        if kind.deepened:
            width *= config.connector.factor**2
        super().__init__(*kind.layers(config.connector, width, out))
        self.config, self.fold = config, kind.fold
        self.image_newline = nn.Parameter(torch.randn(out) / out**0.5) if config.connector.newline else None

    def forward(self, features: Tensor, questions: Sequence[Sequence[int]] = ()) -> Tensor:
        """features (N, P, P, C) -> (N, slots, D). questions: ids of one for each tile, for a connector that reads them."""
        folded = self.fold(features, self.config)
        if not self.config.reads_question:
            return super().forward(folded)
        assert len(questions) == len(features), "each tile has a question"
        queries, project = self
        return project(queries(folded, questions))

    def laid_out(self, visual: Tensor, windows: Sequence[Window]) -> Tensor:
        """The tokens of all tiles in the order of the slots. visual (N, slots, D) -> (S, D).

        windows: what of each picture's map is shown; none where every tile stands for itself.
        """
        if not windows:
            return visual.flatten(0, 1)
        assert self.image_newline is not None, "only a connector with a newline shows windows"
        counts = [1 + window.grid.columns * window.grid.rows for window in windows]
        shown: list[Tensor] = []
        for tiles, window in zip(visual.split(counts), windows, strict=True):
            shown += [tiles[0], in_window(tiles[1:], window, self.image_newline)]
        return torch.cat(shown)


def in_window(tiles: Tensor, window: Window, newline: Tensor) -> Tensor:
    """The window of a picture's whole map, a newline behind each row. tiles (rows * columns, P * P, D), row by row -> (S, D).

    A picture that is not cut is one newline. Source: prepare_inputs_labels_for_multimodal of haotian-liu/LLaVA at c121f04,
    mm_patch_merge_type "spatial_unpad".
    """
    if not len(tiles):
        return newline[None].to(tiles.dtype)
    side, depth = int(tiles.shape[1] ** 0.5), tiles.shape[-1]
    grid = window.grid
    whole = tiles.reshape(grid.rows, grid.columns, side, side, depth).transpose(1, 2)
    whole = whole.reshape(grid.rows * side, grid.columns * side, depth)
    shown = whole[window.top : window.top + window.rows, window.left : window.left + window.columns]
    ends = newline.to(shown.dtype).expand(len(shown), 1, depth)
    return torch.cat((shown, ends), dim=1).flatten(0, 1)
