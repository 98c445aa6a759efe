"""Drawn ids become Pieces: whole characters, stop strings, the end of an answer and what it took.

In: one id at a time.  Out: Pieces.
"""

import time

from tessella.engine.request import Finish, Logprob, Piece, Request, Usage
from tessella.errors import CheckpointError
from tessella.sampling import Sampler
from tessella.stops import StopText
from tessella.tokenizer import Tokenizer


class Answer:
    """One answer as it grows."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.sampler = Sampler(request.params)
        self.ids: list[int] = []
        self.cached_tokens = 0  # of the prompt, told by the scheduler at the first admission
        self._request = request
        self._stream = tokenizer.stream()
        self._stop = StopText(request.params.stop)
        self._began = time.monotonic()
        self._first: float | None = None

    def take(self, token_id: int, logprob: Logprob | None) -> Piece:
        """The piece that this id makes; with a finish when the answer ends with it."""
        if self._first is None:
            self._first = time.monotonic() - self._began
        if token_id in self._request.stop_ids:
            return self.end("stop")
        try:
            text = self._stop.push(self._stream.push(token_id))
        except CheckpointError as error:  # a model with more rows than its tokenizer has tokens may draw one of those
            return self.end("error", str(error))
        self.ids.append(token_id)
        chances = () if logprob is None else (logprob,)
        if self._stop.found:
            return Piece(text, (token_id,), chances, "stop", usage=self._usage())
        if len(self.ids) < self._request.params.max_tokens:
            return Piece(text, (token_id,), chances)
        rest, finish = self._rest("length")
        return Piece(text + rest, (token_id,), chances, finish, usage=self._usage())

    def end(self, finish: Finish, error: str | None = None) -> Piece:
        """The last piece, with what was held back."""
        text, finish = self._rest(finish)
        return Piece(text, finish=finish, error=error, usage=self._usage())

    def _rest(self, finish: Finish) -> tuple[str, Finish]:
        text = self._stop.push(self._stream.end())  # half a character may end as one that completes a stop string
        return text + self._stop.end(), "stop" if self._stop.found else finish

    def _usage(self) -> Usage:
        prompt = self._request.prompt
        return Usage(len(prompt), self.cached_tokens, len(self.ids), len(prompt.tiles), self._first)
