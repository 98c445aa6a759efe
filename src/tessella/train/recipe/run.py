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
    nproc: int = 1
    """Processes on this machine, each with a GPU of its own (on a CPU: a share of the cores); torchrun's own number wins."""
    parallel: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """How they share the work: ddp, everything on each; fsdp2 (or zero3), weights, gradients and moments cut into shares;
    zero2, gradients and moments cut, a step's weights gathered once and kept until its backward run is over."""
    offload: bool = False
    """With fsdp2: shares of weights and moments lie in the machine's memory, not the GPU's; slower, and fits more."""
    evaluate_every: int = 100
    """Held-out loss, score and sample answers every so many steps, and before the first; 0: at the end only."""
    sample_answers: int = 4
    """Held-out questions whose answers are shown each time."""
    score_samples: int = 32
    """Held-out questions that are answered and scored each time; 0: none."""
    metric: Literal["exact", "contains", "choice", "anls"] = "exact"
    """What is right in that score: the same words, holding them, the same letter, or near in spelling."""
    forgetting: bool = False
    """Ask 40 general questions each time too, and read a passage of English, to see what is forgotten."""
    save_every: int = 200
    """Checkpoint every so many steps; 0: at the end only."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    keep_best: bool = True
    """Save at the best held-out score (or loss, where nothing is scored) too, and keep that checkpoint besides the last ones."""
    on_nan: Literal["stop", "back"] = "stop"
    """A loss or gradient that is not finite stops the run, or steps it back to a checkpoint and passes that step over."""
    on_spike: Literal["tell", "stop", "back"] = "tell"
    """A loss that jumps is told with its samples, stops the run, or steps it back like on_nan."""
    spike: float = 4.0
    """A jump is a loss above so many times the median of the 64 steps before, and above it by 1 at least."""
    deterministic: bool = False
    """Bit-identical runs on a GPU too, at some speed; on a CPU they are so anyway."""
    report_every: int = 10
    """Loss, tokens/s and memory are logged every so many steps."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the JSON lines."""
    trackers: tuple[Literal["wandb", "swanlab"], ...] = ()
    """Tell Weights & Biases or SwanLab too; they need their package and, unless offline, an account."""


RUN_RANGES = {
    "workers": Bounds(0, 256),
    "time_limit_s": Bounds(0, above=True),
    "nproc": Bounds(1, 1024),
    "evaluate_every": Bounds(0),
    "score_samples": Bounds(0),
    "sample_answers": Bounds(0),
    "save_every": Bounds(0),
    "keep": Bounds(1),
    "spike": Bounds(1, above=True),
    "report_every": Bounds(1),
}
RUN_FREE_ON_RESUME = (
    "output", "resume", "device", "compile", "workers", "time_limit_s",
    "nproc", "parallel", "offload", "evaluate_every", "sample_answers", "score_samples", "metric", "forgetting", "trackers",
    "save_every", "keep", "keep_best", "on_nan", "on_spike", "spike",
    "deterministic", "report_every", "tensorboard",
)  # fmt: skip
