"""Tiny random models and official folders with a real tokenizer, for every test that needs one.

In: an architecture ("InternLM2ForCausalLM", "LlamaForCausalLM", …), or a family by its name.  Out: ModelConfig, model, folder.
The weights are random with a spread that makes logits differ clearly (their standard deviation is about 1).
"""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tessella.chat import TEMPLATES as TEMPLATES_BY_NAME
from tessella.checkpoint.layout import generation_config, official_config, preprocessor_config
from tessella.checkpoint.names import groups_of
from tessella.config import LanguageConfig, Llama3Rope, LongRope, ModelConfig, VisionConfig
from tessella.model.vision_language import VisionLanguageModel

ARCHITECTURES = ("InternLM2ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM")
TEMPLATES = {"InternLM2ForCausalLM": "internlm2-chat", "LlamaForCausalLM": "chatml", "Qwen2ForCausalLM": "Hermes-2"}
TEMPLATES |= {"Qwen3ForCausalLM": "internvl2_5", "Phi3ForCausalLM": "phi3-chat", "InternLM3ForCausalLM": "internvl2_5"}
FAMILIES = {
    "InternLM2": "InternLM2ForCausalLM",
    "InternVL-Chat 1.5": "InternLM2ForCausalLM",
    "Mini-InternVL": "InternLM2ForCausalLM",
    "InternLM3": "InternLM3ForCausalLM",
    "Yi": "LlamaForCausalLM",
    "Llama 3.1": "LlamaForCausalLM",
    "Qwen2": "Qwen2ForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
    "Phi-3": "Phi3ForCausalLM",
}
# The base of the rotary angles that each family's decoders are published with. transformers fills in 1e4 where none is told.
ROPE_THETAS = {"Yi": 5e6, "Llama 3.1": 5e5, "Phi-3": 1e4, "InternLM3": 5e7}
CONTROL_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|plugin|>", "<|interpreter|>", "<|action_end|>")
CONTROL_TOKENS += ("<|action_start|>", "<|im_end|>", "<|im_start|>")
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEXTS = (
    "What is in this picture? It is a red apple on a white plate.",
    "Please describe the image shortly. There are 3 bowls of rice and 12 dumplings.",
    "You are an AI assistant. What is the capital of France? The capital of France is Paris.",
    "system user assistant Image-1: Image-2: question answer photo dish food name the",
    "图中是什么食物？这是红烧肉。请描述图片。你好，我是一个模型。",
)


LONG_ROPE = LongRope(
    short_factor=tuple(1 + 0.05 * i for i in range(8)),
    long_factor=tuple(1.5 + i for i in range(8)),
    original_positions=224,
    attention_factor=math.sqrt(1 + math.log(4096 / 224) / math.log(224)),
)


@cache
def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of 512 entries taught on TEXTS, control tokens among them, then InternVL's nine and Phi-3's four."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(CONTROL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in IMAGE_TOKENS + PHI3_TOKENS])
    return tokenizer


def tiny_config(architecture: str, *, tie_embeddings: bool = False) -> ModelConfig:
    """56 px tiles of 4 visual tokens, 2 layers of tower, 2 of decoder with grouped queries; each family's own flags."""
    is_internlm2, is_qwen2 = architecture == "InternLM2ForCausalLM", architecture == "Qwen2ForCausalLM"
    language = LanguageConfig(
        architecture=architecture,
        vocab_size=tiny_tokenizer().get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_dynamic_factor=2.0 if is_internlm2 else None,
        rope_long=LONG_ROPE if architecture == "Phi3ForCausalLM" else None,
        max_positions=4096,
        qkv_bias=is_qwen2,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_embeddings=tie_embeddings,
    )
    vision = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, image_size_px=56, layer_scale_init=0.5)
    return ModelConfig(vision, language, TEMPLATES[architecture], tile_size_px=56, max_tiles=12, context_tokens=4096)


def family(name: str) -> ModelConfig:
    """A tiny model of one family of published checkpoints; each also has something that only its kind has."""
    config = tiny_config(FAMILIES[name])
    config = replace(config, language=replace(config.language, rope_theta=ROPE_THETAS.get(name, 1e6)))
    if name == "Llama 3.1":
        config = replace(config, language=replace(config.language, rope_llama3=Llama3Rope(8.0, 1.0, 4.0, 64)))
    if name in ("Yi", "InternVL-Chat 1.5"):  # the families with the 6B tower
        vision = replace(config.vision, norm="rms_norm", qkv_bias=False, qk_norm=True, layer_scale_init=0.1)
        config = replace(config, vision=vision)
    if name in ("Yi", "Llama 3.1"):
        config = replace(config, template="Hermes-2" if name == "Yi" else "internlm2-chat")
    if name == "Qwen3":  # heads that do not add up to the width, and a head that is the table
        config = replace(config, language=replace(config.language, head_dim=24, tie_embeddings=True))
    if name == "InternLM3":
        config = replace(config, language=replace(config.language, rope_dynamic_factor=6.0))
    if name == "Mini-InternVL":
        config = replace(config, max_tiles=6, select_layer=-2)
    return config


def tiny_model(config: ModelConfig, seed: int = 0) -> VisionLanguageModel:
    """A model of that config with seeded random float32 weights, in eval mode."""
    model = VisionLanguageModel(config)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=chance)
            if weight.dim() == 1:  # norms and layer scales lie around their start, biases around 0
                weight.copy_(0.1 * noise if name.endswith("bias") else weight + 0.1 * noise)
            elif "embed_tokens" in name and config.language.tie_embeddings:  # as a head it must not only repeat what it read
                weight.copy_(noise / weight.shape[1] ** 0.5)
            elif "embedding" in name or "embed_tokens" in name:
                weight.copy_(noise if weight.dim() != 4 else noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.eval()


def tiny_folder(
    path: Path,
    architecture: str,
    seed: int = 0,
    *,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> Path:
    """Write an official folder at path and give it back. sharded: two shards and an index."""
    config = config or tiny_config(architecture)
    model = tiny_model(config, seed)
    ours = {name: weight.detach().to(dtype) for name, weight in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for group in groups_of(ours, "official", config.language):
        state |= group.to_stored([ours[name] for name in group.ours], config.language)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    path.mkdir(parents=True, exist_ok=True)
    write_weights(path, state, sharded)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    end = tokenizer.token_to_id(TEMPLATES_BY_NAME[config.template].end)
    bos = architecture == "InternLM2ForCausalLM"
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos, "tokenizer_class": "PreTrainedTokenizerFast"}
    for file, content in {
        "config.json": official_config(config, str(dtype).removeprefix("torch.")),
        "generation_config.json": generation_config({}, [end]),
        "preprocessor_config.json": preprocessor_config(config),
        "tokenizer_config.json": tokens,
    }.items():
        (path / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def write_weights(path: Path, state: dict[str, Tensor], sharded: bool) -> None:
    """model.safetensors, or two shards and their index."""
    if not sharded:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    halves = {"model-00001-of-00002.safetensors": names[: len(names) // 2]}
    halves["model-00002-of-00002.safetensors"] = names[len(names) // 2 :]
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    total = sum(weight.numel() * weight.element_size() for weight in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
