"""Text to ids and back; special ids by name; whole characters as ids stream in.

In: a model folder with tokenizer.json, or InternLM2's tokenizer.model, or Qwen2's vocab.json and merges.txt.  Out: Tokenizer.
Ordinary text is encoded by the vocabulary alone, without the added tokens: a typed "<|im_end|>" stays text. Control tokens
are set by id, by whoever builds the prompt (inputs.py).
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tessella.errors import CheckpointError, PromptError
from tessella.routes import Routes

GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
# Qwen2Tokenizer of transformers: how text is split before byte-level BPE.
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(Protocol):
    """The learned part of a tokenizer, without added tokens."""

    size: int
    strip_first_space: bool  # the decoder drops one space in front of the whole text

    def encode(self, text: str) -> list[int]: ...

    def bytes_of(self, token_id: int) -> bytes: ...

    def piece_of(self, token_id: int) -> str | None: ...

    def find(self, piece: str) -> int | None: ...


@dataclass(frozen=True)
class Added:
    """A token that text never becomes by itself."""

    name: str
    special: bool = True  # decode leaves it out
    rstrip: bool = False  # a prompt drops the white space behind it, as Phi-3's


class Tokenizer:
    """Text <-> ids of one model. bos_id: the id that this family puts in front of a prompt, None if it puts none.

    routes: tokens behind the vocabulary that only the model itself says; vocab_size does not count them.
    """

    def __init__(self, vocabulary: Vocabulary, added: Mapping[int, Added], bos_id: int | None, routes: Routes | None = None):
        self.bos_id = bos_id
        self.routes = routes or Routes()
        self._vocabulary = vocabulary
        self._added = dict(added)
        self._ids = {token.name: token_id for token_id, token in added.items()}
        if len(self._ids) < len(self._added):
            twice = next(token.name for token_id, token in added.items() if self._ids[token.name] != token_id)
            raise CheckpointError(f'the tokenizer gives two ids to "{twice}"; copy the tokenizer files from the base model again')
        self.vocab_size = max([vocabulary.size, *(token_id + 1 for token_id in added)])
        self._said = {route.token_id: route.name.encode() for route in self.routes.each}
        grounding = [name for name in GROUNDING if name in self._ids]
        self._grounding = re.compile(f"({'|'.join(map(re.escape, grounding))})") if grounding else None
        # A vocabulary may hold an added token as a plain piece: InternLM2's <|im_end|> is its "[UNUSED_TOKEN_145]".
        pieces = {vocabulary.piece_of(token_id) for token_id in added} | set(self._ids)
        names = sorted((name for name in pieces if name and len(name) > 1), key=len, reverse=True)
        self._reserved = re.compile("|".join(map(re.escape, names))) if names else None

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Raises CheckpointError when the folder holds no tokenizer that we know, or a broken one."""
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        added = _side_tokens(folder, config)
        if (folder / "tokenizer.json").is_file():
            raw = _read_json(folder / "tokenizer.json")
            added = {**_json_tokens(raw, config), **added}
            vocabulary = JsonVocabulary(raw, folder)
            return cls(vocabulary, added, _bos_id(config, raw, added, vocabulary))
        if (folder / "tokenizer.model").is_file():
            pieces = SentencePieces(folder / "tokenizer.model")
            added = {**pieces.control_tokens(), **added}
            return cls(pieces, added, pieces.bos_id() if config.get("add_bos_token", True) else None)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = JsonVocabulary(qwen2_json(folder, config), folder)
            return cls(vocabulary, added, _bos_id(config, {}, added, vocabulary))
        raise CheckpointError(
            f"{folder} holds no tokenizer.json, tokenizer.model, or vocab.json with merges.txt; copy the base model's"
        )

    def with_routes(self, routes: Routes) -> "Tokenizer":
        """The same tokenizer of a model that has these routing tokens. Raises CheckpointError when their ids are taken."""
        if routes and routes.first_id < self.vocab_size:
            raise CheckpointError(
                f"routing tokens begin at the id {routes.first_id:,}, but the tokenizer has {self.vocab_size:,} tokens; "
                "the routing/ folder is of another model"
            )
        return Tokenizer(self._vocabulary, self._added, self.bos_id, routes)

    def encode(self, text: str, *, grounding: bool = True) -> list[int]:
        """Ordinary text -> ids. Added tokens in it stay text, but <ref>, <box>, <quad> and their ends are meant when grounding.

        Raises PromptError when the text cannot be written as UTF-8 (half of a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"character {error.start + 1} is half a surrogate pair, no UTF-8; save the text again") from error
        if not grounding or self._grounding is None:
            return self._ordinary(text)
        ids: list[int] = []
        for index, part in enumerate(self._grounding.split(text)):
            ids += [self._ids[part]] if index % 2 else self._ordinary(part)
        return ids

    def _ordinary(self, text: str) -> list[int]:
        ids = self._vocabulary.encode(text) if text else []
        if self._reserved is None or self._added.keys().isdisjoint(ids):
            return ids
        cuts = [found.start() + 1 for found in self._reserved.finditer(text)]  # broken in two, a name is only letters
        if not cuts:  # the token for unknown characters; it carries no power
            return ids
        parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        return [token_id for part in parts for token_id in self._ordinary(part)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, keep_grounding: bool = True) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD. Raises CheckpointError for an id outside the vocabulary."""
        stream = self.stream(skip_special=skip_special, keep_grounding=keep_grounding)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.end()

    def stream(self, *, skip_special: bool = True, keep_grounding: bool = True) -> "TextStream":
        return TextStream(self, skip_special, keep_grounding)

    def has(self, token: str) -> bool:
        return token in self._ids or self._vocabulary.find(token) is not None

    def strips_after(self, token: str) -> bool:
        """Whether a prompt drops the white space behind this control token."""
        return self._added[self._ids[token]].rstrip if token in self._ids else False

    def added_tokens(self) -> dict[int, Added]:
        """The tokens that text never becomes by itself, by id."""
        return dict(self._added)

    def name_of(self, token_id: int) -> str:
        """The name of one token. Raises CheckpointError when there is none."""
        added = self._added.get(token_id)
        name = self._vocabulary.piece_of(token_id) if added is None else added.name
        if name is None:
            raise CheckpointError(f"no token has the id {token_id:,} among the tokenizer's {self.vocab_size:,}")
        return name

    def id_of(self, token: str) -> int:
        """The id of one token by its name. Raises CheckpointError when there is none."""
        found = self._ids.get(token)
        if found is None:
            found = self._vocabulary.find(token)
        if found is None:
            raise CheckpointError(f"no token \"{token}\" among the tokenizer's {self.vocab_size:,}; use the model's tokenizer")
        return found

    def bytes_of(self, token_id: int, skip_special: bool, keep_grounding: bool) -> bytes:
        """What one id stands for in the text; b"" for a special token that is left out."""
        if token_id in self._said:
            return self._said[token_id]
        token = self._added.get(token_id)
        if token is not None:
            left_out = not keep_grounding if token.name in GROUNDING else token.special
            return b"" if skip_special and left_out else token.name.encode()
        if not 0 <= token_id < self.vocab_size:
            raise CheckpointError(f"id {token_id:,} is not among the tokenizer's {self.vocab_size:,}; use the model's tokenizer")
        # Between vocabulary and added tokens there may be a hole.
        return self._vocabulary.bytes_of(token_id) if token_id < self._vocabulary.size else b""

    @property
    def strips_first_space(self) -> bool:
        return self._vocabulary.strip_first_space


class TextStream:
    """Ids in, whole characters out; what push and end gave, joined, is decode of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, keep_grounding: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._keep_grounding = keep_grounding
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_first_space

    def push(self, token_id: int) -> str:
        """The characters that this id completes; "" while one is still open."""
        return self._text(self._tokenizer.bytes_of(token_id, self._skip_special, self._keep_grounding), False)

    def end(self) -> str:
        """What was still open, as U+FFFD."""
        return self._text(b"", True)

    def _text(self, data: bytes, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix(" ")
        return text


class JsonVocabulary:
    """A tokenizer.json without its added tokens and templates. raw: the parsed file."""

    def __init__(self, raw: Mapping[str, Any], folder: Path):
        with _TokenizersErrors(folder):
            self._backend = tokenizers.Tokenizer.from_str(
                json.dumps({**raw, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
            )
        kinds = {part["type"]: part for part in _flat_decoders(raw.get("decoder"))}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds.keys() & {"ByteFallback", "Metaspace"}:
            names = ", ".join(kinds) or "none"
            raise CheckpointError(f"{folder}: the tokenizer's decoder is {names}; known are ByteLevel, ByteFallback, Metaspace")
        metaspace = kinds.get("Metaspace", {})
        self.strip_first_space = "Strip" in kinds or metaspace.get("prepend_scheme", "never") != "never"
        ids = self._backend.get_vocab(with_added_tokens=False).values()
        self.size = max(ids, default=-1) + 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        piece = self.piece_of(token_id)
        if piece is None:
            return b""
        if not self._byte_level:
            return _piece_bytes(piece)
        table = _byte_of_letter()
        return bytes(table[letter] for letter in piece) if all(letter in table for letter in piece) else piece.encode()

    def piece_of(self, token_id: int) -> str | None:
        piece: str | None = self._backend.id_to_token(token_id)
        return piece

    def find(self, piece: str) -> int | None:
        found: int | None = self._backend.token_to_id(piece)
        return found


class SentencePieces:
    """InternLM2's tokenizer.model."""

    def __init__(self, path: Path):
        if hasattr(sentencepiece, "set_min_log_level"):  # from 0.2.1 on it tells stderr of InternLM2's NUL piece at every load
            sentencepiece.set_min_log_level(2)
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} is no SentencePiece model ({error}); fetch the file again") from error
        self.size: int = self._backend.vocab_size()
        first = self.encode("a")[:1]
        self.strip_first_space = bool(first) and self.bytes_of(first[0]).startswith(b" ")  # a dummy prefix; InternLM2 has none

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, out_type=int)
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        return _piece_bytes(self._backend.id_to_piece(token_id))

    def piece_of(self, token_id: int) -> str | None:
        return str(self._backend.id_to_piece(token_id)) if token_id < self.size else None

    def find(self, piece: str) -> int | None:
        found = int(self._backend.piece_to_id(piece))
        return found if self._backend.id_to_piece(found) == piece else None

    def bos_id(self) -> int | None:
        found = int(self._backend.bos_id())
        return found if found >= 0 else None

    def control_tokens(self) -> dict[int, Added]:
        """<unk>, <s>, </s>; they stand in front of the vocabulary."""
        named = (self._backend.unk_id(), self._backend.bos_id(), self._backend.eos_id())
        return {token_id: Added(self._backend.id_to_piece(token_id)) for token_id in named if token_id >= 0}


class _TokenizersErrors:
    """The tokenizers package raises plain Exception for a broken file; that one type, and no other, becomes CheckpointError."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is Exception:
            raise CheckpointError(f"{self._folder}: the tokenizer's files are broken ({error}); fetch them again") from error


def _piece_bytes(piece: str) -> bytes:
    """A SentencePiece piece: U+2581 is a space, <0xE4> is a byte."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    """The letters that stand for bytes in byte-level BPE. Source: bytes_to_unicode of GPT-2."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _flat_decoders(decoder: Any) -> list[Mapping[str, Any]]:
    if not decoder:
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder["decoders"] for part in _flat_decoders(inner)]
    return [decoder]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, must be an object; fetch the file again")
    return raw


def _json_tokens(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, Added]:
    """added_tokens of a tokenizer.json."""
    rows: Sequence[Mapping[str, Any]] = raw.get("added_tokens") or []
    return _without_video({int(row["id"]): _added(row) for row in rows}, config)


def _without_video(tokens: Mapping[int, Added], config: Mapping[str, Any]) -> dict[int, Added]:
    """The processor of the native layout names a token for videos, replaces it before ids are made, and so has no row for it.

    transformers 4 names it in extra_special_tokens, 5 in model_specific_special_tokens or at the top.
    """
    places = (config, config.get("extra_special_tokens"), config.get("model_specific_special_tokens"))
    names = [place["video_token"] for place in places if isinstance(place, Mapping) and "video_token" in place]
    videos = [name["content"] if isinstance(name, Mapping) else name for name in names]
    return {token_id: token for token_id, token in tokens.items() if token.name not in videos}


def _added(row: Mapping[str, Any]) -> Added:
    return Added(row["content"], bool(row.get("special", True)), bool(row.get("rstrip", False)))


def _side_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, Added]:
    """added_tokens.json, then added_tokens_decoder of tokenizer_config.json, which also knows what is special."""
    tokens: dict[int, Added] = {}
    if (folder / "added_tokens.json").is_file():
        names = _read_json(folder / "added_tokens.json")
        tokens |= {int(token_id): Added(name) for name, token_id in names.items()}
    rows: Mapping[str, Mapping[str, Any]] = config.get("added_tokens_decoder") or {}
    for key, row in rows.items():
        known = tokens.get(int(key))
        if known is not None and known.name != row["content"]:
            raise CheckpointError(
                f'{folder}: id {key} is "{known.name}" in added_tokens.json, but "{row["content"]}" in tokenizer_config.json; '
                "copy both from the base model"
            )
        tokens[int(key)] = _added(row)
    return _without_video(tokens, config)


def _bos_id(config: Mapping[str, Any], raw: Mapping[str, Any], added: Mapping[int, Added], vocabulary: Vocabulary) -> int | None:
    """The bos, if the files say that it goes in front: add_bos_token, else the post-processor of tokenizer.json."""
    token = config.get("bos_token")
    name = token.get("content") if isinstance(token, Mapping) else token
    add = config.get("add_bos_token")
    front = _front_tokens(raw.get("post_processor"))
    if name is None and front and add is None:
        name = front[0]
    if name is None or not (name in front if add is None else add):
        return None
    return next((token_id for token_id, known in added.items() if known.name == name), vocabulary.find(name))


def _front_tokens(processor: Any) -> list[str]:
    """Special tokens that a TemplateProcessing sets before a single text."""
    if not processor:
        return []
    if processor.get("type") == "Sequence":
        return [name for inner in processor["processors"] for name in _front_tokens(inner)]
    names: list[str] = []
    for part in processor.get("single") or []:
        if "SpecialToken" not in part:
            break
        names.append(part["SpecialToken"]["id"])
    return names


def qwen2_json(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """vocab.json and merges.txt -> what a tokenizer.json would hold. Source: Qwen2Converter of transformers."""
    kind = config.get("tokenizer_class", "Qwen2Tokenizer")
    if kind not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise CheckpointError(f"{folder}: vocab.json and merges.txt are read for Qwen2Tokenizer, not {kind}; add tokenizer.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#version"):
            continue
        left, space, right = line.partition(" ")
        if not space or not right or " " in right:
            raise CheckpointError(f"{folder}/merges.txt, line {number}: {line[:40]!r} is no pair; fetch the file again")
        merges.append((left, right))
    with _TokenizersErrors(folder):
        made = tokenizers.Tokenizer(models.BPE(vocab=_read_json(folder / "vocab.json"), merges=merges))
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    raw: dict[str, Any] = json.loads(made.to_str())
    return raw
