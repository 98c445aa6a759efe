"""JSON schemas become masks of allowed tokens, through llguidance: compiled off the engine's thread, under limits.

In: a schema, as a dict.  Out: a JsonMask, one for each answer, that the engine asks before each token; or a Refusal 400.
V vocabulary. llguidance was taken over xgrammar because it works under fuel limits at every step, so that a schema that
explodes ends one answer and no more, and because it brings neither transformers nor triton.
"""

import json
import threading
from collections import OrderedDict
from typing import Any

import llguidance
from torch import Tensor

from tessella.errors import EngineError
from tessella.server.refusal import Refusal
from tessella.tokenizer import Tokenizer

DEEPEST = 32  # levels of a schema
KEPT = 64  # compiled schemas
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=300_000, step_lexer_fuel=100_000, max_lexer_states=100_000, max_grammar_size=200_000, verbose_errors=False
)
ANY_OBJECT: dict[str, Any] = {"type": "object"}
# One way to write each value: a model that is free to put spaces anywhere may put nothing else.
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonMask:
    """Follows one answer through its grammar. See Mask in engine/request.py."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher = matcher
        self.failed = False  # the schema took too much: the client's fault, not the engine's

    def fill(self, bits: Tensor) -> None:
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * bits.element_size())
        self._check()

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            self.failed = True
            raise EngineError("the answer can no longer be kept to its schema: it takes too much; send a simpler schema")


class Grammars:
    """Makes the masks of one model. Thread-safe; called in the pool that opens pictures.

    rows: the model's V, which may be more than the tokenizer's. end: the id that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, end: int, schema_bytes: int):
        # Made now, not at the first schema: it takes a second, in which Python's lock is held and everybody would wait.
        self._tokens = llguidance.LLTokenizer(_Words(tokenizer, rows, end), n_vocab=rows)
        self._schema_bytes = schema_bytes
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def mask(self, schema: dict[str, Any]) -> JsonMask:
        """A fresh mask. Raises Refusal 400: too large, too deep, not a schema, of a kind that cannot be kept to."""
        _check_depth(schema)
        text = json.dumps(schema)  # the order of properties is the order of the answer
        if len(text) > self._schema_bytes:
            raise _refused(f"the schema has {len(text):,} bytes; at most {self._schema_bytes:,}")
        with self._lock:  # one schema is compiled at a time, so that many cannot take the whole pool
            matcher = self._compiled.pop(text, None) or self._compile(text)
            self._compiled[text] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return JsonMask(matcher.deep_copy())

    def _compile(self, text: str) -> llguidance.LLMatcher:
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=FORM)
        except ValueError as error:
            raise _refused("the schema cannot be read") from error
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:200]
            raise _refused(f"the schema cannot be kept to ({reason})")
        return matcher


class _Words:
    """Our tokenizer as llguidance wants to see it: the bytes of each id, special ones marked by a leading 0xFF."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, rows: int, end: int):
        added = tokenizer.added_tokens()
        self.eos_token_id = end
        self.bos_token_id = tokenizer.bos_id
        special = {*added, end, *range(tokenizer.vocab_size, rows)}
        self.special_token_ids = sorted(special)
        self.tokens = [
            b"\xff<%d>" % token_id if token_id in special else tokenizer.bytes_of(token_id, False, True)
            for token_id in range(rows)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text; asked for tests and forced text alone, so what is no UTF-8 may be replaced."""
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"), grounding=False)


def _check_depth(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list))]
        level = [part for values in inner for part in values]
        if not level:
            return
    raise _refused(f"the schema is deeper than {DEEPEST} levels")


def _refused(what: str) -> Refusal:
    return Refusal(400, f"{what}; send a simpler one", param="response_format", code="invalid_schema")
