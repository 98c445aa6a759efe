"""How much arithmetic a pass must do, and the share of the machine's rate at which it is done (model FLOP utilisation).

In: a model, what of it learns, and the shapes of a pass.  Out: floating-point operations, a product and a sum each counted.
Only what the mathematics needs is counted: nothing that is computed again to save memory, no padding, the head at learned tokens
alone. The last layer counts at all tokens, as in others' formulas, though what follows its attention runs at learned ones alone.
A linear layer of N weights costs 2N a token forward, 2N for its input's gradient, 2N for its weights'; LoRA of P weights
6P; causal attention of n tokens 2 n^2 width forward, 2.5 times that backward.
n tokens of a row, t patches of a tile.
Source: arXiv:2204.02311, appendix B (PaLM); for attention's backward pass arXiv:2205.14135 (FlashAttention).
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

from tessella.model.vision_language import VisionLanguageModel
from tessella.train.batch import Pack
from tessella.train.recipe import Recipe

SIDE = {"cpu": 512, "cuda": 8192}  # of the product by which a device's rate is measured


@dataclass(frozen=True)
class Work:
    """What one token, tile or learned token of a recipe costs, in operations."""

    layers: float  # a token in the decoder's layers that run, attention left out
    attention: float  # a pair of tokens of a row (n^2)
    head: float  # a learned token
    tower: float  # a tile through the tower
    projector: float  # a tile through the projector

    def of(self, pack: Pack, tiles: int) -> float:
        """Operations of a pack of which so many tiles went through the tower."""
        pairs = sum(length**2 for length in pack.lengths)
        seen = self.tower * tiles + self.projector * len(pack.tiles)
        return self.layers * sum(pack.lengths) + self.attention * pairs + self.head * len(pack.targets) + seen


def work_of(model: VisionLanguageModel, recipe: Recipe, lowest: int = 0) -> Work:
    """lowest: the first decoder layer that runs in each step; what lies below it is kept."""
    config, language, vision = model.config, model.config.language, model.config.vision
    layers = model.language_model.model.layers[lowest:]
    plain, lora = linear_weights(layers)
    whole = recipe.language == "full"
    passes = 3 if whole else 2  # forward and the input's gradient; whole parts have their weights' gradient too
    pairs = 2 * language.num_heads * language.head_dim * len(layers)
    head = (3 if whole else 2) * 2 * language.vocab_size * language.hidden_size
    tower_plain, tower_lora = linear_weights(model.vision_model)
    patches = (vision.image_size_px // vision.patch_size_px) ** 2 + 1
    tower_attention = 4 * patches**2 * vision.hidden_size * vision.num_layers
    times, attended = {"frozen": (1.0, 1.0), "lora": (2.0, 3.5), "full": (3.0, 3.5)}[recipe.tower]
    projector, projector_lora = linear_weights(model.mlp1)
    below = {"frozen": 1 if recipe.tower == "frozen" else 2, "lora": 2, "train": 3}[recipe.projector]
    return Work(
        layers=passes * 2 * plain + 6 * lora,
        attention=3.5 * pairs,
        head=head,
        tower=times * 2 * tower_plain * patches + 6 * tower_lora * patches + attended * tower_attention,
        projector=(below * 2 * projector + 6 * projector_lora) * config.slots_per_tile,
    )


def linear_weights(module: nn.Module) -> tuple[int, int]:
    """Weights of the linear layers (and of the patch convolution), and those of LoRA's matrices beside them."""
    plain = lora = 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            count = layer.in_features * layer.out_features
            plain, lora = (plain, lora + count) if ".lora_" in f".{name}" else (plain + count, lora)
        elif isinstance(layer, nn.Conv2d):
            plain += layer.weight.numel()
    return plain, lora


def rate_of(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product there: the best of three. Measured, because a table of names would go stale
    and a busy or slowed machine would be measured against what it never had.
    """
    side = SIDE.get(device.type, SIDE["cpu"])
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return float(2 * side**3 / best)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
