"""bench/train.py takes its steps on both sides and tells them: a trial of the file with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the other side is transformers with PEFT, which are in the train extra")

BENCH = Path(__file__).parents[1] / "bench"


def test_both_sides_teach_the_same_shapes(tmp_path: Path) -> None:
    out = tmp_path / "speeds.json"
    options = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--steps",
        "2",
        "--samples-per-step",
        "1",
        "--rank",
        "4",
    ]
    done = subprocess.run(
        [sys.executable, BENCH / "train.py", *options, "--threads", "1", "--json", out],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    ways = {way["way"]: way for way in told["ways"]}
    assert len(ways) == 5 and all(way["samples_s"] > 0 and way["mfu"] > 0 for way in told["ways"])
    assert "times by CPU time as fast as transformers + PEFT" in done.stdout
