"""Every kernel compiles for compute capability 9.0, fits a multiprocessor, spills nothing, and reads weights 16 bytes at a time.

In a process of its own: this one may run Triton's interpreter, under which nothing is compiled.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed; the test extra and torch for CUDA bring it", allow_module_level=True)

BENCH = Path(__file__).parents[2] / "bench" / "kernels.py"
KERNELS = {"_grow", "_combine", "_turn_and_put", "_product", "_add_norm", "_gate", "_read", "_best_of_some", "_best_of_all"}
KERNELS |= {"_scale_add_norm", "_activate", "_look_back"}


@pytest.mark.parametrize(
    ("family", "dtypes"),
    [
        ("InternVL2-2B", ["bfloat16", "float16"]),
        ("InternVL2-1B", ["bfloat16"]),  # a bias, groups of 7, heads of 64
        ("InternVL2-4B", ["bfloat16"]),  # heads of 96, no group
        ("InternVL3_5-1B", ["bfloat16"]),  # heads that are normed
        ("16 heads to a key head", ["bfloat16"]),
    ],
)
def test_kernels_compile_and_fit(family: str, dtypes: list[str], tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCH), "--families", family, "--dtypes", *dtypes, "--json", str(out)],
        env=plain | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["kernels"]
    assert {row["kernel"] for row in rows} == KERNELS and {row["dtype"] for row in rows} == set(dtypes)
    for row in rows:
        busy = row["side_by_side"] >= 2 or (row["kernel"] == "_look_back" and row["threads"] == 256)  # products of matrices
        assert row["spilled_bytes"] == 0 and busy, row
        if row["kernel"] == "_product":
            assert row["side_by_side"] * row["threads"] >= 512, f"too few threads to keep the memory busy: {row}"
            assert row["loads"].get("LDG 128", 0) >= 1, f"weights are not read 16 bytes at a time: {row}"
