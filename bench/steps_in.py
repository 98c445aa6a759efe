"""How many steps fit into so many seconds, by the metrics.jsonl of a short run: steps_in.py METRICS SECONDS."""

import json
import sys
from pathlib import Path

SURE = 0.95  # share of the time that is planned for; the rest is for a machine that is slower than the probe was


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    seen = [(row["step"], row["seconds"]) for row in rows if "loss" in row and "seconds" in row]
    assert len(seen) >= 2, f"{len(seen)} reports; a probe needs two or more"
    (first, begun), (last, ended) = seen[len(seen) // 2 - 1], seen[-1]  # the first reports pay for opening and warming up
    print(max(1, int(SURE * float(sys.argv[2]) * (last - first) / (ended - begun))))


if __name__ == "__main__":
    main()
