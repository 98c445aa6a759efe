"""What others leave behind when they teach a tiny model: random adapters, LoRA training checkpoints, XTuner's state.

In: an official folder of tiny.py.  Out: tensors or a folder under the names that each tool gives them, and the merge by a loop.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessella.model.vision_language import VisionLanguageModel

RANK, ALPHA = 4, 8
INNER = "base_model.model."  # what PEFT puts before a module's name


XTUNER_CONFIG = """
from peft import LoraConfig
raise SystemExit('this text must never run')
lora_r = 4
model = dict(
    type=InternVL_V1_5,
    model_path='./InternVL2-2B',
    freeze_llm=True,
    llm_lora=dict(type=LoraConfig, r=lora_r, lora_alpha=8, lora_dropout=0.05, target_modules=None, task_type='CAUSAL_LM'),
    visual_encoder_lora=dict(type=LoraConfig, r=4, lora_alpha=16, target_modules=['attn.qkv']))
"""


def random_pairs(model: VisionLanguageModel, *, heads: bool = False, tower: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """A random LoRA under our names on the decoder's linear layers, the head and the tower if asked."""
    chance = torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in model.named_parameters():
        is_layer = name.startswith("language_model.model.layers") and name.endswith("proj.weight")
        is_head = heads and name == "language_model.lm_head.weight"
        is_tower = (
            tower and name.startswith("vision_model.encoder") and name.endswith(("qkv.weight", "proj.weight", "fc1.weight"))
        )
        if is_layer or is_head or is_tower:
            module = name.removesuffix(".weight")
            state[f"{module}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=chance) / 8
            state[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=chance) / 8
    return state


def official_pairs(base: Path, *, tower: bool = True, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A random LoRA on every linear layer of an official folder, the head included, under the names that stand there."""
    chance = torch.Generator().manual_seed(2)
    state = {}
    for name, weight in load_file(base / "model.safetensors").items():
        in_decoder = name.startswith("language_model.") and (
            "layers" in name or name.endswith(("output.weight", "lm_head.weight"))
        )
        in_tower = tower and ".encoder." in name
        if weight.dim() == 2 and (in_decoder or in_tower) and not name.endswith(skip):
            module = name.removesuffix(".weight")
            state[f"{module}.lora_A"] = torch.randn(RANK, weight.shape[1], generator=chance) / 8
            state[f"{module}.lora_B"] = torch.randn(weight.shape[0], RANK, generator=chance) / 8
    return state


def merged_by_hand(base: Path, pairs: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The official tensors with the pairs added, by a loop."""
    state = load_file(base / "model.safetensors")
    for name in [name for name in pairs if name.endswith("lora_A")]:
        module = name.removesuffix(".lora_A")
        state[f"{module}.weight"] = state[f"{module}.weight"] + scale * pairs[f"{module}.lora_B"] @ pairs[name]
    return state


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-5, rtol=0), name


def training_checkpoint(base: Path, place: Path, pairs: dict[str, Tensor], *, tower: bool) -> Path:
    """What the official code saves while it trains with LoRA: PEFT's names inside the model's own."""
    state = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        wrapped = name.startswith("language_model.") or (tower and name.startswith("vision_model."))
        part, _, rest = name.partition(".")
        taught = f"{name.removesuffix('.weight')}.lora_A" in pairs
        new = f"{part}.{INNER}{rest}" if wrapped else name
        state[new.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias") if taught else new] = tensor
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.lora_A" in pairs:
            state[new.replace(".bias", ".base_layer.bias")] = state.pop(new)
    for name, tensor in pairs.items():
        part, _, rest = name.partition(".")
        state[f"{part}.{INNER}{rest}.default.weight"] = tensor
    place.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (place / file.name).write_bytes(file.read_bytes())
    raw = {**json.loads((base / "config.json").read_text()), "use_llm_lora": RANK, "use_backbone_lora": RANK if tower else 0}
    (place / "config.json").write_text(json.dumps(raw))
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    return place


def xtuner_state(pairs: dict[str, Tensor], base: Path) -> dict[str, Tensor]:
    """What XTuner saves of a model: the pairs and all of the projector."""
    state = {}
    for name, tensor in pairs.items():
        part, _, rest = name.partition(".")
        state[f"model.{part}.{INNER}{rest}.default.weight"] = tensor
    return state | {f"model.{n}": t + 0.05 for n, t in load_file(base / "model.safetensors").items() if n.startswith("mlp1.")}
