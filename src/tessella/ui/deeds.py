"""What happens when a button is pressed: values of the page in, changes of the page out.

A deed that answers is an asynchronous generator: each step shows the conversation as far as it has come.
"""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tessella.ui.client import CONNECT_S, Choice, Server, choices
from tessella.ui.conversation import Settings, record_of, row_of
from tessella.ui.pictures import take_in
from tessella.ui.quickbar import quick_bar
from tessella.ui.shelf import Row
from tessella.ui.talk import Talk
from tessella.ui.transcript import turns_as_parts
from tessella.ui.trouble import Trouble
from tessella.ui.words import QUESTIONS, language_of

Update = dict[str, Any]
Steps = AsyncIterator[tuple[Any, ...]]
Words = Callable[[str], dict[gr.components.Component, dict[str, Any]]]  # a language -> what each part of the page says in it


AWAY_S = 3.0  # until a server that did not answer is asked again
THERE_S = 20.0  # until one that did is: it may have loaded another adapter


class Deeds:
    """The deeds of one page; what belongs to a tab comes in as its Talk and the values of its fields.

    compare: names of two models that a tab opens with; (): whichever are offered first.
    """

    def __init__(
        self, servers: tuple[Server, ...], rows: Sequence[Row], folder: Path, words: Words, compare: tuple[str, ...] = ()
    ):
        self.servers = servers
        self.rows = rows
        self.folder = folder
        self.words = words
        self.named = compare
        self.known: dict[str, Choice] = {}  # every model that a server has named, by the label on the page
        self.found: tuple[list[Choice], list[Trouble]] = ([], [])  # at the last look
        self.look_again_s = 0.0  # time.monotonic() from which on a look asks the servers anew

    # ---- asking

    async def ask(self, box: Update, talk: Talk, language: str, *settings: Any) -> Steps:
        """Ask what is in the box."""
        try:
            # In a thread: a large photograph takes a second, and other tabs' answers must not wait for it.
            pictures = [await asyncio.to_thread(take_in, Path(path), self.folder) for path in box["files"]]
            steps = talk.ask(box["text"], pictures, *self.wish(*settings))
        except Trouble as trouble:
            yield self._refuse(trouble, language)
            return
        async for shown in self._follow(steps, talk, language, gr.update(value=None)):
            yield shown

    async def retry(self, talk: Talk, language: str, event: gr.EventData, *settings: Any) -> Steps:
        """The last question again, in the column whose button was pressed."""
        column = _number(event, "column")
        async for shown in self._start(lambda: talk.retry(column, *self.wish(*settings)), talk, language):
            yield shown

    async def edit(self, talk: Talk, language: str, event: gr.EventData, *settings: Any) -> Steps:
        """Another question in a turn's place."""
        turn, text = _number(event, "turn"), str(event.text)
        async for shown in self._start(lambda: talk.edit(turn, text, *self.wish(*settings)), talk, language):
            yield shown

    async def quick(self, kind: int, box: Update, talk: Talk, language: str, event: gr.EventData, *settings: Any) -> Steps:
        """A button of the quick bar: another kind is opened, a picture is put into the box, a question is asked."""
        number = _number(event, "number")
        if event.what == "kind":
            yield gr.skip(), gr.skip(), await asyncio.to_thread(quick_bar, self.rows, number, language), number
        elif event.what == "picture":
            yield gr.skip(), {"text": box["text"], "files": [*box["files"], self._copy(kind, number)]}, gr.skip(), gr.skip()
        else:
            question = {"text": QUESTIONS[language][number], "files": box["files"]}
            async for shown in self.ask(question, talk, language, *settings):
                yield *shown, gr.skip(), gr.skip()

    async def _start(self, start: Callable[[], AsyncIterator[None]], talk: Talk, language: str) -> Steps:
        try:
            steps = start()
        except Trouble as trouble:
            yield self._refuse(trouble, language)
            return
        async for shown in self._follow(steps, talk, language, gr.update()):
            yield shown

    async def _follow(self, steps: AsyncIterator[None], talk: Talk, language: str, box: Update) -> Steps:
        """Show each step. The box has a stop button meanwhile, and can be written in."""
        first = True
        async for _ in steps:
            yield self.view(talk, language), {**box, "submit_btn": False, "stop_btn": True} if first else gr.skip()
            first = False
        if any(answer.trouble for turn in talk.turns[-1:] for answer in turn.answers):
            self.look_again_s = 0.0  # is the server there at all?
        yield self.view(talk, language), gr.update(submit_btn=True, stop_btn=False)

    def _refuse(self, trouble: Trouble, language: str) -> tuple[Any, Any]:
        """Tell it, and leave everything as it is."""
        gr.Warning(escape(trouble.sentence(language)), duration=8, title="")
        return gr.skip(), gr.skip()

    def _copy(self, kind: int, number: int) -> str:
        """Gradio shows no file from elsewhere, so the picture is copied among ours."""
        source = self.rows[kind].items[number].path
        copy = self.folder / "quick" / str(kind) / source.name
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        return str(copy)

    def wish(
        self,
        model: str | None,
        compare: bool,
        second: str | None,
        temperature: float,
        top_p: float,
        max_tokens: int | None,
        tiles: int,
        seed: str,
        system: str,
    ) -> tuple[list[Choice], Settings]:
        """The fields of the settings -> whom to ask, and how. An emptied field means what it says at first.

        Raises Trouble for a seed that is no number.
        """
        if seed.strip() and not seed.strip().isdecimal():
            raise Trouble("bad_seed", seed=seed.strip()[:40])
        names = [model, second] if compare else [model]
        whom = [self.known[name] for name in names if name in self.known]
        how = Settings(
            temperature,
            top_p,
            max_tokens or Settings.max_tokens,
            tiles or None,
            int(seed) if seed.strip() else None,
            system.strip(),
        )
        return whom, how

    # ---- the conversation

    def view(self, talk: Talk, language: str) -> Update:
        """The conversation as transcript.js shows it."""
        return turns_as_parts(talk.turns, language, self.folder, talk.busy)

    async def stop(self, talk: Talk) -> None:
        """What has come is kept."""
        talk.stop()

    async def undo(self, talk: Talk, language: str) -> tuple[Any, Any]:
        """The last turn is taken back, and its question and pictures are in the box again."""
        try:
            turn = talk.undo()
        except Trouble as trouble:
            return self._refuse(trouble, language)
        return self.view(talk, language), {"text": turn.question, "files": [str(picture.path) for picture in turn.pictures]}

    async def correct(self, talk: Talk, language: str, event: gr.EventData) -> Any:
        """Another text in an answer's place."""
        try:
            talk.correct(_number(event, "turn"), _number(event, "column"), str(event.text))
        except Trouble as trouble:
            return self._refuse(trouble, language)[0]
        return self.view(talk, language)

    async def new(self, talk: Talk, language: str) -> tuple[Any, Any]:
        """Everything is forgotten, what waits in the box too."""
        talk.stop()
        talk.turns.clear()
        return self.view(talk, language), gr.update(value=None)

    # ---- saving

    async def save_record(self, talk: Talk, language: str) -> str:
        return self._file("conversation.json", language, lambda: json.dumps(record_of(talk.turns), ensure_ascii=False, indent=1))

    async def save_row(self, talk: Talk, language: str) -> str:
        return self._file("sample.jsonl", language, lambda: json.dumps(row_of(talk.turns, 0), ensure_ascii=False) + "\n")

    async def save_second_row(self, talk: Talk, language: str) -> str:
        return self._file("sample-second.jsonl", language, lambda: json.dumps(row_of(talk.turns, 1), ensure_ascii=False) + "\n")

    def _file(self, name: str, language: str, make: Callable[[], str]) -> str:
        """What the page's script makes a download of; "" when there is nothing to save, which is told."""
        try:
            return json.dumps({"name": name, "text": make()})
        except Trouble as trouble:
            self._refuse(trouble, language)
            return ""

    # ---- the page itself

    def compare(self, compare: bool) -> tuple[Update, Update]:
        """The second model's fields are there while two are compared."""
        return gr.update(visible=compare), gr.update(visible=compare)

    async def look(self, language: str, model: str | None, second: str | None, offered: list[str]) -> tuple[Any, ...]:
        """Is the server there, and what does it serve? offered: what this tab offers already.

        The fields are touched only when that has changed: a person may be choosing just now. What is chosen stays chosen while
        it is served, and while no server answers.
        """
        if time.monotonic() >= self.look_again_s:  # one question for all tabs
            self.look_again_s = time.monotonic() + CONNECT_S  # meanwhile the others take what was found last
            self.found = await choices(self.servers)
            self.look_again_s = time.monotonic() + (AWAY_S if self.found[1] else THERE_S)
        found, troubles = self.found
        labels = [choice.label for choice in found]
        self.known.update((choice.label, choice) for choice in found)
        told = "".join(f'<p class="away" role="status">{escape(trouble.sentence(language))}</p>' for trouble in troubles)
        if not labels or labels == offered:
            return told, gr.skip(), gr.skip(), gr.skip()
        named, missing = named_among(self.named, found)
        for name in missing if not offered else ():  # told once, when a tab first sees what there is
            self._refuse(Trouble("not_served", name=name, names=", ".join(labels)), language)
        defaults = named if len(named) == 2 else [labels[0], labels[min(1, len(labels) - 1)]]
        first, other = (kept if kept in labels else new for kept, new in zip((model, second), defaults, strict=True))
        return told, gr.update(choices=labels, value=first), gr.update(choices=labels, value=other), labels

    async def greet(self, talk: Talk, kind: int, request: gr.Request) -> list[Any]:
        """A page that was just opened speaks what its browser prefers."""
        language = language_of(request.headers.get("accept-language", ""))
        return [gr.update(value=language), *await self.speak(language, talk, kind)]

    async def speak(self, language: str, talk: Talk, kind: int) -> list[Any]:
        """Everything in another language, the conversation's own words excepted."""
        words = [gr.update(**said) for said in self.words(language).values()]
        return [*words, self.view(talk, language), await asyncio.to_thread(quick_bar, self.rows, kind, language)]


def named_among(names: Sequence[str], found: Sequence[Choice]) -> tuple[list[str], list[str]]:
    """Names of models -> (labels of those that are served, names that are not). One name twice means two servers, if it can."""
    labels: list[str] = []
    missing: list[str] = []
    for name in names:
        fitting = [choice.label for choice in found if name in (choice.label, choice.model)]
        if fitting:
            labels.append(next((label for label in fitting if label not in labels), fitting[0]))
        else:
            missing.append(name)
    return labels, missing


def _number(event: gr.EventData, name: str) -> int:
    """A number that the page's script sent along."""
    return int(getattr(event, name))
