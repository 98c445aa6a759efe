"""The decoder on a GPU in 16-bit types: joined products, and one kernel each for what lies between them.

In: a model, whose weights are joined in place.  Out: hidden states and logits, as language.py computes them.
T tokens, C width, V vocabulary; the joined product of a layer has all queries, then all keys, then all values as its columns.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.engine.kernels.attend import HeadNorms, Heads
from tessella.engine.kernels.products import product
from tessella.engine.kernels.steps import add_norm, gate, rms_norm
from tessella.engine.lora import Adapters
from tessella.model.language import Layer
from tessella.model.layers import RMSNorm
from tessella.model.vision_language import VisionLanguageModel

HEAD = "language_model.lm_head"  # a tied head has no such module, and no adapter changes it
ROWS_TOGETHER = 64  # the head's rows are filled up to a multiple of these


class JoinedAttend(Protocol):
    """An Attend that takes a layer's joined product as it comes, and norms and turns its heads itself."""

    def __call__(self, layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        """qkv (T, columns) -> (T, Hq * D)."""
        ...


class Share(NamedTuple):
    """One linear layer's columns of a joined product."""

    module: str
    columns: int


class FastLayer:
    """One layer's weights, joined; the model's own parameters become views of them, so nothing is held twice."""

    def __init__(self, layer: Layer, name: str):
        attention, mlp = layer.self_attn, layer.mlp
        projections = {"q_proj": attention.q_proj, "k_proj": attention.k_proj, "v_proj": attention.v_proj}
        gates = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}
        self.qkv, self.qkv_bias = joined(list(projections.values()))
        self.gate_up, _ = joined(list(gates.values()))
        self.qkv_shares = [Share(f"{name}.self_attn.{one}", linear.out_features) for one, linear in projections.items()]
        self.gate_shares = [Share(f"{name}.mlp.{one}", linear.out_features) for one, linear in gates.items()]
        self.out, self.down = attention.o_proj, mlp.down_proj
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norms: HeadNorms | None = None
        if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
            self.head_norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)


class FastDecoder:
    """adapters: what is added to each layer's products in a step that is not captured. single: whether a single token goes
    through the kernels of products.py instead of cuBLAS."""

    def __init__(self, model: VisionLanguageModel, adapters: Adapters, *, single: bool):
        language = model.config.language
        self.heads = Heads(language.num_heads, language.num_kv_heads, language.head_dim)
        self.norm = model.language_model.model.norm
        table = model.language_model.model.embed_tokens.weight
        self.vocabulary = len(table)
        self.layers = []
        with torch.inference_mode(table.is_inference()):  # parameters stay what they are
            for i, layer in enumerate(model.language_model.model.layers):
                assert isinstance(layer, Layer)
                self.layers.append(FastLayer(layer, f"language_model.model.layers.{i}"))
            head = model.language_model.lm_head
            self.head = padded(model.language_model.model.embed_tokens if head is None else head)
        self.table = model.language_model.model.embed_tokens.weight
        self._adapters = adapters
        self._single = single

    def run(self, embeddings: Tensor, attend: JoinedAttend) -> Tensor:
        """embeddings (T, C) -> normed hidden states (T, C)."""
        if self._alone(embeddings):
            return self._run_one(embeddings, attend)
        x = embeddings
        hidden = rms_norm(x, self.layers[0].norm.weight, self.layers[0].norm.eps)
        for number, layer in enumerate(self.layers):
            qkv = self._added(F.linear(hidden, layer.qkv, layer.qkv_bias), hidden, layer.qkv_shares)
            x, hidden = add_norm(x, layer.out(attend(number, qkv, layer.head_norms)), layer.mlp_norm.weight, layer.mlp_norm.eps)
            gates = self._added(F.linear(hidden, layer.gate_up), hidden, layer.gate_shares)
            after = self.layers[number + 1].norm if number + 1 < len(self.layers) else self.norm
            x, hidden = add_norm(x, layer.down(gate(gates)), after.weight, after.eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, C) -> (T, V); a row's numbers lie together, rows perhaps apart."""
        if self._alone(hidden):
            return product(hidden, self.head[: self.vocabulary])
        logits = F.linear(hidden, self.head)[:, : self.vocabulary]
        self._adapters.add(HEAD, hidden, logits)
        return logits

    def _alone(self, x: Tensor) -> bool:
        return self._single and len(x) == 1 and not self._adapters.runs

    def _run_one(self, x: Tensor, attend: JoinedAttend) -> Tensor:
        """The same for one token: six launches a layer."""
        for number, layer in enumerate(self.layers):
            qkv = product(x, layer.qkv, norm=layer.norm.weight, eps=layer.norm.eps, bias=layer.qkv_bias)
            seen = attend(number, qkv, layer.head_norms)
            x = product(seen, layer.out.weight, bias=layer.out.bias, residual=x)
            gated = product(x, layer.gate_up, norm=layer.mlp_norm.weight, eps=layer.mlp_norm.eps, gated=True)
            x = product(gated, layer.down.weight, residual=x)
        return rms_norm(x, self.norm.weight, self.norm.eps)

    def _added(self, out: Tensor, x: Tensor, shares: Sequence[Share]) -> Tensor:
        """A joined product of x with what the adapters of this pass add to each part of it. The other products' hooks do it."""
        at = 0
        for module, columns in shares if self._adapters.runs else ():
            self._adapters.add(module, x, out[:, at : at + columns])
            at += columns
        return out


def joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Their weights, one over the other, and their biases; the layers' own become views of these."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    places = [linear.out_features for linear in linears]
    for linear, part in zip(linears, weight.split(places), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return weight, None
    bias = torch.cat([linear.bias.detach() for linear in linears])
    for linear, part in zip(linears, bias.split(places), strict=True):
        linear.bias.data = part
    return weight, bias


def padded(layer: nn.Linear | nn.Embedding) -> Tensor:
    """A head's weight with rows of zeros behind it; the layer's own becomes a view of it.

    Nothing is held twice. With InternVL2's 92,553 rows cuBLAS falls back to kernels of an older GPU: 1.05 ms for 256 rows on an
    H200, where reading the weights takes 0.1 (docs/log.md, 2026-11-30).
    """
    weight = layer.weight.detach()
    rows, width = weight.shape
    missing = -rows % ROWS_TOGETHER
    if not missing:
        return weight
    whole = torch.cat((weight, weight.new_zeros(missing, width)))
    layer.weight.data = whole[:rows]
    return whole
