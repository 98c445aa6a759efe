"""Those who ask a Core in tests, a step at a time, without a thread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tessella.engine.core import Core
from tessella.engine.request import Logprob, Piece, Request, Usage
from tessella.engine.row import Row


@dataclass
class Guest:
    """One request and all that came of it."""

    pieces: list[Piece] = field(default_factory=list)
    row: Row | None = None

    @property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def logprobs(self) -> list[Logprob]:
        return [one for piece in self.pieces for one in piece.logprobs]

    @property
    def finish(self) -> str | None:
        return self.pieces[-1].finish if self.pieces else None

    @property
    def usage(self) -> Usage:
        usage = self.pieces[-1].usage
        assert usage is not None
        return usage


def join(core: Core, request: Request) -> Guest:
    guest = Guest()
    guest.row = core.make_row(request, guest.pieces.append)
    core.add(guest.row)
    return guest


def run(core: Core, most_steps: int = 2000) -> None:
    """Until nobody is left."""
    for _ in range(most_steps):
        if not core.live:
            return
        core.step()
    raise AssertionError(f"{len(core.live)} rows are still here after {most_steps} steps")


def ask(core: Core, requests: Sequence[Request], between: Callable[[int], None] = lambda step: None) -> list[Guest]:
    """All at once; between is called before each step."""
    guests = [join(core, request) for request in requests]
    step = 0
    while core.live:
        between(step)
        core.step()
        step += 1
        assert step < 2000
    return guests
