"""Weight names: the official checkpoint's tensors <-> our parameters.

In: a tensor's official name (and the tensor).  Out: our parameter name or names (and the tensors), and back.
Our names are those of a Llama- or Qwen2-type InternVL2 checkpoint, so for these two the table is the identity.
InternLM2 has other names and one fused wqkv, whose rows are grouped by key-value head.
H query heads, K key-value heads, d width of a head, D width of the language model.
Source: modeling_internlm2.py of OpenGVLab/InternVL at 2410d1d.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tessella.config import LanguageConfig
from tessella.errors import CheckpointError

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# Buffers that some writers stored and that are computed, not learned: read past, and listed as unused.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|rotary_emb\.(cos|sin)_cached)$")

# our word -> InternLM2's word, between dots; the order matters only in that no word is part of another
INTERNLM2_WORDS = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "language_model.lm_head": "language_model.output",
}
FUSED = "attention.wqkv"
FUSED_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def is_computed(official: str) -> bool:
    """Whether a tensor of that name is a computed buffer that we do not read."""
    return bool(COMPUTED.search(official))


def official_name(ours: str, language: LanguageConfig) -> str:
    """Our parameter (or module) name -> the official one; q, k and v of InternLM2 have one name in common."""
    if language.architecture != "InternLM2ForCausalLM" or not ours.startswith("language_model."):
        return ours
    for part in FUSED_PARTS:
        if f".{part}" in ours:
            return ours.replace(part, FUSED)
    for our_word, their_word in INTERNLM2_WORDS.items():
        if f".{our_word}." in f".{ours}.":
            return f".{ours}.".replace(f".{our_word}.", f".{their_word}.")[1:-1]
    return ours


def our_names(official: str, language: LanguageConfig) -> tuple[str, ...]:
    """An official parameter (or module) name -> ours: one name, or q, k, v for InternLM2's wqkv."""
    if language.architecture != "InternLM2ForCausalLM" or not official.startswith("language_model."):
        return (official,)
    if f".{FUSED}." in f"{official}.":
        return tuple(official.replace(FUSED, part) for part in FUSED_PARTS)
    for our_word, their_word in INTERNLM2_WORDS.items():
        if f".{their_word}." in f".{official}.":
            return (f".{official}.".replace(f".{their_word}.", f".{our_word}.")[1:-1],)
    return (official,)


def split_rows(fused: Tensor, language: LanguageConfig) -> tuple[Tensor, Tensor, Tensor]:
    """wqkv's rows -> those of q, k and v, in the order of the heads. Works for weights, biases and a LoRA's B.

    fused ((H + 2 K) d, …) -> q (H d, …), k (K d, …), v (K d, …).
    For each key-value head the rows are: its H / K query heads, its key, its value, d rows each.
    """
    groups, d = language.num_kv_heads, language.head_dim
    size = language.num_heads // groups + 2
    rest = fused.shape[1:]
    if fused.shape[0] != groups * size * d:
        raise CheckpointError(f"wqkv has {fused.shape[0]} rows, must have {groups * size * d} = (H + 2 K) d of llm_config")
    grouped = fused.reshape(groups, size, d, *rest)
    return (
        grouped[:, : size - 2].reshape(-1, *rest),
        grouped[:, size - 2].reshape(-1, *rest),
        grouped[:, size - 1].reshape(-1, *rest),
    )


def join_rows(q: Tensor, k: Tensor, v: Tensor, language: LanguageConfig) -> Tensor:
    """The inverse of split_rows: q (H d, …), k (K d, …), v (K d, …) -> wqkv ((H + 2 K) d, …)."""
    groups, d = language.num_kv_heads, language.head_dim
    rest = q.shape[1:]
    grouped = [x.reshape(groups, -1, d, *rest) for x in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def split(official: str, tensor: Tensor, language: LanguageConfig) -> dict[str, Tensor]:
    """One tensor of the file -> our parameters."""
    names = our_names(official, language)
    if len(names) == 1:
        return {names[0]: tensor}
    return dict(zip(names, split_rows(tensor, language), strict=True))


def join(official: str, ours: Mapping[str, Tensor], language: LanguageConfig) -> Tensor:
    """Our parameters -> one tensor of the file; ours is looked up by our names."""
    names = our_names(official, language)
    if len(names) == 1:
        return ours[names[0]]
    q, k, v = (ours[name] for name in names)
    return join_rows(q, k, v, language)


def official_shape(official: str, shapes: Mapping[str, tuple[int, ...]], language: LanguageConfig) -> tuple[int, ...]:
    """The shape that a tensor of the file must have, from our parameters' shapes."""
    parts = [shapes[name] for name in our_names(official, language)]
    return (sum(part[0] for part in parts), *parts[0][1:]) if parts[0] else ()
