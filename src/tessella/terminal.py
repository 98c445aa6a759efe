"""Talking in the terminal: one answer for a pipe, or a conversation with commands.

In: a loaded model, questions and pictures.  Out: answers, streamed as they are made, and a Talk that says what was said.
"""

import json
import re
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tessella.chat import Message, place_marks
from tessella.checkpoint.read import Loaded
from tessella.decode import Shown, decode_routed
from tessella.errors import ContextError, DataError, TessellaError
from tessella.generate import generate
from tessella.image import cut_tiles, open_image, read_size
from tessella.inputs import ModelInput, Picture
from tessella.model.routing import Routed
from tessella.sampling import SamplingParams
from tessella.showing import Files, show

HELP = """\
/image PATH   show it a picture; your next words are about it (again for more pictures)
/clear        forget the conversation and its pictures
/system TEXT  tell it who it is; without TEXT, what its template says
/save FILE    add the conversation to FILE, one JSON line that `tessella finetune --data FILE` reads
/help         this list
/exit         leave; so does Ctrl-D.  Ctrl-C stops an answer, not the program"""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


@dataclass
class Turn:
    """One question and its answer. ended: "stop" (the model ended it), "length" or "interrupted"."""

    question: str
    pictures: list[str]
    answer: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    ended: str = "interrupted"
    routed: list[dict[str, Any]] = field(default_factory=list)  # what each routing token of the answer gave
    files: list[str] = field(default_factory=list)  # written for it


@dataclass
class Talk:
    """A conversation that grows. Pictures belong to the messages in order, as their marks do."""

    loaded: Loaded
    params: SamplingParams
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)  # what the last answer showed beside its words

    def ask(self, text: str, pictures: list[Path]) -> Generator[str, None, None]:
        """Ask with new pictures; yields the answer in pieces.

        Raises ContextError, ImageError or PromptError, and changes nothing then.
        An answer that the caller stops taking is kept as far as it came, so that the next turn can refer to it.
        """
        shown = [Picture(path) for path in pictures]
        question = Message("user", place_marks(text, len(shown), first_number=len(self.pictures) + 1))
        prompt = self.loaded.inputs.build(
            [*self._opening(), *self.messages, question], [*self.pictures, *shown], room=self.params.max_tokens
        )
        turn = Turn(text, [str(path) for path in pictures], prompt_tokens=len(prompt))
        start = time.perf_counter()
        stream = self.loaded.tokenizer.stream()
        routed: list[Routed] = []
        ids: list[int] = []
        self.shown = []
        try:
            for token in generate(self.loaded.model, prompt, self.params, self.loaded.stop_ids, routed.append):
                ids.append(token)
                turn.answer_tokens += 1
                piece = stream.push(token)
                turn.answer += piece
                yield piece
            last = stream.end()
            turn.answer += last
            turn.ended = "length" if turn.answer_tokens >= self.params.max_tokens else "stop"
            yield last
            self.shown = self._decode(prompt, ids, routed, [*self.pictures, *shown])
            turn.routed = [one.as_json() for one in self.shown]
        finally:
            turn.seconds = round(time.perf_counter() - start, 3)
            self.turns.append(turn)
            if turn.answer:  # a question without any answer is taken back: two user turns in a row are no conversation
                self.messages += [question, Message("assistant", turn.answer)]
                self.pictures += shown

    def _decode(self, prompt: ModelInput, ids: list[int], routed: list[Routed], pictures: list[Picture]) -> list[Shown]:
        """What the decoders make of an answer."""
        if not self.loaded.tokenizer.routes:
            return []
        size = read_size(pictures[-1].source, limit_megapixels=self.loaded.inputs.limit_megapixels) if pictures else None
        return decode_routed(self.loaded.model, self.loaded.tokenizer, prompt, ids, routed, size)

    def show(self) -> list[str]:
        """The lines about what the last answer showed; its files are written."""
        source = self.pictures[-1].source if self.pictures else None
        files = Files(Path(str(source)) if isinstance(source, str | Path) else None, len(self.turns))
        lines = show(self.turns[-1].answer, self.shown, files) if self.turns else []
        if self.turns:
            self.turns[-1].files = files.written
        return lines

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system)]

    def clear(self) -> None:
        """Forget messages and pictures; the system text stays, and so does the record of turns."""
        self.messages.clear()
        self.pictures.clear()

    def as_row(self) -> dict[str, Any]:
        """The conversation as one row for teaching: messages with their picture marks, pictures by absolute path."""
        messages = [{"role": message.role, "content": message.text} for message in [*self._opening(), *self.messages]]
        return {"image": [str(Path(str(picture.source)).resolve()) for picture in self.pictures], "messages": messages}

    def as_json(self) -> dict[str, Any]:
        """What --json writes: where it ran, and every turn."""
        model = self.loaded.model
        place = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        return {**place, "system": self.system, "seed": self.params.seed, "turns": [asdict(turn) for turn in self.turns]}


def answer_once(talk: Talk, prompt: str, pictures: list[Path], out: TextIO) -> None:
    """Print the answer alone, as it is made, and a newline; a pipe gets it as it is."""
    for piece in talk.ask(prompt, pictures):
        print(harmless(piece) if out.isatty() else piece, end="", flush=True, file=out)
    print(file=out)
    for line in talk.show():
        print(harmless(line), file=out if talk.shown else sys.stderr)  # boxes that stand in the words need no second line


def harmless(text: str) -> str:
    """Control characters become the replacement sign: a model (or what a picture made it say) must not steer the terminal."""
    return CONTROL.sub("\ufffd", text)


def converse(talk: Talk, waiting: list[Path], out: TextIO) -> None:
    """Read lines until /exit or the end of input. waiting: pictures that the first question is about."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing, where the system has it; it acts by being imported, and only a terminal needs it)
    place = f"{talk.loaded.model.device}, {str(talk.loaded.model.dtype).removeprefix('torch.')}"
    print(f"{talk.loaded.folder.name} on {place}. /help lists the commands, /exit leaves.", file=out)
    waiting = [path for path in waiting if _show(talk, path, out)]
    while True:
        try:
            line = input("\n› ").strip()
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print("\n(/exit leaves)", file=out)
            continue
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                _obey(line, talk, waiting, out)
            elif line:
                _answer(talk, line, waiting, out)
        except KeyboardInterrupt:  # a large picture takes seconds to open
            print(" (stopped)", file=out)


def _answer(talk: Talk, line: str, waiting: list[Path], out: TextIO) -> None:
    """Stream one answer. Pictures stop waiting once the conversation holds them: not when stopped before the first word."""
    shown = len(talk.pictures) + len(waiting)
    try:
        with closing(talk.ask(line, waiting)) as answer:  # closed here, so that the turn is recorded before we look at it
            for piece in answer:
                print(harmless(piece), end="", flush=True, file=out)
        print(file=out)
        for told in talk.show():
            print(harmless(told), file=out)
    except KeyboardInterrupt:
        print(" (stopped)", file=out)
        if len(talk.pictures) < shown:
            return
    except ContextError as error:
        print(f"{error}\nor start afresh with /clear", file=out)
        return
    except TessellaError as error:
        print(error, file=out)
        return
    waiting.clear()


def _obey(line: str, talk: Talk, waiting: list[Path], out: TextIO) -> None:
    """One /command."""
    command, _, words = line.partition(" ")
    words = words.strip()
    if command == "/image" and words:
        path = Path(words.strip("\"'")).expanduser()
        if _show(talk, path, out):
            waiting.append(path)
    elif command == "/clear":
        talk.clear()
        waiting.clear()
        print("Forgotten.", file=out)
    elif command == "/system":
        talk.system = words or None
        print("The system text is set." if words else "The system text is the template's own.", file=out)
    elif command == "/save" and words:
        try:
            save(talk, Path(words).expanduser())
            print(f"{len(talk.messages) // 2} turns added to {words}", file=out)
        except DataError as error:
            print(error, file=out)
    elif command == "/help":
        print(HELP, file=out)
    else:
        print(f'"{line}" is no command, or lacks its word. The commands are:\n{HELP}', file=out)


def _show(talk: Talk, path: Path, out: TextIO) -> bool:
    """Open a picture now, so that a mistake is told now; says what the model will see of it."""
    try:
        inputs = talk.loaded.inputs
        tiles = cut_tiles(open_image(path, limit_megapixels=inputs.limit_megapixels), inputs.rule())
    except TessellaError as error:
        print(error, file=out)
        return False
    tokens = inputs.slots_of(tiles.width_px, tiles.height_px)
    print(
        f"{path}: {tiles.width_px} x {tiles.height_px} px, {tiles.about}, {tokens} tokens",
        file=out,
    )
    return True


def save(talk: Talk, path: Path) -> None:
    """Append the conversation to path as one JSON line. Raises DataError when there is nothing to save or path takes none."""
    if not talk.messages:
        raise DataError("nothing was said yet, so there is nothing to save; ask something first")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent} is not a folder; make it, or save somewhere else")
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(talk.as_row(), ensure_ascii=False) + "\n")
    except OSError as error:  # a folder, no permission, a full disk: the conversation must outlive it
        raise DataError(f"{path} cannot be written ({error.strerror}); save somewhere else") from error
