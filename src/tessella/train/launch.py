"""Several processes of one run on this machine, started, watched and ended together.

In: a recipe with nproc above 1.  Out: the exit code of the run; the first error of a rank is shown, and no rank outlives another.
It imports no torch: each rank is `tessella finetune` again, told by the environment who it is, as torchrun would tell it.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tessella.errors import TrainingError
from tessella.files import write_whole
from tessella.train.recipe import Recipe

LOOK_S = 0.2  # between two looks at the ranks
GRACE_S = 15.0  # until ranks that wait for one that has died are ended; over gloo they notice by themselves
LOST_ANOTHER = 75  # exit code of a rank that ends because another has gone: its error is not the one to show
TOLD_CHARACTERS = 4000  # of what a rank said last
SET_DEATH_SIGNAL = 1  # Linux: prctl's PR_SET_PDEATHSIG


@dataclass
class Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    said: Path  # its stderr; the first rank's goes to the screen and this stays empty


def wanted(recipe: Recipe) -> bool:
    """Whether ranks are to be started: more than one is asked for, and nobody has started us as one."""
    return recipe.nproc > 1 and "WORLD_SIZE" not in os.environ


def launch(recipe: Recipe, json: Path | None) -> int:
    """Run the recipe in recipe.nproc processes; gives the exit code of the run. Raises TrainingError with a rank's error."""
    with tempfile.TemporaryDirectory(prefix="tessella-ranks-") as name:
        folder = Path(name)
        write_whole(folder / "recipe.toml", recipe.to_toml())
        words = ["finetune", str(folder / "recipe.toml"), *(("--json", str(json)) if json else ())]
        port = free_port()
        ranks = [start(words, number, recipe.nproc, port, folder) for number in range(recipe.nproc)]
        try:
            with passing_signals_on(ranks):
                return watch(ranks)
        finally:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.kill()
                rank.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(words: list[str], number: int, size: int, port: int, folder: Path) -> Rank:
    """One rank: in a session of its own, so that Ctrl-C reaches it through us and once; it ends when we are killed."""
    said = folder / f"rank-{number}"
    cores = os.cpu_count() or 1
    told = {
        "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(max(1, cores // size)), **os.environ, **{key: str(told[key]) for key in told}}
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tessella.cli", *words], env=environment, start_new_session=True,
            stdout=None if number == 0 else subprocess.DEVNULL, stderr=None if number == 0 else file,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
    return Rank(number, process, said)


def end_with_parent() -> None:
    """Runs in the new process before Python starts anew there: a launcher that is killed sends SIGTERM, which saves."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def passing_signals_on(ranks: list[Rank]) -> Iterator[None]:
    """SIGINT and SIGTERM go to every rank, as often as they come: the first asks, the second breaks off."""

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(ranks: list[Rank]) -> int:
    """Until all have ended; the others are ended some time after the first that fails."""
    failed_at: float | None = None
    ours: set[int] = set()  # ranks that we ended
    while any(rank.process.poll() is None for rank in ranks):
        time.sleep(LOOK_S)
        if failed_at is None and any(rank.process.poll() not in (None, 0, 130) for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            for rank in ranks:
                if rank.process.poll() is None:
                    ours.add(rank.number)
                    rank.process.kill()
    codes = {rank.number: rank.process.returncode for rank in ranks if rank.number not in ours}
    own = [rank for rank in ranks if codes.get(rank.number, 0) not in (0, 130, LOST_ANOTHER)]
    if not own:
        return max(codes.values(), default=0)
    if own[0].number == 0 and codes[0] > 0:
        return int(codes[0])  # its error stands on the screen already
    raise TrainingError(what_happened(own[0], codes[own[0].number], len(ranks)))


def what_happened(rank: Rank, code: int, size: int) -> str:
    """A rank's end, in words, with what it said last."""
    said = rank.said.read_text(encoding="utf-8", errors="replace").strip()[-TOLD_CHARACTERS:]
    how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    what = f": {said.removeprefix('tessella: ')}" if said else ""
    return (
        f"rank {rank.number} of {size} {how}{what}\nThe other ranks have ended with it; checkpoints stand, and --resume goes on "
        "from the newest"
    )
