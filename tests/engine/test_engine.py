"""The engine's thread: it takes from any thread, answers all, drains, and tells everybody when it breaks down."""

import dataclasses
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from engine.test_core import tiny_loaded
from tessella.chat import Message
from tessella.checkpoint.lowrank import Pair
from tessella.checkpoint.read import Loaded
from tessella.engine.engine import Engine, EngineTicket
from tessella.engine.request import EngineSettings, Piece, Request
from tessella.errors import EngineError, QueueFull
from tessella.generate import generate
from tessella.sampling import SamplingParams

DRAWN = SamplingParams(max_tokens=16, temperature=1.0, seed=3)
LONG = SamplingParams(max_tokens=700)
SETTINGS = EngineSettings(block_tokens=4, cache_tokens=3000, max_batch_tokens=64, max_running=4)
PATIENCE_S = 60


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny_loaded()


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[Engine]:
    one = Engine(loaded.model, loaded.tokenizer, SETTINGS)
    one.start()
    yield one
    one.stop(drain=False)


class Guest:
    """Waits for an answer in another thread than the engine's."""

    def __init__(self, engine: Engine, request: Request):
        self.pieces: list[Piece] = []
        self.began, self.over = threading.Event(), threading.Event()
        self.ticket: EngineTicket = engine.submit(request, self.hear)

    def hear(self, piece: Piece) -> None:
        assert threading.current_thread().name == "tessella-engine"
        self.pieces.append(piece)
        self.began.set()
        if piece.finish:
            self.over.set()

    def finish(self) -> str | None:
        assert self.over.wait(PATIENCE_S), "no last piece came"
        return self.pieces[-1].finish

    def ids(self) -> list[int]:
        self.finish()
        return [token for piece in self.pieces for token in piece.ids]


def request(loaded: Loaded, text: str = "hello", params: SamplingParams = DRAWN) -> Request:
    return Request(loaded.inputs.build([Message("user", text)]), params, ())


def test_many_threads_ask_and_each_gets_the_plain_answer(loaded: Loaded, engine: Engine) -> None:
    texts = ["hello", "what is it", "图中是什么食物？", "There are 3 bowls"]
    plain = {text: list(generate(loaded.model, request(loaded, text).prompt, DRAWN, ())) for text in texts}
    answers: list[tuple[str, list[int]]] = []

    def visit(text: str) -> None:
        for _ in range(3):
            answers.append((text, Guest(engine, request(loaded, text)).ids()))

    visitors = [threading.Thread(target=visit, args=(text,)) for text in texts]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(PATIENCE_S)
    assert len(answers) == 12 and all(ids == plain[text] for text, ids in answers)
    state = engine.state()
    assert (state.submitted, state.length, state.running, state.waiting, state.blocks_used) == (12, 12, 0, 0, 0)
    assert state.answer_tokens == 12 * 16 and state.alive and not state.draining and state.cached_tokens > 0


def test_cancelling_from_another_thread_ends_the_answer_soon(loaded: Loaded, engine: Engine) -> None:
    guest = Guest(engine, request(loaded, params=LONG))
    assert guest.began.wait(PATIENCE_S)
    guest.ticket.cancel()
    assert guest.finish() == "cancelled" and len(guest.ids()) < 700
    guest.ticket.cancel()  # once more does nothing
    assert Guest(engine, request(loaded)).finish() == "length"


def test_the_queue_has_an_end(loaded: Loaded) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, dataclasses.replace(SETTINGS, max_running=1, max_waiting=2))
    engine.start()
    running = Guest(engine, request(loaded, params=LONG))
    assert running.began.wait(PATIENCE_S)
    waiting = [Guest(engine, request(loaded)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait; at most 2"):
        engine.submit(request(loaded), lambda piece: None)
    assert engine.state().waiting == 2
    running.ticket.cancel()
    assert [guest.finish() for guest in waiting] == ["length", "length"]
    assert Guest(engine, request(loaded)).finish() == "length"
    engine.stop()


def test_a_drain_ends_what_is_here_and_takes_nothing_new(loaded: Loaded, engine: Engine) -> None:
    guests = [Guest(engine, request(loaded)) for _ in range(6)]
    engine.stop(drain=True, seconds=PATIENCE_S)
    assert [guest.finish() for guest in guests] == ["length"] * 6
    with pytest.raises(EngineError, match="does not run"):
        engine.submit(request(loaded), lambda piece: None)
    assert not engine.state().alive and engine.state().draining and engine.state().failure is None


def test_a_drain_that_takes_too_long_cancels_the_rest(loaded: Loaded, engine: Engine) -> None:
    guests = [Guest(engine, request(loaded, params=LONG)) for _ in range(6)]
    assert guests[0].began.wait(PATIENCE_S)
    begun = time.monotonic()
    engine.stop(drain=True, seconds=0.05)
    assert [guest.finish() for guest in guests] == ["cancelled"] * 6 and time.monotonic() - begun < PATIENCE_S


def test_an_engine_runs_once_and_not_before_its_start(loaded: Loaded) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, SETTINGS)
    with pytest.raises(EngineError, match="not started"):
        engine.submit(request(loaded), lambda piece: None)
    engine.start()
    with pytest.raises(EngineError, match="started before"):
        engine.start()
    engine.stop()
    engine.stop()


def test_adapters_come_and_go_while_it_runs(loaded: Loaded, engine: Engine) -> None:
    name = "language_model.model.layers.0.mlp.up_proj"
    pair = Pair(torch.randn(2, 64), torch.randn(96, 2), 1.0)
    busy = Guest(engine, request(loaded, params=LONG))
    engine.load_adapter("a", {name: pair}, {})
    assert engine.state().adapters == ("a",)
    with pytest.raises(EngineError, match="loaded already"):
        engine.load_adapter("a", {name: pair}, {})
    changed = Guest(engine, dataclasses.replace(request(loaded), adapter="a"))
    engine.unload_adapter("a")
    assert changed.ids() != Guest(engine, request(loaded)).ids() and changed.finish() == "length"
    with pytest.raises(EngineError, match="no adapter"):
        engine.submit(dataclasses.replace(request(loaded), adapter="a"), lambda piece: None)
    busy.ticket.cancel()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_breaks_down_everybody_is_told(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, SETTINGS)

    def fails() -> None:
        if len(engine._core.live) == 3:
            raise RuntimeError("a fault of ours")

    monkeypatch.setattr(engine._core, "step", fails)
    engine.start()
    guests = [Guest(engine, request(loaded)) for _ in range(3)]
    assert [guest.finish() for guest in guests] == ["error"] * 3
    assert "a fault of ours" in str(guests[0].pieces[-1].error)
    with pytest.raises(EngineError, match="broke down"):
        engine.submit(request(loaded), lambda piece: None)
    with pytest.raises(EngineError, match="broke down"):
        engine.load_adapter("a", {}, {})
    engine.stop()
    state = engine.state()
    assert not state.alive and state.failed == 3 and "a fault of ours" in str(state.failure)
