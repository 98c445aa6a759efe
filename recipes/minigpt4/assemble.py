"""MiniGPT-4 from its parts: BLIP-2's tower and Q-Former, a language model of the Llama shape, and one linear layer between.

In: a BLIP-2 folder of transformers (its own language half is left out), a Llama or Vicuna folder, MiniGPT-4's .pth with
llama_proj.  Out: a folder that transformers' Blip2ForConditionalGeneration opens, and that each command takes as a MODEL.
The .pth is read with weights_only, so no code in it is run. The token that bears the slots, <image>, is added to the tokenizer.
Source: minigpt4.py of Vision-CAIR/MiniGPT-4 at d94738a.
"""

import argparse
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.names import EMBEDDING, HEAD, group_of
from tessella.checkpoint.weights import Entry, Weights, open_weights
from tessella.checkpoint.write import TOKENIZER_FILES, write_model
from tessella.config import ModelConfig, load_config, read_config_json, read_json
from tessella.errors import CheckpointError, TessellaError
from tessella.inputs import Inputs
from tessella.tokenizer import Tokenizer

SLOT = "<image>"
PROJECTION = {"mlp1.1.weight": "llama_proj.weight", "mlp1.1.bias": "llama_proj.bias"}


def assemble(blip2: Path, language: Path, projection: Path, out: Path, template: str = "minigpt4") -> Path:
    """Write the folder. Raises CheckpointError when a part is missing or does not fit the others."""
    with tempfile.TemporaryDirectory(prefix="tessella-") as place:
        base = Path(place)
        added = tokenizer_with_slot(language, base)
        (base / "config.json").write_text(json.dumps(joined_config(blip2, language, added, template), indent=2))
        config = load_config(base)
        end_ids = Inputs(config, Tokenizer.load(base)).stop_ids
        entries = entries_of_parts(config, open_weights(blip2), open_weights(language), read_projection(projection))
        return write_model(entries, out, config, layout="blip2", end_ids=end_ids, base_folder=base)


def tokenizer_with_slot(language: Path, base: Path) -> int:
    """Copy the tokenizer's files and add the slot's token; gives its id. Raises CheckpointError without a tokenizer.json."""
    if not (language / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{language} holds no tokenizer.json; take a folder with one, as transformers' fast tokenizers write it"
        )
    for name in TOKENIZER_FILES:
        if (language / name).is_file():
            shutil.copyfile(language / name, base / name)
    tokenizer = Tokenizer.load(base)
    if tokenizer.has(SLOT):
        return tokenizer.id_of(SLOT)
    raw, slot = read_json(base / "tokenizer.json"), tokenizer.vocab_size
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] = [*raw.get("added_tokens", []), {"id": slot, "content": SLOT, **flags}]
    (base / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    return slot


def joined_config(blip2: Path, language: Path, slot: int, template: str) -> dict[str, Any]:
    """The config.json of the whole, its vocabulary wide enough for the slot."""
    seen, said = read_config_json(blip2), read_config_json(language)
    missing = [key for key in ("vision_config", "qformer_config") if key not in seen]
    if missing:
        raise CheckpointError(f"{blip2}/config.json has no {', '.join(missing)}; give a BLIP-2 folder of transformers")
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "torch_dtype": said.get("torch_dtype") or said.get("dtype") or "float16",
        "vision_config": seen["vision_config"],
        "qformer_config": seen["qformer_config"],
        "num_query_tokens": seen.get("num_query_tokens", 32),
        "text_config": {**said, "vocab_size": max(int(said["vocab_size"]), slot + 1)},
        "image_token_index": slot,
        "tessella": {"template": template},
    }


def read_projection(path: Path) -> Mapping[str, Tensor]:
    """The linear layer of MiniGPT-4's checkpoint, by our names. Raises CheckpointError."""
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    # What the restricted unpickler raises on bytes that are no checkpoint.
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint of tensors ({error}); fetch it again") from error
    state = raw.get("model", raw) if isinstance(raw, dict) else {}
    lost = [name for name in PROJECTION.values() if name not in state]
    if lost:
        raise CheckpointError(f"{path} holds no {', '.join(lost)}; give MiniGPT-4's own checkpoint (pretrained_minigpt4.pth)")
    return {ours: state[stored] for ours, stored in PROJECTION.items()}


def entries_of_parts(config: ModelConfig, blip2: Weights, language: Weights, linear: Mapping[str, Tensor]) -> list[Entry]:
    """Every parameter, each from the part that holds it, in the language model's type; widened when its turn has come."""
    dtype = language.dtypes["model.norm.weight"]
    entries = []
    for name, weight in blank_model(config).named_parameters():
        shape = tuple(weight.shape)
        if name in linear:
            require(name, tuple(linear[name].shape), shape)
            entries.append(Entry(name, shape, dtype, partial(linear[name].to, dtype)))
            continue
        part = language if name.startswith("language_model.") else blip2
        stored = name.removeprefix("language_model.") if part is language else group_of(name, "blip2", config.language).stored[0]
        if stored not in part.files:
            raise CheckpointError(f"{stored} is missing in the {'language model' if part is language else 'BLIP-2 folder'}")
        grows = name in (EMBEDDING, HEAD)
        require(name, part.shapes[stored][1 if grows else 0 :], shape[1 if grows else 0 :])
        entries.append(Entry(name, shape, dtype, partial(made, part, stored, shape[0], dtype)))
    return entries


def made(part: Weights, name: str, rows: int, dtype: torch.dtype) -> Tensor:
    """A tensor in that type; zeros below the rows that it has, for tokens that were added."""
    tensor = part.read(name).to(dtype)
    return tensor if len(tensor) == rows else torch.cat((tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])))


def require(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise CheckpointError(f"{name} is {found}, must be {wanted}: the parts are not of one MiniGPT-4 (7B and 13B differ)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blip2", type=Path, required=True, help="folder of a BLIP-2, as blip2-flan-t5-xxl")
    parser.add_argument("--language", type=Path, required=True, help="folder of a Vicuna")
    parser.add_argument("--projection", type=Path, required=True, help="MiniGPT-4's .pth")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        print(f"{assemble(args.blip2, args.language, args.projection, args.out)} is written; try: tessella chat {args.out}")
    except TessellaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
