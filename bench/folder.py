"""A model folder in the official layout with the shapes of InternVL2-2B and random weights, for measuring without a network.

    python bench/folder.py ./2b                 4.4 GB in bfloat16, seconds on a GPU
    python bench/folder.py ./small --tiny       the same with a tiny model

The tokenizer is made up: a token for each byte of a text. `tessella finetune`, `inspect --forecast`, `convert` and the engine
open it like any other; what it answers says nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors.torch import save_file
from shapes import Options as Shapes
from shapes import made_up_backend, random_model, shape

from tessella.checkpoint.layout import generation_config, official_config, preprocessor_config
from tessella.checkpoint.names import groups_of
from tessella.model.device import choose_device

SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional]
    tiny: bool = False
    device: str = "auto"  # where the random numbers are drawn


def main(options: Options) -> None:
    config = shape(Shapes(tiny=options.tiny))
    model = random_model(config, choose_device(options.device), torch.bfloat16)
    ours = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for group in groups_of(ours, "official", config.language):
        stored = group.to_stored([ours[name] for name in group.ours], config.language)
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1] |= {name: tensor.contiguous() for name, tensor in stored.items()}
    options.folder.mkdir(parents=True)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, options.folder / file, metadata={"format": "pt"})
    backend = made_up_backend(config.language.vocab_size)
    backend.save(str(options.folder / "tokenizer.json"))
    end = backend.token_to_id("<|im_end|>")
    weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    for file, content in {
        "config.json": official_config(config, "bfloat16"),
        "generation_config.json": generation_config({}, [end]),
        "preprocessor_config.json": preprocessor_config(config),
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"},
        "model.safetensors.index.json": {
            "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())}, "weight_map": weight_map
        },
    }.items():  # fmt: skip
        (options.folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    print(f"{options.folder}: {sum(weight.numel() for weight in ours.values()):,} parameters in {len(files)} shards")


if __name__ == "__main__":
    main(tyro.cli(Options))
