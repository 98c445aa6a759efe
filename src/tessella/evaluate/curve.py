"""The loss curve of a run as inline SVG that takes the colours of the page around it.

In: a run's metrics.jsonl.  Out: SVG text without a prologue, "" when the file holds no loss.
"""

import io
import json
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from tessella.errors import DataError

INK = "#010203"  # stands for the page's text colour; no other part of the drawing has it
LINES = ("#2f7ed8", "#e8833a", "#3fa34d", "#b04fc4")


def read_losses(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, loss) of each key that ends in "loss"; lines without a step or with another kind of value pass by.

    Raises DataError when the file is missing or a line that is not the last is no JSON.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; give the metrics.jsonl that finetune wrote into its run folder")
    curves: dict[str, list[tuple[int, float]]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # a run that was stopped in the middle of a line; its curve is whole up to there
            raise DataError(f"{path}:{number} is not JSON ({error}); give another run's metrics.jsonl") from error
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            for key, value in row.items():
                if key.endswith("loss") and isinstance(value, int | float):
                    curves.setdefault(key, []).append((row["step"], float(value)))
    return curves


def loss_curve(path: Path) -> str:
    """The curves of a run's metrics.jsonl as SVG. Raises DataError as read_losses."""
    curves = read_losses(path)
    return draw(curves) if curves else ""


def draw(curves: dict[str, list[tuple[int, float]]], what: str = "loss") -> str:
    """Name -> (step, value) -> SVG; the longest curve is thin, the others carry marks. what: stands beside the axis."""
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    longest = max(curves, key=lambda name: len(curves[name]))
    for colour, (name, points) in zip(LINES * len(curves), curves.items(), strict=False):
        steps, losses = zip(*points, strict=True)
        style = {"linewidth": 1.2} if name == longest else {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
        axes.plot(steps, losses, color=colour, label=name.replace("_", " "), **style)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(what, color=INK)
    axes.set_ylim(bottom=0)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    out = io.StringIO()
    # Text as text: smaller, and it can be selected. A fixed salt: the same curve gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tessella"}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("'DejaVu Sans', ", "").rstrip()
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)  # its rule would hold for the whole page
    head = rf'<svg viewBox="\1" role="img" aria-label="{what} by step" stroke-linejoin="round">'
    return re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', head, svg, count=1)
