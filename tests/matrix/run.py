"""`make matrix`: our native export, opened by several transformers, gives the same ids and logits as ours.

In: versions.toml.  Out: results/matrix.md; the exit code is 1 when one of them differs or does not open it.
For each version a virtual environment of its own is made in .matrix/ and kept; PIP_ARGS is handed to pip.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import save_file

from tessella.chat import Message, place_marks
from tessella.checkpoint.read import load
from tessella.checkpoint.verify import logits_on
from tessella.generate import generate
from tessella.image import normalise
from tessella.inputs import Inputs, Picture
from tessella.sampling import SamplingParams

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PICTURE = ROOT / "docs" / "three-foods.png"
QUESTIONS = {  # name -> (question, pictures, most tiles of each)
    "text": ("Give me three ideas for dinner.", 0, 1),
    "one tile": ("What is in this picture?", 1, 1),
    "many tiles": ("图中的菜是什么？", 1, 6),
    "two pictures": ("What differs?", 2, 1),
}
ANSWER_TOKENS = 16
LIMIT = 1e-3  # largest difference of float32 logits; one machine gives 0, other kernels may not


class Version(NamedTuple):
    transformers: str  # "" is the newest
    torch: str

    @property
    def name(self) -> str:
        return self.transformers or "newest"

    @property
    def requirements(self) -> list[str]:
        pin = f"=={self.transformers}.*" if self.transformers else ""
        # jinja2 for chat templates; the rest is what transformers and our probe import
        return [f"transformers{pin}", f"torch=={self.torch}", "safetensors", "pillow", "jinja2"]


def versions() -> list[Version]:
    raw = tomllib.loads((HERE / "versions.toml").read_text(encoding="utf-8"))
    return [Version(row["transformers"], row["torch"]) for row in raw["version"]]


def write_truth(model: str | Path, folder: Path, answer_tokens: int = ANSWER_TOKENS) -> None:
    """Our own prompts, logits and answers in float32 on the CPU: truth.safetensors and texts.json in folder."""
    loaded = load(model, device="cpu", dtype="float32")
    tensors, texts = {}, {}
    for name, (question, pictures, tiles) in QUESTIONS.items():
        inputs = Inputs(loaded.config, loaded.tokenizer, max_tiles=min(tiles, loaded.config.max_tiles))
        messages = [Message("user", place_marks(question, pictures))]
        prompt = inputs.build(messages, [Picture(PICTURE)] * pictures)
        answer = list(generate(loaded.model, prompt, SamplingParams(max_tokens=answer_tokens), stop_ids=()))
        tensors |= {
            f"{name}:ids": prompt.ids,
            f"{name}:logits": logits_on(loaded.model, [prompt])[0].contiguous(),
            f"{name}:answer": torch.tensor(answer),
        }
        if len(prompt.tiles):
            tensors[f"{name}:pixels"] = normalise(prompt.tiles, torch.float32)
        texts[name] = loaded.tokenizer.decode(prompt.ids.tolist(), skip_special=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "truth.safetensors")
    (folder / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def environment(version: Version, place: Path) -> Path:
    """The Python of a virtual environment with that version; made once, and again when its requirements change."""
    folder, wanted = place / version.name, "\n".join(version.requirements)
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        venv.create(folder, clear=True, with_pip=True)
        more = shlex.split(os.environ.get("PIP_ARGS", ""))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *more, *version.requirements]
        subprocess.run(pip, check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def probe(python: Path, native: Path, truth: Path) -> dict[str, Any]:
    """What probe.py says in that environment, or {"error": its last words}."""
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    quiet.pop("PYTHONPATH", None)  # only what is installed there
    done = subprocess.run(
        [str(python), str(HERE / "probe.py"), str(native), str(truth)], capture_output=True, text=True, env=quiet, check=False
    )
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def is_good(found: dict[str, Any]) -> bool:
    if "error" in found:
        return False
    measured = [difference for difference in found["differences"].values() if difference is not None]
    return bool(measured) and max(measured) <= LIMIT and found["same_ids"] and found["same_answers"]


def row(version: Version, found: dict[str, Any]) -> str:
    if "error" in found:
        cells = [version.name, "", "", f"not opened: {found['error']}", *[""] * len(QUESTIONS), "", ""]
    else:
        opened = found["opened"] if found["whole"] else f"its text half, as {found['opened']}: it has no InternVL"
        differences = (found["differences"][name] for name in QUESTIONS)
        numbers = ["" if difference is None else f"{difference:.1e}" for difference in differences]
        yes = {True: "same", False: "**differ**"}
        same = [yes[found["same_ids"]], yes[found["same_answers"]]]
        cells = [found["transformers"], found["torch"], found["python"], opened, *same, *numbers]
    return "| " + " | ".join(cells) + " |"


def table(rows: list[str], command: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heads = ["transformers", "torch", "Python", "opened as", "prompt ids", f"{ANSWER_TOKENS} greedy ids", *QUESTIONS]
    return "\n".join(
        [
            "# transformers that open our native export",
            "",
            "What `tessella convert tessella-nano OUT --to native` writes, opened in float32 by each and compared with our own:",
            f"ids of the prompts by its tokenizer, {ANSWER_TOKENS} greedy ids, the largest difference of a logit for each prompt",
            f"(limit {LIMIT:g}). What a version cannot be asked is left empty.",
            "",
            f"`{command}`, commit {commit.strip()}, {time.strftime('%Y-%m-%d', time.gmtime())}, {hardware()}",
            "",
            "| " + " | ".join(heads) + " |",
            "| " + " | ".join("---" for _ in heads) + " |",
            *rows,
            "",
        ]
    )


def hardware() -> str:
    return f"{psutil.cpu_count(logical=False)} CPU cores ({platform.machine()}), {psutil.virtual_memory().total / 2**30:.0f} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, default=ROOT / ".matrix", help="where the environments and the export lie")
    parser.add_argument("--only", nargs="*", default=[], help="versions of versions.toml, as 4.57 or newest")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "matrix.md")
    options = parser.parse_args()
    native, truth = options.place / "native", options.place / "truth"
    convert = [sys.executable, "-m", "tessella.cli", "convert", "tessella-nano", str(native), "--to", "native", "--force"]
    subprocess.run(convert, check=True)
    write_truth("tessella-nano", truth)
    rows, good = [], True
    for version in versions():
        if options.only and version.name not in options.only:
            continue
        print(f"transformers {version.name} …", file=sys.stderr, flush=True)
        found = probe(environment(version, options.place), native, truth)
        rows.append(row(version, found))
        good &= is_good(found)
        print(rows[-1], flush=True)
    options.out.write_text(table(rows, "make matrix"), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
