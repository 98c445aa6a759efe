"""A good client asks by itself and beside every case of tests/server/abuse.py, in turns; then thousands leave in the middle.

    python bench/beside_abuse.py --model tessella-nano --seconds 60 --rounds 3

Its p99 beside the abuse should stay below twice its quiet one; no 500, and memory back within 200 MiB. Both sides ask the same
mixture of questions, none twice, in turns of some seconds: what else the machine does meets both. Prints a table and JSON.
"""

import argparse
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from serving import Asked, Askers, Server, quantile, serving

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
import abuse

CACHE = ("--cache-tokens", "4096")  # small, so that a cache that fills is not taken for a leak


class Abusers:
    """Threads that send all cases over and over, at rate_hz together."""

    def __init__(self, port: int, count: int, rate_hz: float):
        self.statuses: Counter[int] = Counter()
        self._port, self._pause_s = port, count / rate_hz
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number, count), daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, count: int) -> None:
        while not self._stop.is_set():
            for case in abuse.CASES[number::count]:
                if self._stop.wait(self._pause_s):
                    return
                try:
                    self.statuses[abuse.send(self._port, case)] += 1
                except OSError:
                    self.statuses[-1] += 1  # no connection: as the server likes

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def good(server: Server, wish: argparse.Namespace, first_number: int) -> list[Asked]:
    """What the good client hears in some seconds."""
    client = Askers(server, 1, wish.max_tokens, None, first_number)
    time.sleep(wish.seconds)
    return client.stop()


def told(asked: list[Asked]) -> dict[str, float]:
    shares = {"median s": 0.5, "p90 s": 0.9, "p99 s": 0.99}
    seconds = [one.seconds for one in asked]
    return {"answers": len(asked), **{name: round(quantile(seconds, share), 3) for name, share in shares.items()}}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", default="tessella-nano")
    words.add_argument("--seconds", type=float, default=60, help="of each side in each round")
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--rate-hz", type=float, default=10, help="bad requests a second")
    words.add_argument("--max-tokens", type=int, default=16)
    words.add_argument("--leave", type=int, default=1000, help="clients who leave in the middle, at the end")
    words.add_argument("--json", type=Path)
    wish = words.parse_args()
    with serving(wish.model, "--name", abuse.NAME, "--workers", "1", *CACHE) as server:
        port = int(server.url.rpartition(":")[2])
        Askers(server, 1, 4, None).stop()
        quiet: list[Asked] = []
        beside: list[Asked] = []
        statuses: Counter[int] = Counter()
        before = 0.0
        for _ in range(wish.rounds):
            quiet += good(server, wish, 1000 + len(quiet) + len(beside))
            before = before or server.resident_mib()  # the cache's blocks have all been touched by now
            bad = Abusers(port, 4, wish.rate_hz)
            time.sleep(2)
            beside += good(server, wish, 1000 + len(quiet) + len(beside))
            bad.stop()
            statuses += bad.statuses
            time.sleep(3)  # what they left behind ends
        leaving = [case for case in abuse.CASES if case.name.startswith("leaves")]
        for number in range(wish.leave):
            statuses[abuse.send(port, leaving[number % len(leaving)])] += 1
        time.sleep(5)
        gauges = server.gauges()
        result = {
            "quiet": told(quiet),
            "beside abuse": told(beside),
            "p99 ratio": quantile([one.seconds for one in beside], 0.99) / quantile([one.seconds for one in quiet], 0.99),
            "errors of the good client": [one.error for one in (*quiet, *beside) if one.error],
            "statuses of the bad ones (0: closed)": dict(statuses),
            "resident MiB before and after": (round(before), round(server.resident_mib())),
            "blocks held when idle": gauges["tessella_engine_blocks_used"],
            "running and waiting when idle": gauges["tessella_engine_running"] + gauges["tessella_engine_waiting"],
        }
    print(json.dumps(result, indent=1))
    if wish.json:
        wish.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
