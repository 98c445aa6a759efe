"""Boxes and masks: scenes tell the truth, the decoder learns it, files of one's own are read strictly, scores count right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.decode import Shown
from tessella.errors import DataError
from tessella.evaluate.boxes import SceneAnswer, ap50, mask_overlaps, score_answers
from tessella.foods import STYLES
from tessella.marks import Box as MarkBox
from tessella.marks import boxes_in, draw_boxes, from_run_lengths, run_lengths
from tessella.model.decoders.boxes import BoxConfig, BoxDecoder, Found, found_objects, mask_side
from tessella.scenes.coco import CocoRequest, mask_of, read_coco
from tessella.scenes.compose import Kit, compose, photos_in
from tessella.scenes.requests import BOX_KINDS, PICTURE_KINDS, PLAIN_KINDS, Request
from tessella.scenes.truth import Box, box_of, overlap_of_boxes, overlap_of_masks

NO_SCIPY = "boxes and masks are taught with scipy, which is in the multitask extra"
KIT = Kit(STYLES[:2], most_objects=3, foods=6)


# ---- scenes


def test_a_scene_is_the_same_for_all_who_ask_and_its_boxes_are_of_what_can_be_seen() -> None:
    for number in range(6):
        one, other = compose(KIT, number), compose(KIT, number)
        assert one.picture.tobytes() == other.picture.tobytes()
        for thing in one.things:
            assert thing.mask.any() and thing.box == box_of(thing.mask)
            assert 0 <= thing.box.left < thing.box.right <= 1 and 0 <= thing.box.top < thing.box.bottom <= 1
        masks = [thing.mask for thing in one.things]
        assert sum(mask.astype(int) for mask in masks).max() <= 1, "what is covered belongs to what covers it"


def test_what_is_held_out_is_another_scene_in_another_style() -> None:
    held = Kit(STYLES[-1:], most_objects=3, foods=6, held_out=True)
    assert compose(held, 0).picture.tobytes() != compose(KIT, 0).picture.tobytes()
    assert {thing.style for thing in compose(held, 0).things} == {"twemoji"}


def test_every_kind_of_request_has_one_truth_for_each_routing_token() -> None:
    kinds = (*BOX_KINDS, *PLAIN_KINDS, *PICTURE_KINDS)
    seen = set()
    for number in range(60):
        asked = Request(KIT, number, kinds).make()
        seen.add(asked.kind)
        answer = asked.messages[1].text
        assert [truth.route for truth in asked.truths] == [f"[{name}]" for name in _routes_in(answer)]
        if asked.kind == "text":
            boxes = boxes_in(answer)
            assert boxes and overlap_of_boxes(Box(*(side / 1000 for side in _sides(boxes[0]))), asked.things[0].box) > 0.95
    assert seen == set(kinds)


def _routes_in(text: str) -> list[str]:
    return [part.partition("]")[0] for part in text.split("[")[1:] if part.partition("]")[0].isupper()]


def _sides(box: MarkBox) -> tuple[int, int, int, int]:
    return box.x1, box.y1, box.x2, box.y2


def test_photographs_are_grounds_and_a_folder_without_any_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no photographs"):
        photos_in(tmp_path)
    Image.new("RGB", (300, 200), (9, 99, 199)).save(tmp_path / "sea.jpg")
    kit = Kit(STYLES[:1], photos_in(tmp_path), foods=4)
    blue = [np.asarray(compose(kit, number).picture)[0, 0].tolist() for number in range(8)]
    assert any(abs(pixel[2] - 199) < 12 and pixel[0] < 30 for pixel in blue)


# ---- the decoder


def test_the_decoder_learns_scenes_by_heart() -> None:
    """Random features stand for a tower's; what it needs of the pixels comes through its own stem."""
    pytest.importorskip("pycocotools")
    pytest.importorskip("scipy", reason=NO_SCIPY)
    from tessella.train.multitask.boxloss import box_loss, targets_of  # scipy
    from tessella.train.multitask.rows import aim_of

    torch.manual_seed(0)
    decoder = BoxDecoder(BoxConfig(16, 8, (1,), width=32, heads=4, layers=1, objects=6))
    kit = Kit(STYLES[:2], most_objects=2, foods=6)
    asks = [Request(kit, number, ("everything",)).make() for number in range(3)]
    most, side = max(len(one.truths) for one in asks), 48
    labels = sorted({truth.label for one in asks for truth in one.truths})
    table = torch.randn(len(labels) + 1, 4, 16)  # the last stands for fillers
    places = [[labels.index(t.label) for t in one.truths] + [-1] * (most - len(one.truths)) for one in asks]
    words, asked = table[torch.tensor(places)], torch.tensor(places) >= 0
    pictures = [one.picture.resize((side, side)) for one in asks if one.picture is not None]
    tiles = torch.stack([torch.from_numpy(np.asarray(one, dtype=np.float32) / 128 - 1).permute(2, 0, 1) for one in pictures])
    levels = [torch.randn(3, 6, 6, 8)]
    targets = targets_of([[aim_of(truth, side // 4) for truth in one.truths] for one in asks], torch.device("cpu"))
    adam = torch.optim.AdamW(decoder.parameters(), lr=4e-3)
    for _ in range(60):
        loss = box_loss(decoder(levels, tiles, words, asked), targets, asked).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        adam.step()
    with torch.no_grad():
        guess = decoder(levels, tiles, words, asked)[-1]
    answers = [
        SceneAnswer(
            "",
            one,
            "",
            tuple(
                Shown(truth.route, truth.label, tuple(found_objects(guess, k, number, (224, 224), sure=0.05)))
                for number, truth in enumerate(one.truths)
            ),
        )
        for k, one in enumerate(asks)
    ]
    score = score_answers(answers)
    assert score.ap50 is not None and score.ap50 > 0.9
    assert score.mask_overlap is not None and score.mask_overlap > 0.7


def test_fillers_behind_a_picture_with_fewer_classes_change_nothing() -> None:
    decoder = BoxDecoder(BoxConfig(16, 8, (1,), width=48, heads=4, layers=2, objects=8)).eval()
    levels, tiles, words = [torch.randn(1, 4, 4, 8)], torch.randn(1, 3, 32, 32), torch.randn(1, 2, 4, 16)
    with torch.no_grad():
        alone = decoder(levels, tiles, words[:, :1], torch.tensor([[True]]))[-1]
        filled = decoder(levels, tiles, words, torch.tensor([[True, False]]))[-1]
    torch.testing.assert_close(alone.scores[..., 0], filled.scores[..., 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.boxes, filled.boxes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [32, 42, 44, 45])
def test_masks_that_are_aimed_at_are_as_large_as_those_that_are_guessed(side: int) -> None:
    decoder = BoxDecoder(BoxConfig(16, 8, (1,), width=48, heads=4, layers=1, objects=4)).eval()
    levels, words = [torch.randn(1, 4, 4, 8)], torch.randn(1, 1, 4, 16)
    with torch.no_grad():
        guessed = decoder(levels, torch.randn(1, 3, side, side), words, torch.tensor([[True]]))[-1].masks
    assert guessed is not None and guessed.shape[-1] == mask_side(side)


def test_a_pictures_loss_is_the_same_alone_and_in_company() -> None:
    """Pictures with no object, with more objects than guesses, and with classes that are not there stand beside each other."""
    pytest.importorskip("scipy", reason=NO_SCIPY)
    from tessella.train.multitask.boxloss import box_loss, targets_of  # scipy
    from tessella.train.multitask.rows import Aim

    torch.manual_seed(1)
    chance = np.random.default_rng(1)

    def aim(objects: int, known: bool) -> Aim:
        boxes = chance.uniform(0.2, 0.4, (objects, 4)).astype(np.float32)
        masks = chance.integers(0, 2, (objects, 8, 8)).astype(np.float16) * known
        return Aim(boxes, masks, known, None)

    pictures = [[aim(2, True), aim(1, True)], [aim(0, True)], [aim(5, False)], [aim(0, True), aim(1, False)]]
    decoder = BoxDecoder(BoxConfig(16, 8, (1,), width=48, heads=4, layers=2, objects=4)).eval()
    levels, tiles, words = [torch.randn(4, 4, 4, 8)], torch.randn(4, 3, 32, 32), torch.randn(4, 2, 4, 16)
    asked = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
    cpu = torch.device("cpu")
    with torch.no_grad():
        together = box_loss(decoder(levels, tiles, words, asked), targets_of(pictures, cpu), asked)
        for k, some in enumerate(pictures):
            width = len(some)
            guesses = decoder([levels[0][k : k + 1]], tiles[k : k + 1], words[k : k + 1, :width], asked[k : k + 1, :width])
            alone = box_loss(guesses, targets_of([some], cpu), asked[k : k + 1, :width])
            torch.testing.assert_close(alone[0], together[k], atol=1e-4, rtol=1e-4)
    assert together.isfinite().all()


# ---- scores


def answer(boxes: list[tuple[float, ...]], label: str = "", shrink: float = 0.0) -> SceneAnswer:
    asked = next(one for n in range(99) if (one := Request(KIT, n, ("segment",)).make()).truths[0].boxes)
    truth = asked.truths[0]
    size = truth.masks[0].shape
    empty = torch.zeros(size, dtype=torch.bool)
    masks = [torch.from_numpy(mask) for mask in truth.masks] + [empty] * len(boxes)
    found = [Found(tuple(box), 0.9 - 0.1 * k, masks[k]) for k, box in enumerate(boxes)]  # type: ignore[arg-type]
    return SceneAnswer("", asked, "", (Shown("[SEG]", label or truth.label, tuple(found)),))


def test_right_boxes_under_a_wrong_name_and_false_ones_lower_ap50() -> None:
    pytest.importorskip("pycocotools")
    truth = [tuple(box) for box in answer([]).asked.truths[0].boxes]
    assert ap50([answer(truth)]) == pytest.approx(1.0)
    assert ap50([answer(truth, label="another name")]) == 0.0
    assert ap50([answer([])]) == 0.0
    first_wrong = [(0.0, 0.0, 0.01, 0.01), *truth]
    assert 0.2 < float(ap50([answer(first_wrong)]) or 0) < 0.9


def test_masks_that_were_missed_count_nothing_and_true_ones_all() -> None:
    truth = [tuple(box) for box in answer([]).asked.truths[0].boxes]
    assert mask_overlaps(answer(truth)) == pytest.approx([1.0] * len(truth))
    assert mask_overlaps(answer([])) == [0.0] * len(truth)


# ---- marks


def test_run_lengths_are_cocos_and_come_back() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    chance = np.random.default_rng(0)
    for shape in ((5, 7), (1, 1), (40, 30)):
        for share in (0.0, 0.3, 1.0):
            mask = chance.random(shape) < share
            code = run_lengths(mask)
            assert np.array_equal(from_run_lengths(code), mask)
            assert np.array_equal(masks.decode(masks.frPyObjects(code, *shape)).astype(bool), mask)
    with pytest.raises(ValueError, match="add up to 3"):
        from_run_lengths({"size": [2, 2], "counts": [1, 2]})


def test_masks_are_drawn_in_the_colour_of_their_box() -> None:
    mask = np.zeros((100, 200), dtype=np.bool_)
    mask[20:80, 20:180] = True
    drawn = draw_boxes(Image.new("RGB", (200, 100), "white"), [MarkBox("a", 100, 200, 900, 800)], [mask])
    assert (
        drawn.size == (640, 320) and drawn.getpixel((320, 160)) != (255, 255, 255) and drawn.getpixel((5, 5)) == (255, 255, 255)
    )


# ---- one's own pictures


def coco(folder: Path, **changes: object) -> Path:
    Image.new("RGB", (80, 40), "orange").save(folder / "dish.png")
    raw: dict[str, object] = {
        "images": [{"id": 7, "file_name": "dish.png", "width": 80, "height": 40}],
        "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "word " * 40}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 1,
                "bbox": [10, 10, 20, 10],
                "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]],
            },
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [60, 30, 40, 20]},
        ],
    }
    path = folder / "own.json"
    path.write_text(json.dumps({**raw, **changes}))
    return path


def test_boxes_polygons_and_run_lengths_are_read(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    pictures, skipped = read_coco(coco(tmp_path))
    assert not skipped and len(pictures[0].marked) == 2
    assert pictures[0].marked[0].box == (0.125, 0.25, 0.375, 0.5)
    assert pictures[0].marked[1].box == (0.75, 0.75, 1.0, 1.0), "cut at the picture's edge"
    assert len(pictures[0].marked[1].label.split()) == 40, "a name of forty words is a name"
    mask = mask_of(pictures[0].marked[0].segmentation, 40, 80)
    assert mask.shape == (40, 80) and overlap_of_boxes(box_of(mask), pictures[0].marked[0].box) > 0.8
    code = run_lengths(mask)
    assert overlap_of_masks(mask_of(code, 40, 80), mask) == 1.0
    asked = CocoRequest(pictures[0], 0, seed=1).make()
    assert asked.truths and all(truth.boxes for truth in asked.truths)


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        ({"bbox": [10, 10, -5, 10]}, "backwards"),
        ({"bbox": [90, 10, 5, 10]}, "outside the picture"),
        ({"bbox": [1, 2, 3]}, "broken box"),
        ({"bbox": [1, 2, 3, 4], "category_id": 9}, "no class"),
        ({"bbox": [1, 2, 3, 4], "image_id": 8}, "no such image"),
        ({"bbox": [1, 2, 3, 4], "segmentation": {"size": [10, 10], "counts": [100]}}, r"mask of another size: \[10, 10\]"),
        ({"bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3]]}, "broken polygon"),
    ],
)
def test_a_fault_in_an_annotation_is_told_by_its_number(tmp_path: Path, annotation: dict[str, object], told: str) -> None:
    row = {"id": 5, "image_id": 7, "category_id": 1, **annotation}
    pictures, skipped = read_coco(coco(tmp_path, annotations=[row]))
    assert len(skipped) == 1 and "annotation 5" in skipped[0][0] and re.search(told, skipped[0][1])
    assert CocoRequest(pictures[0], 0, seed=0).make().truths == (), "a picture with no object has an answer, too"


def test_an_object_larger_than_the_picture_is_cut_at_its_edges(tmp_path: Path) -> None:
    row = {"id": 5, "image_id": 7, "category_id": 1, "bbox": [-50, -50, 500, 500]}
    pictures, skipped = read_coco(coco(tmp_path, annotations=[row]))
    assert not skipped and pictures[0].marked[0].box == (0, 0, 1, 1)


def test_a_file_that_is_no_coco_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"images": 3}')
    with pytest.raises(DataError, match="no COCO-style file"):
        read_coco(tmp_path / "other.json")
    with pytest.raises(DataError, match="no images"):
        read_coco(coco(tmp_path, images=[]))
    pictures, _ = read_coco(coco(tmp_path, images=[{"id": 7, "file_name": "dish.png", "width": 81, "height": 40}]))
    with pytest.raises(DataError, match="80 x 40 px, the COCO file says 81 x 40"):
        CocoRequest(pictures[0], 0, seed=0).make()
