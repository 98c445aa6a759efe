"""How much one step takes and how many blocks there are: settings fitted to the device.

In: EngineSettings, a model.  Out: Sizes.
"""

from typing import NamedTuple

import psutil
import torch

from tessella.engine.paged import BlockStore
from tessella.engine.request import EngineSettings
from tessella.errors import ConfigError
from tessella.model.vision_language import VisionLanguageModel


class Sizes(NamedTuple):
    block_tokens: int
    blocks: int
    batch_tokens: int  # of one step
    batch_tiles: int
    running: int  # rows side by side


CPU = {
    "block_tokens": 16,
    "batch_tokens": 256,
    "batch_tiles": 2,
    "running": 16,
}  # a step that others wait for takes a fraction of a second
GPU = {"block_tokens": 64, "batch_tokens": 8192, "batch_tiles": 32, "running": 512}
CPU_CONTEXTS = 4  # full contexts that the blocks hold on a CPU at most: main memory is everybody's


def fit(settings: EngineSettings, model: VisionLanguageModel) -> Sizes:
    """Raises ConfigError when not even one block fits."""
    usual = CPU if model.device.type == "cpu" else GPU
    batch_tokens = settings.max_batch_tokens or usual["batch_tokens"]
    running = settings.max_running or usual["running"]
    block_tokens = settings.block_tokens or usual["block_tokens"]
    blocks = _blocks(settings, model, block_tokens)
    if blocks < 1:
        raise ConfigError(
            f"cache_tokens is {settings.cache_tokens}, cache_fraction {settings.cache_fraction}: no block of "
            f"{block_tokens} tokens fits; give at least {block_tokens} tokens"
        )
    # Every row that grows takes part in each step.
    return Sizes(block_tokens, blocks, batch_tokens, settings.max_batch_tiles or usual["batch_tiles"], min(running, batch_tokens))


def _blocks(settings: EngineSettings, model: VisionLanguageModel, block_tokens: int) -> int:
    if settings.cache_tokens is not None:
        return settings.cache_tokens // block_tokens
    each = BlockStore.bytes_a_block(model.config.language, block_tokens, model.dtype)
    fitting = int(settings.cache_fraction * free_bytes(model.device)) // each
    if model.device.type == "cpu":
        return min(fitting, -(-CPU_CONTEXTS * model.config.context_tokens // block_tokens))
    return fitting


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available: int = psutil.virtual_memory().available
    return available
