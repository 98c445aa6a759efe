"""One tab's conversation, and what can be done to it: ask, stop, answer again, edit, take back, correct.

In: questions, pictures, and whom to ask.  Out: turns that grow; each step of an asynchronous iterator says: look again.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tessella.ui.client import Choice
from tessella.ui.conversation import Answer, Settings, Turn, request_of
from tessella.ui.pictures import Picture
from tessella.ui.trouble import Trouble

LOOK_S = 0.08  # between two looks at growing answers: smooth for the eye, cheap for the page


@dataclass
class Talk:
    """turns, oldest first. tasks: the answers that are growing now, one a column."""

    turns: list[Turn] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return bool(self.tasks)

    def ask(self, question: str, pictures: Sequence[Picture], whom: Sequence[Choice], how: Settings) -> AsyncIterator[None]:
        """A new turn, answered by each of whom. Raises Trouble, at once, when there is no question or nobody to ask."""
        self._check(question, whom)
        self.turns.append(Turn(question.strip(), tuple(pictures)))
        return self._answer(range(len(whom)), whom, how)

    def retry(self, column: int, whom: Sequence[Choice], how: Settings) -> AsyncIterator[None]:
        """The last question again, for one column; the other column's answer stays."""
        self._check(self.turns[-1].question, whom)
        return self._answer([min(column, len(whom) - 1)], whom, how)

    def edit(self, number: int, question: str, whom: Sequence[Choice], how: Settings) -> AsyncIterator[None]:
        """Another question in the place of turn number; what came after it is taken back."""
        self._check(question, whom)
        self.turns[number:] = [Turn(question.strip(), self.turns[number].pictures)]
        return self._answer(range(len(whom)), whom, how)

    def undo(self) -> Turn:
        """Take the last turn back."""
        if self.busy:
            raise Trouble("busy")
        return self.turns.pop()

    def correct(self, number: int, column: int, text: str) -> None:
        """What the answer should have been: later turns and the saved training sample go on from it."""
        if self.busy:
            raise Trouble("busy")
        answer = self.turns[number].answer(column)
        if text.strip() and text.strip() != answer.text:
            answer.text, answer.corrected, answer.trouble = text.strip(), True, None
            answer.ended = "stop"

    def stop(self) -> None:
        """What grows ends here and is kept. The connections close, and with them the work of the server."""
        for task in self.tasks:
            task.cancel()

    def _check(self, question: str, whom: Sequence[Choice]) -> None:
        if self.busy:
            raise Trouble("busy")
        if not question.strip():
            raise Trouble("no_question")
        if not whom:
            raise Trouble("no_model")

    async def _answer(self, columns: Sequence[int], whom: Sequence[Choice], how: Settings) -> AsyncIterator[None]:
        """Let columns of the last turn be answered anew, side by side."""
        turn, before = self.turns[-1], self.turns[:-1]
        turn.answers += [Answer(choice.label, how, ended="stopped") for choice in whom[len(turn.answers) :]]
        turn.answers = turn.answers[: len(whom)]
        for column in columns:
            turn.answers[column] = answer = Answer(whom[column].label, how)
            request = partial(request_of, before, turn, column, whom[column].model, how)
            self.tasks.append(asyncio.create_task(_grow(answer, whom[column], request)))
        try:
            waiting: set[asyncio.Task[None]] = set(self.tasks)
            while waiting:
                yield
                _, waiting = await asyncio.wait(waiting, timeout=LOOK_S)
        finally:  # the tab may be closed while it is answered
            self.stop()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            tasks, self.tasks = self.tasks, []
        for task in tasks:
            if not task.cancelled() and (fault := task.exception()):
                raise fault
        yield


async def _grow(answer: Answer, choice: Choice, request: Callable[[], dict[str, Any]]) -> None:
    """Take the pieces of one answer in, with the times at which they come."""
    start = time.perf_counter()
    try:
        body = await asyncio.to_thread(request)  # it reads pictures
        async for piece in choice.server.pieces(body):
            _take(answer, piece, time.perf_counter() - start)
        answer.ended = answer.ended or "stop"
    except Trouble as trouble:
        answer.ended, answer.trouble = "trouble", trouble
    except asyncio.CancelledError:
        answer.ended = "stopped"
        raise
    finally:
        answer.seconds = time.perf_counter() - start


def _take(answer: Answer, piece: dict[str, Any], seconds: float) -> None:
    """One chunk of OpenAI's form into the answer. tiles is a field of our own server's usage."""
    for choice in piece.get("choices") or ():
        if text := choice.get("delta", {}).get("content"):
            answer.text += text
            answer.first_token_s = seconds if answer.first_token_s is None else answer.first_token_s
        answer.routed += choice.get("delta", {}).get("routed") or []
        if choice.get("finish_reason") in ("stop", "length"):
            answer.ended = choice["finish_reason"]
    if usage := piece.get("usage"):
        answer.prompt_tokens, answer.answer_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        answer.tiles = usage.get("tiles")
