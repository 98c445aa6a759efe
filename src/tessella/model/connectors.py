"""Patch features become visual tokens.

In: features (N, P, P, C) of N tiles.  Out: (N, P*P/4, D), ready for the slots of the prompt.
N tiles, P patches a side, C vision width, D language width.
"""

from torch import Tensor, nn

from tessella.config import ModelConfig


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


class PixelShuffleMLP(nn.Sequential):
    """InternVL's connector: pixel shuffle, LayerNorm, two linear layers. Indices 0, 1, 3 are the checkpoint's names."""

    def __init__(self, config: ModelConfig):
        folded, width = 4 * config.vision.hidden_size, config.language.hidden_size
        super().__init__(nn.LayerNorm(folded), nn.Linear(folded, width), nn.GELU(), nn.Linear(width, width))
        self.version = config.pixel_shuffle_version

    def forward(self, features: Tensor) -> Tensor:
        """features (N, P, P, C) -> (N, P*P/4, D)."""
        return super().forward(pixel_shuffle(features, version=self.version))
