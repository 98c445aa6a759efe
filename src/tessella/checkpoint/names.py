"""Weight names: a layout's tensors <-> our parameters, as tables.

In: a tensor's name in a file, or ours.  Out: the Group it belongs to: the names on both sides, and how rows are shared out.
Our names are those of a Llama- or Qwen-type official checkpoint: q, k, v, gate and up apart, the tower's qkv in one.
A layout stores some of them together or apart. In each group at least one side is a single tensor, and a rule says which of
its rows belong to which part; the rule holds for weights, biases and the B of a low-rank pair alike.
H query heads, K key-value heads, d width of a head.
Source: modeling_internlm2.py and modeling_intern_vit.py of OpenGVLab/InternVL at 2410d1d; InternVL, Llama and Phi-3 of
huggingface/transformers at 5.23.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from tessella.checkpoint.relative_names import BLIP2, CLIP, INSTRUCTBLIP, LLAVA
from tessella.checkpoint.streams import Strips, joined
from tessella.config import LanguageConfig, ModelConfig
from tessella.errors import CheckpointError

# transformers has a layout for each of the relatives
Layout = Literal["official", "native", "llava", "llava_next", "blip2", "instructblip"]
Rows = Literal["equal", "qkv", "grouped"]  # equal parts; q, k, v one after another; InternLM2's order (see row_order)
Rowed = TypeVar("Rowed", Tensor, Strips)  # numbers in memory, or where their bytes lie in files

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# Buffers that some writers stored and that are computed, not learned: read past, and listed as unused.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|rotary_emb\.(cos|sin)_cached)$")


@dataclass(frozen=True)
class Group:
    """Tensors that stand for one another, ours and stored. Names are of parameters or of modules, as asked."""

    ours: tuple[str, ...]
    stored: tuple[str, ...]
    rows: Rows = "equal"

    def to_ours(self, stored: Sequence[Rowed], language: LanguageConfig) -> dict[str, Rowed]:
        """The stored tensors, in the group's order -> our parameters."""
        return dict(zip(self.ours, _regrouped(stored, len(self.ours), self.rows, language, self.stored), strict=True))

    def to_stored(self, ours: Sequence[Rowed], language: LanguageConfig) -> dict[str, Rowed]:
        """Our parameters, in the group's order -> the stored tensors."""
        return dict(zip(self.stored, _regrouped(ours, len(self.stored), self.rows, language, self.ours), strict=True))


# ---- the tables: modules (or parameters without a module) by their path, # for the number of the layer

_OURS, _TOWER, _NATIVE_TOWER = "language_model.model.layers.#.", "vision_model.encoder.layers.#.", "vision_tower.encoder.layer.#."
_QKV = tuple(f"{_OURS}self_attn.{part}_proj" for part in "qkv")
_GATE_UP = (f"{_OURS}mlp.gate_proj", f"{_OURS}mlp.up_proj")


def _renamed(pairs: Mapping[str, str]) -> tuple[Group, ...]:
    return tuple(Group((ours,), (stored,)) for ours, stored in pairs.items())


_INTERNLM2 = (
    Group(_QKV, (f"{_OURS}attention.wqkv",), "grouped"),
    *_renamed(
        {
            "language_model.model.embed_tokens": "language_model.model.tok_embeddings",
            f"{_OURS}self_attn.o_proj": f"{_OURS}attention.wo",
            f"{_OURS}mlp.gate_proj": f"{_OURS}feed_forward.w1",
            f"{_OURS}mlp.up_proj": f"{_OURS}feed_forward.w3",
            f"{_OURS}mlp.down_proj": f"{_OURS}feed_forward.w2",
            f"{_OURS}input_layernorm": f"{_OURS}attention_norm",
            f"{_OURS}post_attention_layernorm": f"{_OURS}ffn_norm",
            "language_model.lm_head": "language_model.output",
        }
    ),
)
_PHI3 = (Group(_QKV, (f"{_OURS}self_attn.qkv_proj",), "qkv"), Group(_GATE_UP, (f"{_OURS}mlp.gate_up_proj",)))
_NATIVE = (
    Group((f"{_TOWER}attn.qkv",), tuple(f"{_NATIVE_TOWER}attention.{part}_proj" for part in "qkv")),
    *_renamed(
        {
            "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
            "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
            "vision_model.embeddings.patch_embedding": "vision_tower.embeddings.patch_embeddings.projection",
            f"{_TOWER}attn.proj": f"{_NATIVE_TOWER}attention.projection_layer",
            f"{_TOWER}attn.q_norm": f"{_NATIVE_TOWER}attention.q_norm",
            f"{_TOWER}attn.k_norm": f"{_NATIVE_TOWER}attention.k_norm",
            f"{_TOWER}mlp.fc1": f"{_NATIVE_TOWER}mlp.fc1",
            f"{_TOWER}mlp.fc2": f"{_NATIVE_TOWER}mlp.fc2",
            f"{_TOWER}norm1": f"{_NATIVE_TOWER}layernorm_before",
            f"{_TOWER}norm2": f"{_NATIVE_TOWER}layernorm_after",
            f"{_TOWER}ls1": f"{_NATIVE_TOWER}lambda_1",
            f"{_TOWER}ls2": f"{_NATIVE_TOWER}lambda_2",
            "mlp1.0": "multi_modal_projector.layer_norm",
            "mlp1.1": "multi_modal_projector.linear_1",
            "mlp1.3": "multi_modal_projector.linear_2",
        }
    ),
)
_LLAVA = (Group((f"{_TOWER}attn.qkv",), tuple(f"{CLIP}self_attn.{part}_proj" for part in "qkv")), *_renamed(LLAVA))
# What is not in a layout's table has one name on both sides. InternLM2 has its own words in the official layout alone.
_OFFICIAL = {"InternLM2ForCausalLM": _INTERNLM2, "Phi3ForCausalLM": _PHI3}
_NATIVE_LANGUAGE = {"Phi3ForCausalLM": _PHI3}
_TABLES = {
    "native": _NATIVE,
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "blip2": _renamed(BLIP2),
    "instructblip": _renamed(INSTRUCTBLIP),
}

# transformers calls its modules so in memory, and so do adapters; its save_pretrained writes the second form into files.
_IN_MEMORY = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
# The published folders have one module more around CLIP than transformers 5 has in memory and writes; it reads both forms.
_LLAVA_IN_MEMORY = (
    ("model.image_newline.", "image_newline."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    *(pair for pair in _IN_MEMORY if "vision" not in pair[0]),
)
_LLAVA_FORMS = (
    *((f"{place}vision_tower.vision_model.", "vision_tower.vision_model.") for place in ("model.", "")),  # transformers 4's
    *_LLAVA_IN_MEMORY,
    ("vision_tower.", "vision_tower.vision_model."),
)
_FORMS = {"native": _IN_MEMORY, "llava": _LLAVA_FORMS, "llava_next": _LLAVA_FORMS}
_MEMORY_FORMS = {"native": _IN_MEMORY, "llava": _LLAVA_IN_MEMORY, "llava_next": _LLAVA_IN_MEMORY}
_LAYER = re.compile(r"\.(layers?)\.(\d+)\.")


@cache
def _table(layout: Layout, architecture: str) -> tuple[dict[str, Group], dict[str, Group]]:
    """The groups by our paths, and by stored ones."""
    if layout == "official":
        groups: tuple[Group, ...] = _OFFICIAL.get(architecture, ())
    else:
        groups = (*_TABLES[layout], *_NATIVE_LANGUAGE.get(architecture, ()))
    return {path: group for group in groups for path in group.ours}, {path: group for group in groups for path in group.stored}


# ---- names


def native_layout(config: ModelConfig) -> Layout:
    """The layout that transformers has for a model."""
    return next((layout for layout in get_args(Layout) if layout == config.family), "native")


def group_of(ours: str, layout: Layout, language: LanguageConfig) -> Group:
    """The group of one of our parameters or modules."""
    return _find(ours, _table(layout, language.architecture)[0])


def group_of_stored(stored: str, layout: Layout, language: LanguageConfig) -> Group:
    """The group of a tensor or module of a file; native names may be those of files or those in memory."""
    return _find(as_in_files(stored, layout), _table(layout, language.architecture)[1])


def groups_of(ours: Iterable[str], layout: Layout, language: LanguageConfig) -> list[Group]:
    """The groups of all our parameters, each once, in the order of their first member."""
    return list(dict.fromkeys(group_of(name, layout, language) for name in ours))


def as_in_files(native: str, layout: Layout = "native") -> str:
    """A name of one of transformers' layouts as it stands in files, whichever form it has; official names have but one."""
    return _with_prefix(native, _FORMS.get(layout, ()))


def as_in_memory(native: str, layout: Layout = "native") -> str:
    """A native name as transformers calls the module in memory; adapters for native models use these."""
    return _with_prefix(native, [(file, memory) for memory, file in _MEMORY_FORMS.get(layout, ())])


def is_computed(stored: str) -> bool:
    """Whether a tensor of that name is a computed buffer that we do not read."""
    return bool(COMPUTED.search(stored))


def official_name(ours: str, language: LanguageConfig) -> str:
    """Our parameter (or module) name -> the official one; parts that are stored together have one name in common."""
    (stored,) = group_of(ours, "official", language).stored
    return stored


def our_names(official: str, language: LanguageConfig) -> tuple[str, ...]:
    """An official parameter (or module) name -> ours, several where the file stores them together."""
    return group_of_stored(official, "official", language).ours


def _find(name: str, table: Mapping[str, Group]) -> Group:
    found = _LAYER.search(name)
    path = _LAYER.sub(r".\1.#.", name, count=1)
    for cut in (path, path.rpartition(".")[0]):  # a module or a bare parameter, else the module of a parameter
        if cut in table:
            number, leaf = found[2] if found else "", path[len(cut) :]
            ours, stored = (
                tuple(part.replace("#", number) + leaf for part in side) for side in (table[cut].ours, table[cut].stored)
            )
            return Group(ours, stored, table[cut].rows)
    return Group((name,), (name,))


def _with_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if f"{name}.".startswith(old):
            return (new + f"{name}."[len(old) :])[:-1]
    return name


# ---- rows


def row_counts(total: int, rows: Rows, language: LanguageConfig, parts: int, name: str) -> tuple[int, ...]:
    """Rows of each part of a fused tensor of that many rows. Raises CheckpointError naming the tensor when they do not fit."""
    heads, groups, d = language.num_heads, language.num_kv_heads, language.head_dim
    if rows == "equal":
        if total % parts:
            raise CheckpointError(f"{name} has {total} rows, which do not fall into {parts} equal parts")
        return (total // parts,) * parts
    if total != (heads + 2 * groups) * d:
        raise CheckpointError(f"{name} has {total} rows, must have {(heads + 2 * groups) * d} = (H + 2 K) d of llm_config")
    return heads * d, groups * d, groups * d


def row_order(counts: Sequence[int], rows: Rows, language: LanguageConfig) -> Iterator[tuple[int, slice]]:
    """How the rows of a fused tensor lie: (number of the part, its rows) one after another. counts: rows of each part.

    "equal": parts of one size. "qkv": H d rows of q, K d of k, K d of v. "grouped": for each key-value head its H / K query
    heads, its key, its value, d rows each.
    """
    groups = language.num_kv_heads if rows == "grouped" else 1
    for group in range(groups):
        for part, count in enumerate(counts):
            height = count // groups
            yield part, slice(group * height, (group + 1) * height)


def cut_rows(fused: Rowed, rows: Rows, language: LanguageConfig, parts: int = 3, name: str = "wqkv") -> tuple[Rowed, ...]:
    """The rows of a fused tensor -> those of its parts. Works for weights, biases and the B of a low-rank pair.

    "grouped" -> q (H d, …), k (K d, …), v (K d, …), in the order of the heads.
    Raises CheckpointError when the number of rows does not fit.
    """
    cut: list[list[Rowed]] = [[] for _ in range(parts)]
    begin = 0
    for part, there in row_order(row_counts(len(fused), rows, language, parts, name), rows, language):
        end = begin + there.stop - there.start
        cut[part].append(fused[begin:end])
        begin = end
    return tuple(_in_one(pieces) for pieces in cut)


def fuse_rows(parts: Sequence[Rowed], rows: Rows, language: LanguageConfig) -> Rowed:
    """The inverse of cut_rows."""
    return _in_one([parts[part][there] for part, there in row_order([len(part) for part in parts], rows, language)])


def _in_one(pieces: Sequence[Rowed]) -> Rowed:
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], Tensor):
        return torch.cat(list(pieces))
    return joined(pieces)


def _regrouped(
    given: Sequence[Rowed], wanted: int, rows: Rows, language: LanguageConfig, names: tuple[str, ...]
) -> tuple[Rowed, ...]:
    assert len(given) == len(names) and 1 in (wanted, len(given))
    if len(given) == wanted:
        return tuple(given)
    return cut_rows(given[0], rows, language, wanted, names[0]) if wanted > 1 else (fuse_rows(given, rows, language),)


def stored_shapes(group: Group, shapes: Mapping[str, tuple[int, ...]], language: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of a file must have, from our parameters' shapes."""
    parts = [shapes[name] for name in group.ours]
    if len(parts) == len(group.stored):
        return dict(zip(group.stored, parts, strict=True))
    total, rest = sum(part[0] for part in parts), parts[0][1:]
    counts = (total,) if len(group.stored) == 1 else row_counts(total, group.rows, language, len(group.stored), group.ours[0])
    return {name: (count, *rest) for name, count in zip(group.stored, counts, strict=True)}
