"""Do two models give the same answers? Logits on real prompts, compared in float32.

In: prompts (text alone, a picture, tiles over two turns, two pictures) and the logits of two models on them.  Out: a Proof.
T tokens, V vocabulary.

Both sides run in float32 whatever the weights are stored in, so that the arithmetic of bfloat16 does not hide behind the
difference: what is left is the rounding of the stored weights alone. The limit is a share of the logits' spread (their
standard deviation over the vocabulary), and it follows the stored type: float32 differs only by the order of sums;
each further halving of the mantissa costs in proportion. A second rule guards against a limit that is too kind to a faint
adapter: the difference must be small beside what the adapter itself changes, or a lost adapter would pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tessella.chat import IMAGE_MARK, Message
from tessella.errors import CheckpointError
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.model.attend import Causal
from tessella.model.vision_language import VisionLanguageModel

# Largest allowed difference, as a share of the spread (at least 1). Measured: see tests/test_checkpoint_convert.py.
LIMITS = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
DROWNED = 0.5  # root mean square of the difference beside that of the adapter's effect


@dataclass(frozen=True)
class Proof:
    """What the comparison found. effect_rms: what the adapter changed; None when there was none to compare with."""

    largest_difference: float
    limit: float
    difference_rms: float
    effect_rms: float | None
    spread: float
    equal_argmax: float  # share of positions whose likeliest next token is the same
    prompts: int
    tokens: int

    @property
    def holds(self) -> bool:
        return self.largest_difference <= self.limit and not self.drowned

    @property
    def drowned(self) -> bool:
        return self.effect_rms is not None and self.difference_rms > DROWNED * self.effect_rms

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_difference:.2g} (limit {self.limit:.2g}, spread {self.spread:.2g}), "
            f"likeliest token equal at {self.equal_argmax:.1%} of {self.tokens} positions in {self.prompts} prompts"
        )

    def require(self, what: str) -> None:
        """Raises CheckpointError with the numbers unless the proof holds."""
        if self.largest_difference > self.limit:
            raise CheckpointError(f"{what} does not answer like the unmerged model: {self}; it was not kept")
        if self.drowned:
            raise CheckpointError(
                f"{what} loses the adapter: its logits differ by {self.difference_rms:.2g} (root mean square), and the adapter "
                f"itself changes them by only {self.effect_rms:.2g}; it was not kept. Teach longer, or convert in float32"
            )


def conversations() -> list[tuple[list[Message], list[Picture]]]:
    """What people write: text alone, a picture, two turns on a picture of many tiles with an answer between, two pictures."""
    one_tile = Picture(drawing(), max_tiles=1)
    tiled = Picture(drawing(), max_tiles=2)  # two tiles and the thumbnail: the order of tiles counts too
    asked = Message("user", f"{IMAGE_MARK}\nWhat is in this picture?")
    followed = [
        asked,
        Message("assistant", "A red circle, a green square, and a blue line."),
        Message("user", "图中是什么颜色？ Answer in one word."),
    ]
    turned = Picture(drawing().rotate(90, expand=True), max_tiles=1)
    compared = Message("user", f"Image-1: {IMAGE_MARK}\nImage-2: {IMAGE_MARK}\nWhat differs?")
    return [
        ([Message("user", "What is the capital of France? Explain in one sentence.")], []),
        ([asked], [one_tile]),
        (followed, [tiled]),
        ([compared], [one_tile, turned]),
    ]


def probes(inputs: Inputs) -> list[ModelInput]:
    """The conversations as one model eats them."""
    return [inputs.build(messages, pictures) for messages, pictures in conversations()]


def drawing() -> Image.Image:
    """A plain picture, twice as wide as high, that is the same on every machine."""
    image = Image.linear_gradient("L").resize((320, 160)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 120, 130), fill=(200, 30, 30))
    draw.rectangle((160, 40, 240, 120), fill=(30, 160, 60))
    draw.line((250, 20, 310, 140), fill=(20, 40, 200), width=9)
    return image


@torch.inference_mode()
def logits_on(model: VisionLanguageModel, prompts: Sequence[ModelInput]) -> list[Tensor]:
    """The float32 logits (T, V) after every token of each prompt, on the CPU."""
    found = []
    for one in prompts:
        visual = model.visual_tokens(one.tiles.to(model.device), one.questions) if len(one.tiles) else None
        embeddings = model.embed(one.ids.to(model.device), one.slots.to(model.device), visual, one.windows)
        positions = torch.arange(len(one), device=model.device)
        hidden = model(embeddings, positions, Causal([len(one)], model.device), len(one))
        found.append(model.logits(hidden).float().cpu())
    return found


def compare(
    wanted: Sequence[Tensor], found: Sequence[Tensor], stored: torch.dtype, *, untaught: Sequence[Tensor] | None = None
) -> Proof:
    """Compare logits (T, V) of the same prompts. stored: the type of the converted weights, which sets the limit.

    untaught: logits of the base without the adapter on the first prompts, for the second rule.
    """
    a, b = torch.cat(list(wanted)), torch.cat(list(found))
    spread = float(a.std(-1).mean())
    difference = a - b
    largest = float(difference.abs().max()) if bool(torch.isfinite(b).all()) else float("inf")
    return Proof(
        largest_difference=largest,
        limit=LIMITS[stored] * max(1.0, spread),
        difference_rms=rms(difference),
        effect_rms=None if untaught is None else rms(torch.cat(list(wanted[: len(untaught)])) - torch.cat(list(untaught))),
        spread=spread,
        equal_argmax=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        prompts=len(wanted),
        tokens=len(a),
    )


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())
