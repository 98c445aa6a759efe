"""What a model handed to its decoders becomes what a person sees: boxes, masks and pictures.

In: the prompt, the ids of the answer, and what the super-link queries behind its routing tokens became.  Out: a Shown for each.
Boxes are found in the last picture of the prompt. A decoder that is not there is told in words; the text stands by itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from tessella.image import normalise
from tessella.inputs import ModelInput
from tessella.marks import Box, run_lengths
from tessella.model.decoders.boxes import SURE, Found, found_objects
from tessella.model.routing import Routed
from tessella.model.vision_language import VisionLanguageModel
from tessella.tokenizer import Tokenizer

BREAK = re.compile(r"[,，、;；:：\n]|\[(?:DET|GRD|SEG|GEN|EDIT)\]")
MOST_MASK_PX = 2048  # longest side of a mask; it is drawn wider on a larger picture


@dataclass(frozen=True, eq=False)
class Shown:
    """What one routing token gave. trouble: why there is nothing, for people."""

    route: str
    label: str
    objects: tuple[Found, ...] = ()
    picture: Image.Image | None = None
    trouble: str = ""

    def boxes(self) -> list[Box]:
        """The objects' boxes in thousandths, as text grounding has them."""
        return [Box(self.label, *(round(1000 * side) for side in one.box)) for one in self.objects]

    def as_json(self) -> dict[str, Any]:
        """Stable keys; docs/boxes.md tells them. The picture itself is not in it."""
        rows = [
            {"box": list(box), "score": round(one.score, 4), "mask": run_lengths(one.mask.numpy())}
            for one, box in zip(self.objects, ([b.x1, b.y1, b.x2, b.y2] for b in self.boxes()), strict=True)
        ]
        return {"route": self.route, "label": self.label, "objects": rows, "trouble": self.trouble}


@torch.inference_mode()
def decode_routed(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    prompt: ModelInput,
    ids: Sequence[int],
    routed: Sequence[Routed],
    size: tuple[int, int] | None = None,
    sure: float = SURE,
    seed: int = 0,
) -> list[Shown]:
    """One answer's routing tokens in order. size: (width, height) of the last picture, for masks; else the tile's.

    sure: objects below this score are none.  seed: of the noise that pictures are made of.
    """
    shown = [Shown(one.route.name, label_before(tokenizer, ids[: one.said])) for one in routed]
    boxes = [place for place, one in enumerate(routed) if one.route.kind == "boxes"]
    if boxes:
        found = _boxes(model, prompt, [routed[place] for place in boxes], size, sure)
        for place, one in zip(boxes, found, strict=True):
            shown[place] = replace(
                shown[place], objects=() if isinstance(one, str) else one, trouble=one if isinstance(one, str) else ""
            )
    told = [
        one if routed[k].route.kind == "boxes" else _painted(model, prompt, routed[k], one, seed) for k, one in enumerate(shown)
    ]
    return told + _without_room(tokenizer, ids, routed)


def _without_room(tokenizer: Tokenizer, ids: Sequence[int], routed: Sequence[Routed]) -> list[Shown]:
    """The routing token that an answer ended with because its queries did not fit, told; else nothing."""
    last = tokenizer.routes.of(ids[-1]) if ids else None
    if last is None or (routed and routed[-1].said == len(ids)):
        return []
    told = f"no room was left for its {last.queries} queries, which count as tokens of the answer; allow more (--max-tokens)"
    return [Shown(last.name, label_before(tokenizer, ids), trouble=told)]


def _painted(model: VisionLanguageModel, prompt: ModelInput, routed: Routed, shown: Shown, seed: int) -> Shown:
    """One [GEN] or [EDIT], painted; or why it is not."""
    assert model.routing is not None
    decoder, before = model.routing.pictures, None
    if decoder is None:
        why = model.routing.missing.get("pictures", "it was never taught (finetune --decoders pictures)")
        return replace(shown, trouble=f"the decoder of pictures is not there: {why}")
    if routed.route.name == "[EDIT]":
        if not len(prompt.tiles):
            return replace(shown, trouble="there is no picture to change; show one with --image or /image")
        if not decoder.edits:
            return replace(shown, trouble="this diffusion model draws, but cannot edit: its UNet has no place for a picture")
        before = prompt.tiles[-1:].to(model.device).float() / 127.5 - 1
    painted = decoder.paint(routed.states[None].to(model.device), before, seed=seed)[0]
    pixels = ((painted.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return replace(shown, picture=Image.fromarray(pixels.permute(1, 2, 0).numpy()))


def label_before(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The words that stand before a routing token, which is the last of ids: "apple[DET], pear[DET]" -> "pear"."""
    return BREAK.split(tokenizer.decode(ids[:-1]))[-1].strip()


def _boxes(
    model: VisionLanguageModel, prompt: ModelInput, routed: Sequence[Routed], size: tuple[int, int] | None, sure: float
) -> list[tuple[Found, ...] | str]:
    """Objects of each token, or why there are none; all tokens of an answer are looked for together."""
    assert model.routing is not None
    decoder = model.routing.boxes
    if decoder is None:
        why = model.routing.missing.get("boxes", "it was never taught (finetune --decoders boxes)")
        return [f"the decoder of boxes and masks is not there: {why}"] * len(routed)
    if not len(prompt.tiles):
        return ["there is no picture to look for it in; show one with --image or /image"] * len(routed)
    tiles = normalise(prompt.tiles[-1:].to(model.device), torch.float32, model.config.vision.statistics)
    levels = model.vision_model.levels(tiles.to(model.dtype), decoder.config.layers_seen)
    words = torch.stack([one.states for one in routed])[None]
    asked = torch.ones((1, len(routed)), dtype=torch.bool, device=model.device)
    guess = decoder(levels, tiles, words, asked)[-1]
    width, height = size or (tiles.shape[-1], tiles.shape[-1])
    shrink = min(1.0, MOST_MASK_PX / max(width, height))
    wanted = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    return [
        tuple(found_objects(guess, 0, number, wanted, single=one.route.name == "[GRD]", sure=sure))
        for number, one in enumerate(routed)
    ]
