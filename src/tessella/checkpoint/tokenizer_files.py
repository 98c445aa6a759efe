"""The tokenizer of a model folder as the two files that transformers reads for the native layout, whatever files it has.

In: a folder with tokenizer.json, or InternLM2's tokenizer.model, or Qwen2's vocab.json and merges.txt.
Out: tokenizer.json and tokenizer_config.json. No class of the tokenizer's own is needed to read them, and no remote code.
What was written gives the same ids as what was read, or is an error: both are asked before anything is kept.
Source: convert_slow_tokenizer.py of huggingface/transformers at 5.23; the format of tokenizer.json of huggingface/tokenizers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from tessella.checkpoint.jinja import SLOT, VIDEO
from tessella.config import read_json
from tessella.errors import CheckpointError
from tessella.tokenizer import Tokenizer, qwen2_json

# Typed by people and cut by rules: spaces, breaks, digits, Chinese, emoji, rare letters.
PROBES = (
    "What is in this picture?\nImage-1: a red apple,  3 bowls of rice and 12,345 dumplings.",
    " leading and trailing space ",
    "\n\n\tdef f(x):\n\t\treturn x**2  # a  b   c    d\r\n",
    "图中是什么食物？这是红烧肉——请描述图片……你好，我是“书生·万象”。",
    "Ünïcödé, ℵ₀, 𝔸, 👩‍🍳🥟, ﷽, ½, ｗｉｄｅ, \u3000, Ελληνικά, русский, 日本語, 한국어, ไทย",
    "user\n",
)
CONFIG_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "clean_up_tokenization_spaces")


def native_tokenizer_files(folder: Path) -> dict[str, str]:
    """File name -> text. Raises CheckpointError when the tokenizer cannot be written so that it gives the same ids."""
    source = Tokenizer.load(folder)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    raw = _vocabulary_json(folder, config)
    added = source.added_tokens()
    raw["added_tokens"] = [
        {
            "id": i,
            "content": t.name,
            "single_word": False,
            "lstrip": False,
            "rstrip": t.rstrip,
            "normalized": False,
            "special": t.special,
        }
        for i, t in sorted(added.items())
    ]
    bos = None if source.bos_id is None else source.name_of(source.bos_id)
    raw["post_processor"] = None if bos is None else _begin_with(bos, source.id_of(bos))
    raw |= {"truncation": None, "padding": None}
    _rename_pieces(raw)
    _check_same_ids(raw, source, folder)
    kept = {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": SLOT, "video_token": VIDEO}
    written = {
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "InternVLProcessor",
        "extra_special_tokens": named,  # the processor asks for these four by their names
    }
    return {
        "tokenizer.json": json.dumps(raw, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(written, indent=2, ensure_ascii=False) + "\n",
    }


def _vocabulary_json(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json without regard to its added tokens."""
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return sentencepiece_json(folder / "tokenizer.model")
    return qwen2_json(folder, config)


def sentencepiece_json(path: Path) -> dict[str, Any]:
    """A SentencePiece model of the BPE kind -> what a tokenizer.json would hold. Raises CheckpointError for other kinds.

    Its merges are not stored, but follow from the pieces: two pieces that make a third are merged, the likelier third first.
    Pieces that no merge makes (InternLM2's [UNUSED_TOKEN_3], which SentencePiece takes whole) are no longer made from text.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    # A piece marked as unused is never made from text (InternLM2's is NUL): renamed, it is not made in a tokenizer.json either.
    names = [f"<unused_{i}>" if model.is_unused(i) else str(model.id_to_piece(i)) for i in range(model.vocab_size())]
    plain = [
        i for i in range(len(names)) if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i) or model.is_unused(i))
    ]
    scores = {names[i]: float(model.get_score(i)) for i in plain}
    if any(score != round(score) for score in scores.values()):
        raise CheckpointError(f"{path} is not of the BPE kind, and the native layout is written for that kind alone")
    ids = {name: i for i, name in enumerate(names)}
    merges = []
    for name, score in scores.items():
        cuts = [(name[:k], name[k:]) for k in range(1, len(name)) if name[:k] in scores and name[k:] in scores]
        merges += [(-score, ids[left], ids[right]) for left, right in cuts]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    has_prefix = bool(model.encode("a")) and names[model.encode("a")[0]].startswith("\u2581")
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    prefix = {"type": "Prepend", "prepend": "\u2581"}
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [prefix, spaces]} if has_prefix else spaces,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else decoders,
        },
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [[names[left], names[right]] for _, left, right in sorted(merges)],
            "unk_token": names[model.unk_id()],
            "byte_fallback": any(model.is_byte(i) for i in range(len(names))),
            "fuse_unk": True,
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
        },
    }


def _begin_with(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts the bos in front of a text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _rename_pieces(raw: dict[str, Any]) -> None:
    """Give added tokens their own name in the vocabulary; InternLM2's <|im_end|> stands there as [UNUSED_TOKEN_145]."""
    vocabulary = raw["model"]["vocab"]
    pieces = {token_id: piece for piece, token_id in vocabulary.items()}
    for row in raw["added_tokens"]:
        if pieces.get(row["id"], row["content"]) != row["content"]:
            del vocabulary[pieces[row["id"]]]
            vocabulary[row["content"]] = row["id"]


def _check_same_ids(raw: dict[str, Any], source: Tokenizer, folder: Path) -> None:
    """Raises CheckpointError when a token or a text has other ids than in the folder."""
    written = tokenizers.Tokenizer.from_str(json.dumps(raw))
    for row in raw["added_tokens"]:
        found = written.token_to_id(row["content"])
        if found != row["id"]:
            raise CheckpointError(
                f'{folder}: "{row["content"]}" has the id {row["id"]}, in a tokenizer.json it would have {found}'
            )
    for text in PROBES:
        if written.encode(text, add_special_tokens=False).ids != source.encode(text, grounding=False):
            raise CheckpointError(f"{folder}: its tokenizer cannot be written as a tokenizer.json: {text!r} would have other ids")
