"""How a run goes: where it computes, what it writes, when it scores and saves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessella.train.recipe.values import Bounds


@dataclass(frozen=True)
class RunFields:
    """Fields of a Recipe."""

    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1" or "mps"."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the arithmetic; "auto": bfloat16 where the device has it."""
    compile: bool = False
    """Compile the model with torch.compile (CUDA only pays)."""
    workers: int = 2
    """Processes that read and cut pictures ahead of a GPU; on the CPU they would only take its cores, and none is used."""
    output: Path = Path("runs/finetune")
    """Folder of adapter, checkpoints and logs."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    time_limit_s: float | None = None
    """Stop and save after this many seconds; resume goes on."""
    evaluate_every: int = 100
    """Held-out loss and sample answers every so many steps; 0: at the end only."""
    sample_answers: int = 4
    """Held-out questions that are answered each time."""
    save_every: int = 200
    """Checkpoint every so many steps; 0: at the end only."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    report_every: int = 10
    """Loss, tokens/s and memory are logged every so many steps."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the JSON lines."""


RUN_RANGES = {
    "workers": Bounds(0, 256),
    "time_limit_s": Bounds(0, above=True),
    "evaluate_every": Bounds(0),
    "sample_answers": Bounds(0),
    "save_every": Bounds(0),
    "keep": Bounds(1),
    "report_every": Bounds(1),
}
RUN_FREE_ON_RESUME = (
    "output", "resume", "device", "compile", "workers", "time_limit_s",
    "evaluate_every", "sample_answers", "save_every", "keep", "report_every", "tensorboard",
)  # fmt: skip
