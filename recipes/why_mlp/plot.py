"""The lines of compare.py as a table and four drawings: accuracy and loss against samples, seconds and parameters.

In: its JSON lines.  Out: why-mlp.png, and a Markdown table on standard output, means over the seeds with their spread.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Lines = dict[str, list[dict[str, Any]]]
AXES = {
    ("samples", "held_out_loss"): "pictures learned from",
    ("samples", "held_out_accuracy"): "pictures learned from",
    ("seconds", "held_out_accuracy"): "seconds of learning, first stage included",
    ("parameters", "held_out_accuracy"): "parameters of the connector",
}


def read(path: Path) -> Lines:
    """The lines of each connector, in the order of the file; the seconds of a first stage are counted in."""
    lines: Lines = defaultdict(list)
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        line["seconds"] += line["stage1"].get("seconds", 0.0)
        lines[line["connector"]].append(line)
    return lines


def last(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last measuring of each seed."""
    return list({line["seed"]: line for line in lines}.values())


def table(lines: Lines) -> str:
    rows = ["| connector | parameters | tokens a tile | accuracy | loss | seconds | first token |", "| --- " * 7 + "|"]
    for name, some in lines.items():
        ends = last(some)
        accuracy, loss, seconds = (
            np.array([end[key] for end in ends]) for key in ("held_out_accuracy", "held_out_loss", "seconds")
        )
        first = np.mean([end["first_token_ms"] for end in ends])
        told = [name, f"{ends[0]['parameters'] / 1e6:.1f} M", str(ends[0]["visual_tokens"])]
        told += [f"{accuracy.mean():.1%} ± {accuracy.std():.1%}", f"{loss.mean():.3f} ± {loss.std():.3f}"]
        rows.append(f"| {' | '.join([*told, f'{seconds.mean():.0f}', f'{first:.0f} ms'])} |")
    return "\n".join(rows)


def draw(lines: Lines, out: Path) -> None:
    """A panel for each pair of AXES: the mean of the seeds, and each seed as a faint line; one point each for parameters."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for panel, ((across, up), words) in zip(panels.flat, AXES.items(), strict=True):
        for number, (name, some) in enumerate(lines.items()):
            colour = f"C{number}"
            if across == "parameters":
                ends = last(some)
                panel.scatter([end[across] for end in ends], [end[up] for end in ends], color=colour, label=name)
                panel.set_xscale("log")
                continue
            by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
            for line in some:
                by_step[line["step"]].append((line[across], line[up]))
            mean = np.array([np.mean(points, axis=0) for points in by_step.values()])
            panel.plot(*mean.T, color=colour, label=name)
            panel.scatter(*np.array([point for points in by_step.values() for point in points]).T, color=colour, s=6, alpha=0.4)
        panel.set_xlabel(words)
        panel.set_ylabel(up.replace("_", " ").replace("held out", "held-out"))
    panels[0, 0].legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--out", type=Path, default=Path("why-mlp.png"))
    args = parser.parse_args()
    lines = read(args.lines)
    draw(lines, args.out)
    print(table(lines))


if __name__ == "__main__":
    main()
