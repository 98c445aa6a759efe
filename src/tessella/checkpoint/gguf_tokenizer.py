"""A model folder's tokenizer and chat template in the keys of a GGUF file.

In: a folder, and how many rows its table of embeddings has.  Out: GgufTokens; or an error for a tokenizer that llama.cpp cuts
text with by a rule that could not be checked. It knows the first cut of byte-level ones by a name out of its own list ("pre");
SentencePiece's pieces carry their scores.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import sentencepiece

from tessella.chat import template_named
from tessella.checkpoint.jinja import chat_template
from tessella.checkpoint.tokenizer_files import native_tokenizer_files
from tessella.config import ModelConfig
from tessella.errors import ConfigError
from tessella.inputs import Inputs

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
QWEN2_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"


@dataclass(frozen=True)
class GgufTokens:
    model: str  # "gpt2" for byte-level BPE, "llama" for SentencePiece
    pre: str
    names: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_first: bool
    end_id: int
    bos_id: int | None
    template: str

    def put(self, file: gguf.GGUFWriter) -> None:
        file.add_tokenizer_model(self.model)
        file.add_tokenizer_pre(self.pre)
        file.add_token_list(self.names)
        file.add_token_types(self.types)
        if self.model == "gpt2":
            file.add_token_merges(self.merges)
        else:
            file.add_token_scores(self.scores)
            file.add_add_space_prefix(self.space_first)
        file.add_eos_token_id(self.end_id)
        file.add_add_bos_token(False)  # the template writes it
        if self.bos_id is not None:
            file.add_bos_token_id(self.bos_id)
        file.add_chat_template(self.template)


def gguf_tokens(folder: Path, config: ModelConfig) -> GgufTokens:
    """Raises ConfigError for a tokenizer that was not checked."""
    inputs = Inputs.load(folder, config)
    tokenizer, template = inputs.tokenizer, template_named(config.template)
    bos_id = tokenizer.bos_id if template.add_bos else None
    text = chat_template(template, None if bos_id is None else tokenizer.name_of(bos_id))
    added = {
        number: (token.name, CONTROL if token.special else USER_DEFINED) for number, token in tokenizer.added_tokens().items()
    }
    rows = config.language.vocab_size
    scores: list[float] = []
    merges: list[str] = []
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        model, pre = "llama", "default"
        pieces, scores, space_first = _pieces(folder / "tokenizer.model", rows)
    else:
        raw = json.loads(native_tokenizer_files(folder)["tokenizer.json"])
        model, pre, space_first = "gpt2", _first_cut(raw, folder), False
        pieces = {number: (piece, NORMAL) for piece, number in raw["model"]["vocab"].items()}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    pieces |= added
    found = [pieces.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    names, types = [name for name, _ in found], [kind for _, kind in found]
    return GgufTokens(model, pre, names, types, merges, scores, space_first, inputs.stop_ids[0], bos_id, text)


def _first_cut(raw: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the rule by which text is cut before the merges."""
    steps = raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") or [steps]
    kinds = [step.get("type") for step in steps]
    pattern = str((steps[0].get("pattern") or {}).get("Regex", ""))
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if (
        kinds == ["Split", "ByteLevel"]
        and pattern.startswith(QWEN2_CUT)
        and (raw.get("normalizer") or {}).get("type") in ("NFC", None)
    ):
        return "qwen2"
    raise ConfigError(
        f"{folder}: its tokenizer cuts text by a rule ({', '.join(map(str, kinds))}) that could not be checked against "
        "llama.cpp, so it is not written as GGUF; checked are SmolLM2's and Qwen2's byte-level ones, and SentencePiece"
    )


def _pieces(path: Path, rows: int) -> tuple[dict[int, tuple[str, int]], list[float], bool]:
    """SentencePiece's pieces by id with their types, a score for each row, and whether a text begins with a space."""
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    found = {}
    for number in range(model.vocab_size()):
        piece = str(model.id_to_piece(number))
        if model.is_unknown(number):
            kind = UNKNOWN
        elif model.is_control(number):
            kind = CONTROL
        elif model.is_unused(number):
            piece, kind = f"<unused_{number}>", UNUSED  # InternLM2's is NUL, which ends llama.cpp's names
        else:
            kind = BYTE if model.is_byte(number) else NORMAL
        found[number] = (piece, kind)
    scores = [float(model.get_score(number)) if number in found else -1000.0 for number in range(rows)]
    begins = model.encode("a")
    return found, scores, bool(begins) and str(model.id_to_piece(begins[0])).startswith("\u2581")
