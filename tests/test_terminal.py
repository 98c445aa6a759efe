"""Talking in the terminal: the answer alone in a pipe, a conversation otherwise; nothing typed can end the program by mistake."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tessella import cli, terminal
from tessella.checkpoint.read import Loaded, load
from tessella.errors import ContextError, ImageError
from tessella.sampling import SamplingParams
from tessella.terminal import Talk, answer_once, converse
from tessella.train.dataset import read_dataset
from tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny", "LlamaForCausalLM")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder, device="cpu", dtype="float32")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dish.png"
    Image.new("RGB", (120, 60), "orange").save(path)
    return path


def talk_with(loaded: Loaded, **params: object) -> Talk:
    return Talk(loaded, SamplingParams(**{"max_tokens": 6, **params}))  # type: ignore[arg-type]


def say(talk: Talk, lines: list[str], monkeypatch: pytest.MonkeyPatch, waiting: list[Path] | None = None) -> str:
    """What the screen shows when these lines are typed."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    out = io.StringIO()
    converse(talk, waiting or [], out)
    return out.getvalue()


def test_a_pipe_gets_the_answer_alone(folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", str(folder), "--image", str(picture), "--max-tokens", "5", "--device", "cpu", "what is it?"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    again = load(folder, device="cpu")
    talk = talk_with(again, max_tokens=5)
    assert shown.out == "".join(talk.ask("what is it?", [picture])) + "\n"


def test_a_question_may_come_on_standard_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", str(folder), "--max-tokens", "4", "--json", str(tmp_path / "talk.json")]) == 0
    result = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert result["command"] == "chat" and result["turns"][0]["question"] == "hello"
    assert capsys.readouterr().out == result["turns"][0]["answer"] + "\n"


def test_no_question_on_standard_input_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["chat", str(folder)]) == 2
    assert "PROMPT" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_answer(loaded: Loaded) -> None:
    answers = ["".join(talk_with(loaded, temperature=2.0, seed=seed, max_tokens=12).ask("hello", [])) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_turns_follow_each_other_and_pictures_stay(loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(loaded)
    shown = say(talk, [f"/image {picture}", "what is it?", "and its colour?", "/exit", "never read"], monkeypatch)
    assert "120 x 60 px, 2 x 1 tiles and a thumbnail, 12 tokens" in shown
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 2
    assert [len(turn.pictures) for turn in talk.turns] == [1, 0]
    assert len(talk.pictures) == 1
    assert talk.turns[1].prompt_tokens > talk.turns[0].prompt_tokens


def test_clear_forgets_and_system_is_rendered(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(loaded)
    say(talk, ["hello", "/clear", "/system You are a cook.", "hello", "/clear", "/system", "hello"], monkeypatch)
    plain, cook, again = (turn.prompt_tokens for turn in talk.turns)
    assert cook > plain == again


def test_what_was_saved_can_be_taught(loaded: Loaded, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, file = talk_with(loaded), tmp_path / "said.jsonl"
    nothing = say(talk, [f"/save {file}"], monkeypatch)
    assert "nothing" in nothing and not file.exists()
    say(talk, ["hello", f"/image {picture}", "what is it?", f"/save {file}", "more", f"/save {file}"], monkeypatch)
    samples, ledger = read_dataset(file)
    assert len(samples) == 2 and not ledger.skipped
    assert [message.role for message in samples[1].messages] == ["user", "assistant"] * 3
    assert [message.text for message in samples[1].messages] == [message.text.strip() for message in talk.messages]
    assert samples[0].pictures[0].source == picture.resolve()


@pytest.mark.parametrize(
    "line", ["/save .", "/image", "/image nowhere.png", "/save", "/save no/such/folder/x.jsonl", "/dance", "/"]
)
def test_a_wrong_command_is_told_and_the_talk_goes_on(line: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(loaded)
    shown = say(talk, ["first", line, "second", "^C", "third"], monkeypatch)
    assert [turn.question for turn in talk.turns] == ["first", "second", "third"]
    assert "/exit leaves" in shown


def test_a_broken_picture_is_told_before_the_question(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    talk = talk_with(loaded)
    shown = say(talk, ["hello"], monkeypatch, waiting=[broken])
    assert "broken.jpg" in shown and talk.turns[0].pictures == []


def stopped_after(pieces: int) -> Callable[..., Iterator[int]]:
    """A stand-in for generate that is stopped by Ctrl-C after some tokens."""

    def generate(*arguments: object) -> Iterator[int]:
        yield from [40] * pieces
        raise KeyboardInterrupt

    return generate


def test_ctrl_c_stops_the_answer_and_not_the_program(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "generate", stopped_after(3))
        shown = say(talk, ["hello"], patch)
    assert "(stopped)" in shown
    assert talk.turns[0].ended == "interrupted" and talk.messages[1].text == talk.turns[0].answer != ""
    say(talk, ["go on"], monkeypatch)
    assert len(talk.messages) == 4


def test_an_answer_stopped_before_it_began_leaves_no_turn_behind(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "generate", stopped_after(0))
        say(talk, ["hello"], patch)
    assert talk.messages == []
    say(talk, ["hello again"], monkeypatch)
    assert len(talk.messages) == 2


def test_a_picture_waits_when_its_answer_was_stopped_before_the_first_word(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = talk_with(loaded)
    waiting = [picture]
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "generate", stopped_after(0))
        say(talk, ["what is it?"], patch, waiting)
    say(talk, ["what is it?"], monkeypatch, waiting)
    assert [turn.pictures for turn in talk.turns] == [[str(picture)]] * 2 and len(talk.pictures) == 1


def test_a_picture_is_shown_once_when_its_answer_was_stopped_on_the_screen(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def flush(self) -> None:  # only the pieces of an answer are flushed
            raise KeyboardInterrupt

    talk, waiting = talk_with(loaded), [picture]
    terminal._answer(talk, "what is it?", waiting, Screen())
    assert waiting == [] and len(talk.pictures) == 1 and talk.turns[0].ended == "interrupted"


def test_an_answer_cannot_steer_the_terminal_and_a_pipe_gets_it_as_it_is(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    escape = loaded.tokenizer.encode("\x1b[2J 好\n")
    monkeypatch.setattr(terminal, "generate", lambda *arguments: iter(escape))
    assert "\ufffd[2J 好\n" in say(talk_with(loaded), ["hello"], monkeypatch)
    pipe = io.StringIO()
    answer_once(talk_with(loaded), "hello", [], pipe)
    assert pipe.getvalue() == "\x1b[2J 好\n\n"


def test_ctrl_c_while_a_picture_opens_keeps_the_conversation(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    talk = talk_with(loaded)
    monkeypatch.setattr(terminal, "open_image", interrupted)
    assert "(stopped)" in say(talk, ["hello", f"/image {picture}", "go on"], monkeypatch)
    assert len(talk.turns) == 2


def test_too_long_a_conversation_is_told_with_a_way_out(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(loaded, max_tokens=loaded.config.context_tokens)
    assert "/clear" in say(talk, ["hello"], monkeypatch)
    with pytest.raises(ContextError):
        answer_once(talk, "hello", [], io.StringIO())
    with pytest.raises(ImageError):
        answer_once(talk, "hello", [Path("nowhere.png")], io.StringIO())
    assert talk.turns == [] and talk.messages == []
