"""A server under mixed text and pictures at a share of its capacity: errors, memory, free blocks, from outside its process.

    python bench/load.py --model tessella-nano --minutes 30 --share 0.8

First it is asked as fast as it answers, which is its capacity; then at the share, for the minutes. Prints a table and JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from serving import Asked, Askers, Server, quantile, serving, slope_per_hour


def watch(server: Server, seconds: float, every_s: float) -> list[dict[str, float]]:
    """Memory and gauges, one row each every_s."""
    rows, begun = [], time.monotonic()
    while time.monotonic() - begun < seconds:
        gauges = server.gauges()
        row = {"s": round(time.monotonic() - begun, 1), "resident_mib": round(server.resident_mib(), 1)}
        rows.append(
            row | {name: gauges[f"tessella_engine_{name}"] for name in ("running", "waiting", "blocks_used", "blocks_cached")}
        )
        time.sleep(every_s)
    return rows


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", default="tessella-nano")
    words.add_argument("--minutes", type=float, default=30)
    words.add_argument("--share", type=float, default=0.8, help="of capacity")
    words.add_argument("--calibrate-s", type=float, default=30)
    words.add_argument("--askers", type=int, default=8)
    words.add_argument("--max-tokens", type=int, default=24)
    words.add_argument("--json", type=Path)
    words.add_argument(
        "--words", nargs="*", default=["--cache-tokens", "8192"], help="of tessella serve; a small cache fills soon"
    )
    wish = words.parse_args()
    with serving(wish.model, *wish.words) as server:
        Askers(server, 1, wish.max_tokens, None).stop()  # the first question pays for warming up
        full = Askers(server, wish.askers, wish.max_tokens, None, first_number=10_000)
        time.sleep(wish.calibrate_s)
        begun = min(one.begun for one in full.stop())
        capacity_hz = len(full.asked) / (max(one.begun + one.seconds for one in full.asked) - begun)
        rate_hz = wish.share * capacity_hz
        load = Askers(server, 4 * wish.askers, wish.max_tokens, rate_hz, first_number=100_000)
        rows = watch(server, wish.minutes * 60, every_s=max(2.0, wish.minutes * 60 / 200))
        asked = load.stop()
        time.sleep(1)
        idle = server.gauges()
        result = told(capacity_hz, rate_hz, wish.minutes, rows, asked, idle)
    for name, value in result.items():
        print(f"{name:<34}{value}")
    if wish.json:
        wish.json.write_text(json.dumps({**result, "rows": rows}, indent=1))


def told(
    capacity_hz: float, rate_hz: float, minutes: float, rows: list[Any], asked: list[Asked], idle: dict[str, float]
) -> dict[str, Any]:
    errors = [one.error for one in asked if one.error]
    settled = rows[len(rows) // 2 :]  # the caches fill first
    free = [(row["s"], idle["tessella_engine_blocks"] - row["blocks_used"]) for row in settled]
    return {
        "capacity, requests/s": round(capacity_hz, 2),
        "asked, requests/s": round(rate_hz, 2),
        "minutes": minutes,
        "answers": len(asked),
        "errors": len(errors),
        "first errors": errors[:3],
        "tokens/s": round(sum(one.tokens for one in asked) / (minutes * 60), 1),
        "first token, median s": round(quantile([one.first_token_s for one in asked if one.first_token_s], 0.5), 3),
        "first token, p99 s": round(quantile([one.first_token_s for one in asked if one.first_token_s], 0.99), 3),
        "whole answer, median s": round(quantile([one.seconds for one in asked], 0.5), 3),
        "whole answer, p99 s": round(quantile([one.seconds for one in asked], 0.99), 3),
        "resident MiB, first and last": (rows[0]["resident_mib"], rows[-1]["resident_mib"]),
        "resident MiB/hour, second half": round(slope_per_hour([(row["s"], row["resident_mib"]) for row in settled]), 1),
        "free blocks/hour, second half": round(slope_per_hour(free), 1),
        "blocks held when idle": idle["tessella_engine_blocks_used"],
        "running and waiting when idle": idle["tessella_engine_running"] + idle["tessella_engine_waiting"],
    }


if __name__ == "__main__":
    main()
