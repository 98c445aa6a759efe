"""How good boxes and masks are: AP50 by pycocotools, overlaps of masks, and the routing tokens themselves.

In: for each request the truths and what was shown.  Out: SceneScore.
AP50: every request and class is a picture of its own for COCOeval, one category, so a right box under a wrong name is wrong.
Mask overlap: over all true objects of all requests with masks, matched greedily by overlap; an object that was missed counts 0.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tessella.decode import Shown
from tessella.evaluate.metrics import Interval, wilson
from tessella.marks import boxes_in
from tessella.model.decoders.boxes import SURE
from tessella.scenes.requests import Asked
from tessella.scenes.truth import Box, Mask, overlap_of_boxes, overlap_of_masks

UNITS = 1000.0  # of a picture's side, for COCOeval
RIGHT_OVERLAP = 0.5


@dataclass(frozen=True, eq=False)
class SceneAnswer:
    """One request, answered."""

    place: str
    asked: Asked
    text: str
    shown: tuple[Shown, ...]
    read_back: str = ""  # what the model itself calls the picture that it drew
    judged: str | None = None  # what the independent judge calls it; None: nobody asked it

    @property
    def routed_right(self) -> bool:
        """The kinds of routing tokens that were right, and no others."""
        return {one.route for one in self.shown} == {truth.route for truth in self.asked.truths}


@dataclass(frozen=True)
class Share:
    """Right of total, with a 95 % interval."""

    right: int
    total: int

    @property
    def mean(self) -> float:
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> Interval:
        return wilson(self.right, self.total)

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval if self.total else (0.0, 1.0)
        return {"right": self.right, "total": self.total, "mean": self.mean, "low": low, "high": high}

    def __str__(self) -> str:
        return f"{self.mean:.1%} of {self.total}" if self.total else "not asked"


@dataclass(frozen=True)
class SceneScore:
    """All that is measured on scenes. None: nothing of it was asked."""

    routing: Share
    ap50: float | None
    objects: int  # that were to be found
    mask_overlap: float | None
    masks: int
    grounded: Share  # [GRD] boxes that overlap by half
    text_grounded: Share  # boxes in words that do
    named: Share
    counted: Share
    drawn: Share  # new pictures that the model itself calls by the name that was asked for
    judged: Share  # and that the independent judge does
    ap50_asked: float | None  # of the classes that the request named, so that only the decoder can err
    mask_overlap_asked: float | None

    def as_json(self) -> dict[str, Any]:
        shares = ("routing", "grounded", "text_grounded", "named", "counted", "drawn", "judged")
        plain = {key: value for key, value in asdict(self).items() if key not in shares}
        return {**plain, **{name: getattr(self, name).as_json() for name in shares}}

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        return [
            ("routing token right, or none", str(self.routing)),
            ("boxes, AP50", "not asked" if self.ap50 is None else f"{self.ap50:.3f} over {self.objects} objects"),
            ("masks, mean overlap", "not asked" if self.mask_overlap is None else f"{self.mask_overlap:.3f} over {self.masks}"),
            ("boxes of foods that the request names, AP50", "not asked" if self.ap50_asked is None else f"{self.ap50_asked:.3f}"),
            ("their masks", "not asked" if self.mask_overlap_asked is None else f"{self.mask_overlap_asked:.3f}"),
            ("[GRD], overlap of half", str(self.grounded)),
            ("boxes in words, overlap of half", str(self.text_grounded)),
            ("foods named, all of a scene", str(self.named)),
            ("foods counted", str(self.counted)),
            ("drawn foods that the model itself names right", str(self.drawn)),
            ("drawn foods that the independent judge does", str(self.judged)),
        ]


def score_answers(answers: Sequence[SceneAnswer]) -> SceneScore:
    boxed = [one for one in answers if any(truth.route in ("[DET]", "[SEG]") for truth in one.asked.truths)]
    overlaps = [overlap for one in boxed for overlap in mask_overlaps(one)]
    named_in_it = [one for one in boxed if one.asked.kind in ("detect", "segment")]
    asked = [overlap for one in named_in_it for overlap in mask_overlaps(one)]
    return SceneScore(
        routing=_share([one.routed_right for one in answers]),
        ap50=ap50(boxed),
        objects=sum(len(truth.boxes) for one in boxed for truth in one.asked.truths),
        mask_overlap=float(np.mean(overlaps)) if overlaps else None,
        masks=len(overlaps),
        grounded=_share([grounded(one) for one in answers if one.asked.kind == "ground"]),
        text_grounded=_share([text_grounded(one) for one in answers if one.asked.kind == "text"]),
        named=_share([named(one) for one in answers if one.asked.kind == "name"]),
        drawn=_share([one.asked.truths[0].label == one.read_back for one in answers if one.asked.kind == "draw"]),
        judged=_share([one.asked.truths[0].label == one.judged for one in answers if one.judged is not None]),
        ap50_asked=ap50(named_in_it),
        mask_overlap_asked=float(np.mean(asked)) if asked else None,
        counted=_share([one.text == one.asked.messages[-1].text for one in answers if one.asked.kind == "count"]),
    )


def _share(right: Sequence[bool]) -> Share:
    return Share(sum(right), len(right))


def grounded(answer: SceneAnswer) -> bool:
    """Whether the box behind [GRD] overlaps the true one by half."""
    true = answer.asked.truths[0].boxes[0]
    return any(
        overlap_of_boxes(Box(*one.box), true) >= RIGHT_OVERLAP
        for shown in answer.shown
        for one in shown.objects[:1]
        if one.score >= SURE
    )


def text_grounded(answer: SceneAnswer) -> bool:
    """Whether the first box in the words overlaps one of the things that were asked for by half."""
    first = boxes_in(answer.text)[:1]
    boxes = [Box(one.x1 / 1000, one.y1 / 1000, one.x2 / 1000, one.y2 / 1000) for one in first]
    return any(overlap_of_boxes(box, thing.box) >= RIGHT_OVERLAP for box in boxes for thing in answer.asked.things)


def named(answer: SceneAnswer) -> bool:
    """Whether the same foods are named, in whatever order."""
    said, true = (
        set(text.replace("、", ",").replace(", ", ",").split(",")) for text in (answer.text, answer.asked.messages[-1].text)
    )
    return said == true


def mask_overlaps(answer: SceneAnswer) -> list[float]:
    """Of each true object with a mask, the overlap with the found object of its name that fits it best. What a person would
    not be shown is not found: AP50 alone looks at faint objects.
    """
    free: dict[str, list[Mask]] = defaultdict(list)
    for shown in answer.shown:
        free[shown.label] += [one.mask.numpy() for one in shown.objects if one.score >= SURE]
    found = []
    for truth in answer.asked.truths:
        for mask in truth.masks:
            candidates = free[truth.label]
            fits = [overlap_of_masks(mask, one) if one.shape == mask.shape else 0.0 for one in candidates]
            best = max(range(len(fits)), key=fits.__getitem__, default=None)
            found.append(0.0 if best is None else fits[best])
            if best is not None:
                candidates.pop(best)
    return found


def ap50(answers: Sequence[SceneAnswer]) -> float | None:
    """Average precision at an overlap of half, by COCOeval; None when there is nothing to find."""
    from pycocotools.coco import COCO  # an extra, needed for this score alone
    from pycocotools.cocoeval import COCOeval

    truths: list[dict[str, Any]] = []
    guesses: list[dict[str, Any]] = []
    numbers: dict[tuple[int, str], int] = {}

    def number(answer: int, label: str) -> int:
        return numbers.setdefault((answer, label), len(numbers) + 1)

    for place, one in enumerate(answers):
        for truth in one.asked.truths:
            truths += [_row(box, number(place, truth.label)) for box in truth.boxes]
        for shown in one.shown:
            guesses += [_row(Box(*o.box), number(place, shown.label)) | {"score": o.score} for o in shown.objects]
    if not truths:
        return None
    if not guesses:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress and its table
        coco = COCO()
        rows = [row | {"id": k, "iscrowd": 0} for k, row in enumerate(truths, 1)]
        coco.dataset = {
            "images": [{"id": n} for n in numbers.values()],
            "annotations": rows,
            "categories": [{"id": 1, "name": "object"}],
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(guesses), "bbox")
        judge.params.iouThrs = np.array([RIGHT_OVERLAP])
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][0, :, 0, 0, -1]  # over recall; all areas, most detections
    return float(precision[precision > -1].mean()) if (precision > -1).any() else 0.0


def _row(box: Box, image: int) -> dict[str, Any]:
    left, top, right, bottom = (UNITS * side for side in box)
    sides = [left, top, right - left, bottom - top]
    return {"image_id": image, "category_id": 1, "bbox": sides, "area": sides[2] * sides[3]}
