"""The way from tiles to visual tokens on a GPU in 16-bit types: the tower's own products, one kernel each for what lies between.

In: a model, whose weights are read where they lie.  Out: features, as model/vision.py computes them.
N tiles, S side in px, P patches a side, T = 1 + P * P tokens a tile, C width.
"""

import torch.nn.functional as F
from torch import Tensor

from tessella.engine.kernels.sight import activate, norm_of, scale_add_norm
from tessella.model.vision import Attention, Block, Embeddings, VisionTower

WORTH_TILES = 3  # of fewer the GPU waits for the host, and torch's launches cost it less: 4.9 against 5.5 ms for one tile


class FastTower:
    """Stands in VisionTower.forward's place."""

    def __init__(self, tower: VisionTower):
        self.tower = tower
        self.blocks = [layer for layer in tower.encoder.layers[: tower.depth] if isinstance(layer, Block)]
        assert len(self.blocks) == tower.depth
        self.quick = tower.config.activation == "quick_gelu"

    def __call__(self, tiles: Tensor) -> Tensor:
        """tiles (N, 3, S, S), normalised -> features as VisionTower.forward gives them."""
        if len(tiles) < WORTH_TILES:
            seen: Tensor = self.tower(tiles)
            return seen
        tower, config = self.tower, self.tower.config
        x = tower.pre_norm(embedded(tower.embeddings, tiles))
        n, t, c = x.shape
        flat = x.reshape(n * t, c)
        if self.blocks:
            flat = self._through(flat, n)
        x = flat.view(n, t, c)
        if config.post_norm == "used":
            x = tower.post_norm(x)
        side = tiles.shape[-1] // config.patch_size_px
        return x if config.keep_class_token else x[:, 1:].unflatten(1, (-1, side))

    def warm(self, most_tiles: int) -> None:
        """Look at nothing, once for each number of tiles, in the thread that will look.

        cuDNN plans its attention anew for each number, and torch keeps the plans of each thread apart: the first call with a
        number took 43 ms longer on an H200 (docs/log.md, 2026-11-30).
        """
        config = self.tower.config
        tokens = 1 + (config.image_size_px // config.patch_size_px) ** 2
        for block in self.blocks[:1]:
            for tiles in range(1, most_tiles + 1):
                attended(block.attn, block.attn.proj.weight.new_zeros(tiles * tokens, config.hidden_size), tiles)

    def _through(self, x: Tensor, tiles: int) -> Tensor:
        """x (N * T, C) through all blocks; each norm is done with the sum before it."""
        hidden = norm_of(x, self.blocks[0].norm1)
        for number, block in enumerate(self.blocks):
            x, hidden = scale_add_norm(x, attended(block.attn, hidden, tiles), block.ls1, block.norm2)
            more = block.mlp.fc2(activate(block.mlp.fc1(hidden), quick=self.quick))
            if number + 1 < len(self.blocks):
                x, hidden = scale_add_norm(x, more, block.ls2, self.blocks[number + 1].norm1)
            else:
                x = x + (more if block.ls2 is None else more * block.ls2)
        return x


def attended(attention: Attention, x: Tensor, tiles: int) -> Tensor:
    """Attention.forward without its own dimension for tiles. x (N * T, C) -> (N * T, C)."""
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = (tiles, -1, attention.num_heads, x.shape[1] // attention.num_heads)
    q, k, v = (y.view(heads).transpose(1, 2) for y in (attention.q_norm(q), attention.k_norm(k), v))
    return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def embedded(embeddings: Embeddings, tiles: Tensor) -> Tensor:
    """Embeddings.forward with the convolution as what it is, a product of patches that do not overlap. (N, 3, S, S) -> (N, T, C).

    cuDNN's convolution in bfloat16 took 754 us for 13 tiles on an H200 (docs/log.md, 2026-11-30).
    """
    conv = embeddings.patch_embedding
    p, side = conv.kernel_size[0], tiles.shape[-1] // conv.kernel_size[0]
    n, whole = len(tiles), side * p
    patches = tiles[:, :, :whole, :whole].reshape(n, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
    tokens = tiles.new_empty(n, 1 + side * side, conv.out_channels)
    tokens[:, :1] = embeddings.class_embedding.to(tokens.dtype)
    numbers = 3 * p * p
    missing = -numbers % 8  # rows of 588 numbers are no multiple of 16 bytes, which the quick products of cuBLAS want
    weight = F.pad(conv.weight.flatten(1), (0, missing))
    tokens[:, 1:] = F.linear(F.pad(patches.reshape(n, side * side, numbers), (0, missing)), weight, conv.bias)
    return tokens.add_(embeddings.positions(side, side).to(tokens.dtype))
