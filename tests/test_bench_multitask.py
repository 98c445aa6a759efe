"""What bench/multitask_gpu.sh leans on: steps for a time, an adapter that is packed, rows that keep the naming."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]


def run(script: str, *words: object) -> str:
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_steps_follow_from_the_later_half_of_a_probe(tmp_path: Path) -> None:
    seen = [(15, 60.0), (30, 70.0), (45, 75.0), (60, 80.0)]  # opening and warming up are in the first report
    rows = [{"step": step, "loss": 1.0, "seconds": seconds} for step, seconds in seen]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"step": 0, "kind": "start"}, *rows]))
    assert int(run("bench/steps_in.py", path, 100)) == 285  # three a second, five in a hundred kept back


def test_a_packed_adapter_is_half_as_large_and_the_rest_goes_along(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    (source / "routing").mkdir(parents=True)
    save_file({"a": torch.randn(64, 64)}, source / "adapter_model.safetensors")
    save_file({"b": torch.randn(4)}, source / "routing" / "tokens.safetensors")
    run("bench/pack_adapter.py", source, tmp_path / "packed" / "adapter")
    packed = load_file(tmp_path / "packed" / "adapter" / "adapter_model.safetensors")["a"]
    torch.testing.assert_close(packed.float(), load_file(source / "adapter_model.safetensors")["a"], atol=2e-3, rtol=1e-3)
    assert packed.dtype == torch.float16
    rows = [path / "routing" / "tokens.safetensors" for path in (source, tmp_path / "packed" / "adapter")]
    assert rows[0].read_bytes() == rows[1].read_bytes()


def test_rows_that_keep_the_naming_name_their_photographs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train-0", "train-1", "val"):
        with tarfile.open(data / f"tiny-imagenet-{name}.tar", "w") as tar:
            for number in range(3):
                file = io.BytesIO()
                Image.new("RGB", (64, 64), (80 * number, 9, 9)).save(file, "WEBP")
                row = tarfile.TarInfo(f"n0000000{number}/{number}.webp")
                row.size = file.tell()
                file.seek(0)
                tar.addfile(row, file)
    (data / "tiny-imagenet-classes.json").write_text(json.dumps({f"n0000000{k}": f"Thing {k}, other {k}" for k in range(3)}))
    for workers in (1, 2):
        run("recipes/nano/naming_rows.py", "--data", data, "--out", tmp_path / str(workers), "--rows", 300, "--held-out", 3,
            "--workers", workers)  # fmt: skip
    one, two = ((tmp_path / str(workers) / "rows.jsonl").read_text() for workers in (1, 2))
    assert one == two
    rows = [json.loads(line) for line in one.splitlines()]
    shown = [row for row in rows if "image" in row]
    assert len(rows) == 300 and 250 < len(shown) < 300 and all((tmp_path / "1" / row["image"]).is_file() for row in shown)
    assert {row["conversations"][1]["value"] for row in shown} == {"thing 0", "thing 1", "thing 2"}
    held = [json.loads(line) for line in (tmp_path / "1" / "naming.jsonl").read_text().splitlines()]
    assert held[1]["answers"] == ["thing 1", "other 1"]
