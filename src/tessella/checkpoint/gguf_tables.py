"""What llama.cpp calls our parameters, and what it wants told about a model: for the language model and for the tower.

In: a ModelConfig and shapes by our names.  Out: Named tensors, and the keys of the two files; or an error that names what
llama.cpp could not be checked on. In "llama" it turns neighbours of a head where others turn its halves: rows of q and k move.
It lays the class token behind the patches before it adds the table of places: the table's first row moves to the end.
Source: gguf-py and tools/mtmd of ggml-org/llama.cpp, as in xllamacpp 2026.10.11549, asked in bench/llama_cpp.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tessella.checkpoint.layout import IMAGENET_MEAN, IMAGENET_STD
from tessella.config import ConnectorConfig, ModelConfig
from tessella.errors import ConfigError

ARCHITECTURES = {"InternLM2ForCausalLM": "llama", "LlamaForCausalLM": "llama"}
ARCHITECTURES |= {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
LAYER, TOWER_LAYER = "language_model.model.layers.", "vision_model.encoder.layers."
IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
IN_TOWER_LAYER = {
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "norm1": "ln1",
    "norm2": "ln2",
}
ALONE = {
    "language_model.model.embed_tokens.weight": "token_embd.weight",
    "language_model.model.norm.weight": "output_norm.weight",
    "language_model.lm_head.weight": "output.weight",
    "vision_model.embeddings.class_embedding": "v.class_embd",
    "vision_model.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "vision_model.embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "vision_model.embeddings.position_embedding": "v.position_embd.weight",
}
Move = Literal["none", "halves to neighbours", "first row last", "flat"]


@dataclass(frozen=True)
class Named:
    """One tensor of a file."""

    ours: str
    theirs: str
    move: Move = "none"
    heads: int = 0  # whose halves become neighbours
    wide: bool = False  # float32, whatever it is stored in: llama.cpp computes with these so

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """Our parameter as the file has it."""
        if self.move == "halves to neighbours":
            return tensor.reshape(self.heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if self.move == "first row last":
            rows = tensor.reshape(-1, tensor.shape[-1])
            return torch.cat([rows[1:], rows[:1]])
        return tensor.reshape(-1) if self.move == "flat" else tensor

    def to_ours(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The way back, for the proof."""
        if self.move == "halves to neighbours":
            return tensor.reshape(self.heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if self.move == "first row last":
            return torch.cat([tensor[-1:], tensor[:-1]]).reshape(shape)
        return tensor.reshape(shape)


def refuse_unchecked(config: ModelConfig) -> None:
    """Raises ConfigError for what could not be checked against llama.cpp: the answer may be another there, silently."""
    language, vision = config.language, config.vision
    why = ""
    if config.family != "internvl" or config.connector != ConnectorConfig():
        why = f'a {config.family} model with the connector "{config.connector.kind}"'
    elif language.architecture not in ARCHITECTURES:
        why = f"a {language.architecture.removesuffix('ForCausalLM')} decoder"
    elif language.rope_long is not None or language.rope_llama3 is not None:
        why = "stretched rotary angles (longrope, llama3)"
    elif language.output_bias or (language.qkv_bias and language.architecture != "Qwen2ForCausalLM"):
        why = "biases in the decoder's attention"
    elif vision.norm != "layer_norm" or vision.qk_norm or not vision.qkv_bias:
        why = "InternViT-6B (RMSNorm, norms of q and k), which llama.cpp knows by its full size alone,"
    elif config.select_layer != -1 or config.pixel_shuffle_version != "v2":
        why = f"select_layer {config.select_layer} with pixel shuffle {config.pixel_shuffle_version}"
    if why:
        raise ConfigError(
            f"{why} could not be checked against llama.cpp, so it is not written as GGUF; checked are InternLM2, Llama, Qwen2 "
            "and Qwen3 shapes with InternViT-300M; take --to native, and llama.cpp's own converter"
        )


def language_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Named]:
    """The tensors of the language model's file."""
    return [_named(name, config, shapes) for name in shapes if name.startswith("language_model.")]


def tower_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Named]:
    """The tensors of the tower's and the projector's file."""
    return [_named(name, config, shapes) for name in shapes if not name.startswith("language_model.")]


def _named(name: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Named:
    language = config.language
    wide = len(shapes[name]) != 2
    if name in ALONE:
        move: Move = "first row last" if "position" in name else "flat" if "class" in name else "none"
        return Named(name, ALONE[name], move, wide=wide)
    if name.startswith("mlp1."):
        return Named(name, f"mm.model.mlp.{name.removeprefix('mlp1.')}", wide=wide)
    begin, table, short = (LAYER, IN_LAYER, "blk") if name.startswith(LAYER) else (TOWER_LAYER, IN_TOWER_LAYER, "v.blk")
    layer, _, rest = name.removeprefix(begin).partition(".")
    module, _, leaf = rest.rpartition(".")
    theirs = f"{short}.{layer}.{table[module]}.{leaf}" if module else f"{short}.{layer}.{leaf}.weight"  # a bare one: ls1, ls2
    heads = {"self_attn.q_proj": language.num_heads, "self_attn.k_proj": language.num_kv_heads}.get(module, 0)
    if heads and ARCHITECTURES[language.architecture] == "llama":
        return Named(name, theirs, "halves to neighbours", heads, wide)
    return Named(name, theirs, wide=wide)


def tower_numbers(config: ModelConfig) -> dict[str, int | float | list[float]]:
    """The keys of the tower's file behind "clip.vision."."""
    vision = config.vision
    return {
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "block_count": vision.num_layers,
        "projection_dim": config.language.hidden_size,
        "attention.head_count": vision.num_heads,
        "projector.scale_factor": round(1 / config.downsample_ratio),
        "preproc_min_tiles": config.min_tiles,
        "preproc_max_tiles": config.max_tiles,
        "attention.layer_norm_epsilon": vision.norm_eps,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
