"""The decoder: embeddings become logits. One file for the InternLM2, Llama, Qwen2, Qwen3 and Phi-3 shapes.

In: embeddings (T, D) of all rows back to back.  Out: hidden states (T, D), then logits (T, V).
T tokens, D width, V vocabulary, Hq and Hk heads of width d.  Parameter names are Llama's in the official checkpoint;
checkpoint/names.py maps the fused tensors of InternLM2 and Phi-3 onto them.
Source: modeling_internlm2.py of OpenGVLab/InternVL at 2410d1d; Llama, Qwen2, Qwen3 and Phi-3 of huggingface/transformers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tessella.config import LanguageConfig
from tessella.model.attend import Attend
from tessella.model.layers import RMSNorm, rotary, rotate


class Attention(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int):
        super().__init__()
        d, width = config.head_dim, config.hidden_size
        self.layer, self.head_dim = layer, d
        self.q_proj = nn.Linear(width, config.num_heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * d, width, bias=config.output_bias)
        self.q_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()  # over each head by itself
        self.k_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        seen = attend(self.layer, rotate(self.q_norm(q), *turn), rotate(self.k_norm(k), *turn), v)
        seen = seen.flatten(1)
        return self.o_proj(seen if wanted is None else seen.index_select(0, wanted))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """x (T, D) -> (T, D), or (L, D) of the places `wanted`: the others are spared what comes behind attention."""
        seen = self.self_attn(self.input_layernorm(x), turn, attend, wanted)
        x = (x if wanted is None else x.index_select(0, wanted)) + seen
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class LanguageModel(nn.Module):
    """Decoder and head. A tied head has no parameter of its own and reads the embedding table."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (T,) -> embeddings (T, D)."""
        return self.model.embed_tokens(ids)

    def forward(
        self, embeddings: Tensor, positions: Tensor, attend: Attend, length: int, first: int = 0, end: int | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """embeddings (T, D), positions (T,) within each row -> normed hidden states (T, D), or (L, D) of the places `wanted`.

        length: tokens of the longest row when the run is over; it alone decides whether RoPE is stretched, so that a
        cached run and an uncached one turn by the same angles.
        first, end: run only the layers first <= i < end; embeddings are then the states before layer `first`, and with an end
        the states before layer `end` come out, not normed.
        """
        return self.run(embeddings, rotary(self.config, positions, length, embeddings.dtype), attend, first, end, wanted)

    def run(
        self, embeddings: Tensor, turn: tuple[Tensor, Tensor], attend: Attend, first: int = 0, end: int | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """forward with the cosine and sine (T, 1, d) of each token's angles in place of positions and length."""
        x, last = embeddings, len(self.model.layers) - 1
        for number, layer in enumerate(self.model.layers[first:end], first):
            x = layer(x, turn, attend, wanted if number == last else None)
        return self.model.norm(x) if end is None else x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, D) -> logits (T, V)."""
        return F.linear(hidden, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
