"""The tower: tiles become patch features. InternViT; CLIP's and EVA's by flags of its config.

In: tiles (N, 3, S, S), normalised.  Out: features (N, P, P, C), class token dropped; (N, 1 + P * P, C) where it is kept.
N tiles, S side in px, P patches a side, C width.  Parameter names are those of the official checkpoint; other names
are mapped by checkpoint/names.py.
Source: modeling_intern_vit.py of OpenGVLab/InternVL at 2410d1d; modeling_clip.py of huggingface/transformers at 5.23.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.config import VisionConfig
from tessella.model.layers import RMSNorm


def make_norm(config: VisionConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class Embeddings(nn.Module):
    """Patches, a class token in front, and learned positions that are resized bicubically for other grids."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c, p = config.hidden_size, config.patch_size_px
        self.grid = config.image_size_px // p
        axes = () if config.flat_tables else (1,)
        self.class_embedding = nn.Parameter(torch.randn(*axes, *axes, c))
        self.patch_embedding = nn.Conv2d(3, c, kernel_size=p, stride=p, bias=config.patch_bias)
        self.position_embedding = nn.Parameter(torch.randn(*axes, self.grid**2 + 1, c))

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles (N, 3, S, S) -> (N, 1 + P * P, C)."""
        patches = self.patch_embedding(tiles)
        height, width = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_embedding.to(patches.dtype).expand(len(tiles), 1, -1), patches), dim=1)
        return tokens + self.positions(height, width).to(tokens.dtype)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table ((1,) 1 + height * width, C), resized in float32 when the grid is not the trained one."""
        if (height, width) == (self.grid, self.grid):
            return self.position_embedding  # no view of it: the gradient of one tile would share its memory with another's
        whole = self.position_embedding.reshape(1, self.grid**2 + 1, -1)
        first, table = whole[:, :1], whole[:, 1:]
        table = table.float().reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        table = table.flatten(2).transpose(1, 2).to(first.dtype)
        return torch.cat((first, table), dim=1)


class Attention(nn.Module):
    """Full self-attention; qk-norm, where there is one, spans the whole width before the heads are split."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(c, 3 * c, bias=config.qkv_bias)
        self.q_norm = RMSNorm(c, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.reshape(n, t, self.num_heads, -1).transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = quick_gelu if config.activation == "quick_gelu" else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """What CLIP was trained with in gelu's place. Source: openai/CLIP, model.py."""
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """x + attn(norm1(x)) * ls1, then x + mlp(norm2(x)) * ls2; ls1 and ls2 are the learned layer scales, where there are any."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.norm1 = make_norm(config)
        self.norm2 = make_norm(config)
        self.ls1 = self.ls2 = None
        if config.layer_scale:
            # full, not a product: on the meta device a product imports torch._dynamo, 0.9 s and 78 MB for each start
            self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
            self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        if self.ls1 is None or self.ls2 is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))


class VisionTower(nn.Module):
    """The tower up to a chosen layer. select_layer counts like hidden_states: 0 the embeddings, -1 the last layer."""

    def __init__(self, config: VisionConfig, select_layer: int = -1):
        super().__init__()
        self.config = config
        self.depth = select_layer if select_layer >= 0 else config.num_layers + 1 + select_layer
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pre_norm = make_norm(config) if config.pre_norm else nn.Identity()
        self.post_norm = nn.Identity() if config.post_norm == "none" else make_norm(config)

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles (N, 3, S, S), normalised -> features (N, P, P, C), or (N, 1 + P * P, C) where the class token is kept."""
        x = self.pre_norm(self.embeddings(tiles))
        for layer in self.encoder.layers[: self.depth]:
            x = layer(x)
        if self.config.post_norm == "used":
            x = self.post_norm(x)
        side = tiles.shape[-1] // self.config.patch_size_px
        return x if self.config.keep_class_token else x[:, 1:].unflatten(1, (-1, side))

    def levels(self, tiles: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """tiles (N, 3, S, S), normalised -> features (N, P, P, C) after some layers, not normed; layers rise, counted like
        hidden states. For decoders that want more than the last word.
        """
        x, found = self.pre_norm(self.embeddings(tiles)), []
        side = tiles.shape[-1] // self.config.patch_size_px
        for number, layer in enumerate(self.encoder.layers[: max(layers)], 1):
            x = layer(x)
            if number in layers:
                found.append(x[:, 1:].unflatten(1, (-1, side)))
        return found
