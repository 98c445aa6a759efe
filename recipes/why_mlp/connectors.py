"""The connectors that are compared, each set between the built-in model's frozen tower and frozen language model.

In: a name of VARIANTS.  Out: a model whose connector begins at random, with tokens as spread out as the embedding table.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tessella.checkpoint.read import Loaded, load
from tessella.config import ConnectorConfig, ModelConfig, QFormerConfig
from tessella.inputs import Inputs
from tessella.model.connectors import Connector
from tessella.model.device import choose_device

STAGED = "q-former after stage 1"
# 14 times the pixel-shuffle MLP's parameters, as BLIP-2's 105 M are 8 times InternVL2-2B's 12.6 M.
QFORMER = QFormerConfig(384, 1536, num_layers=8, num_heads=6, image_width=384, num_queries=32, norm_eps=1e-6)
VARIANTS = {
    "linear": ConnectorConfig("linear"),
    "mlp": ConnectorConfig("mlp"),
    "pixel shuffle + mlp": ConnectorConfig("pixel_shuffle"),
    "pooling + mlp": ConnectorConfig("pool"),
    "q-former": ConnectorConfig("qformer", qformer=QFORMER),
    STAGED: ConnectorConfig("qformer", qformer=QFORMER),
}


def model_with(name: str, device: str, seed: int, tile_px: int) -> Loaded:
    """The built-in model with that connector; all but the connector is frozen. In bfloat16 on a GPU, else in float32."""
    device = choose_device(device).type
    loaded = load("tessella-nano", device=device, dtype="bfloat16" if device == "cuda" else "float32", max_tiles=1)
    config = replace(loaded.config, connector=VARIANTS[name], max_tiles=1, tile_size_px=tile_px)
    torch.manual_seed(seed)
    model = loaded.model.requires_grad_(False)
    model.config, model.mlp1 = config, Connector(config).to(model.device, model.dtype)
    return replace(loaded, inputs=Inputs(config, loaded.tokenizer, max_tiles=1), config=config)


@torch.no_grad()
def match_spread(loaded: Loaded, tiles: Tensor) -> None:
    """Scale the last layer so that its tokens spread like the embedding table; tokens far from it teach nothing."""
    model, last = loaded.model, loaded.model.mlp1[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.bias)
    last.weight *= model.language_model.model.embed_tokens.weight.std() / model.visual_tokens(tiles).std()


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def slots(config: ModelConfig) -> int:
    return config.slots_per_tile
