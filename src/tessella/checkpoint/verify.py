"""Do two models give the same answers? Logits on real prompts, compared in float32.

In: prompts (text alone, a picture, tiles over two turns, two pictures) and the logits of two models on them.  Out: a Proof.
T tokens, V vocabulary.

Both sides run in float32 whatever the weights are stored in, so that the arithmetic of bfloat16 does not hide behind the
difference: what is left is the rounding of the stored weights alone. How much that may be is measured: a third model, whose
weights are shaken as rounding to the stored type shakes them, answers too, and the converted one may lie hardly farther from
the unmerged model than that one does. Without that measurement the limit is a share of the logits' spread (their standard
deviation over the vocabulary) that follows the stored type: looser for most models, too close for strongly taught ones.
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
# How far the converted model's difference may lie beyond the shaken one's: the largest, and the root mean square. Measured on
# tiny models with changes of 0.01 to 1.3 of the spread in three types: 0.6 to 1.1 and 0.92 to 1.07 (docs/log.md, 2026-11-30).
BEYOND_LARGEST, BEYOND_RMS = 2.5, 1.5


@dataclass(frozen=True)
class Proof:
    """What the comparison found. effect_rms: what the adapter changed; None when there was none to compare with."""

    largest_difference: float
    limit: float
    difference_rms: float
    rms_limit: float | None  # by the shaken model; None when nothing was rounded
    effect_rms: float | None
    spread: float
    equal_argmax: float  # share of positions whose likeliest next token is the same
    prompts: int
    tokens: int

    @property
    def holds(self) -> bool:
        return self.largest_difference <= self.limit and (self.rms_limit is None or self.difference_rms <= self.rms_limit)

    def __str__(self) -> str:
        rms = "" if self.rms_limit is None else f", root mean square {self.difference_rms:.2g} (limit {self.rms_limit:.2g})"
        return (
            f"largest logit difference {self.largest_difference:.2g} (limit {self.limit:.2g}){rms}, "
            f"likeliest token equal at {self.equal_argmax:.1%} of {self.tokens} positions in {self.prompts} prompts"
        )

    def require(self, what: str) -> None:
        """Raises CheckpointError with the numbers unless the proof holds."""
        if not self.holds:
            raise CheckpointError(f"{what} does not answer like the unmerged model: {self}; it was not kept")


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
    wanted: Sequence[Tensor],
    found: Sequence[Tensor],
    stored: torch.dtype,
    *,
    shaken: Sequence[Tensor] | None = None,
    untaught: Sequence[Tensor] | None = None,
) -> Proof:
    """Compare logits (T, V) of the same prompts. stored: the type of the converted weights, which sets the limit.

    shaken: logits of the model whose weights were shaken as rounding shakes them: they set the limits instead.
    untaught: logits of the base without the adapter on the first prompts, to tell what the adapter changes.
    """
    a, b = torch.cat(list(wanted)), torch.cat(list(found))
    spread = float(a.std(-1).mean())
    # Rounding also moves all logits of a token together, by chance up to twice as far as it moves them against each other
    # (docs/log.md, 2026-12-01). No answer depends on that, and where rounding is the yardstick it is taken out on both sides.
    apart = against_each_other if shaken is not None else torch.sub
    difference = apart(a, b)
    limit, rms_limit = LIMITS[stored] * max(1.0, spread), None
    if shaken is not None:
        by_rounding = apart(torch.cat(list(shaken)), a)
        by_order = LIMITS[torch.float32] * max(1.0, spread)
        limit = BEYOND_LARGEST * float(by_rounding.abs().max()) + by_order
        rms_limit = BEYOND_RMS * rms(by_rounding) + by_order
    return Proof(
        largest_difference=float(difference.abs().max()) if bool(torch.isfinite(b).all()) else float("inf"),
        limit=limit,
        difference_rms=rms(difference),
        rms_limit=rms_limit,
        effect_rms=None if untaught is None else rms(torch.cat(list(wanted[: len(untaught)])) - torch.cat(list(untaught))),
        spread=spread,
        equal_argmax=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        prompts=len(wanted),
        tokens=len(a),
    )


def against_each_other(a: Tensor, b: Tensor) -> Tensor:
    """a - b (T, V) without what all logits of a token have in common."""
    difference = a - b
    return difference - difference.mean(-1, keepdim=True)


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())
