"""Every fault that was planted in a set is reported by its kind, file and line, and the run says so before it begins."""

import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tessella.errors import DataError
from tessella.inputs import Inputs
from tessella.tokenizer import Tokenizer
from tessella.train.dataset import read_recipe_data
from tessella.train.fingerprints import Known, fingerprint, fingerprints
from tessella.train.preflight import look
from tessella.train.recipe import Recipe
from tessella.train.supply import supply
from tiny import tiny_config, tiny_tokenizer


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return Inputs(tiny_config("LlamaForCausalLM"), Tokenizer.load(folder))


def drawing(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture of its own: ellipses in places and colours by the seed."""
    chance = np.random.default_rng(seed)
    picture = Image.new("RGB", size, tuple(chance.integers(0, 256, 3).tolist()))
    for _ in range(7):
        x, y = int(chance.integers(0, 130)), int(chance.integers(0, 90))
        ImageDraw.Draw(picture).ellipse((x, y, x + 50, y + 40), fill=tuple(chance.integers(0, 256, 3).tolist()))
    return picture


def row(question: str, answer: str, *images: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": list(images), "conversations": turns, **more}


def planted(folder: Path) -> tuple[Path, Path, dict[str, list[str]]]:
    """A set to learn from and one held out, with their faults: kind -> places."""
    for seed in range(30):
        drawing(seed).save(folder / f"{seed}.png")
    drawing(3).resize((80, 60)).save(folder / "smaller.jpg", quality=60)
    drawing(5).save(folder / "again.webp", quality=50)
    (folder / "no-picture.png").write_text("text")
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 80).convert("RGB").save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:3000])
    good = [row(f"What is number {n}?", f"drawing {n}", f"{n}.png") for n in range(12)]
    faults: list[tuple[str, Any]] = [
        ("broken JSON", '{"image": "0.png", '),
        ("no row", [1, 2]),
        ("no conversation", {"text": "x"}),
        ("picture missing", row("What?", "x", "none.png")),
        ("picture unusable", row("What?", "x", "no-picture.png")),
        ("picture unusable", row("What?", "x", "cut.jpg")),
        ("picture on the web", row("What?", "x", "https://example.org/a.png")),
        ("image is no path", {**row("What?", "x"), "image": 7}),
        ("pictures and marks differ", row("<image><image>\nWhat?", "x", "0.png")),
        ("row without image", row("<image>\nWhat?", "x")),
        ("empty answer", row("What?", " ", "0.png")),
        ("empty turn of the user", row(" ", "x")),
        ("nothing to learn", {"conversations": [{"from": "human", "value": "Hi"}]}),
        ("two turns of the user in a row", {"conversations": [{"from": "human", "value": "a"}, *row("q", "a")["conversations"]]}),
        ("no question first", {"conversations": [{"from": "gpt", "value": "a"}]}),
        ("unknown role", {"conversations": [{"from": "tool", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("system text twice", {"system": "a", "conversations": [{"from": "system", "value": "b"}]}),
        ("broken text", '{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}'),
        ("over-long", row("What is it? " * 2000, "x")),
        ("box outside", row("Where?", "<box>[[0, 0, 1200, 10]]</box>", "0.png")),
        ("broken box", row("Where?", "<box>here</box>", "0.png")),
        ("video missing", row("<video>What?", "x", video="none.mp4", image=[])),
        ("duplicate", row("What is number 2?", "drawing 2", "2.png")),
        ("duplicate", row("What is number 3?", "drawing 3", "smaller.jpg")),
        ("contradiction", row("What is number 4?", "something else", "4.png")),
        ("no question", row("<image>", "drawing 20", "20.png")),
    ]  # fmt: skip
    held = [
        row("Held 25?", "25", "25.png"),
        row("Held 1?", "1", "1.png"),
        row("Held 5?", "5", "again.webp"),
        row("Held 26?", "26", "26.png"),
    ]
    train, held_out = folder / "train.jsonl", folder / "held.jsonl"
    for path, rows in ((train, [*good, *(fault for _, fault in faults)]), (held_out, held)):
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows), encoding="utf-8")
    places: dict[str, list[str]] = defaultdict(list)
    for line, (kind, _) in enumerate(faults, start=len(good) + 1):
        places[kind].append(f"train.jsonl:{line}")
    places["leak"], places["leak by looks"] = ["held.jsonl:2"], ["held.jsonl:3"]
    return train, held_out, dict(places)


def test_each_planted_fault_is_reported_by_kind_count_and_place_and_nothing_else(tmp_path: Path, inputs: Inputs) -> None:
    pytest.importorskip("av", reason="a video that is missing is told by PyAV, which is in the data extra")
    train, held_out, places = planted(tmp_path)
    data = read_recipe_data(Recipe(data=(train,), held_out_data=(held_out,), max_bad_share=1.0), inputs)
    found = look(data, 60.0, 100.0)
    reported: dict[str, list[str]] = defaultdict(list)
    for fault in found.faults:
        reported[fault.kind].append(fault.place)
    assert {kind: sorted(some) for kind, some in reported.items()} == {kind: sorted(some) for kind, some in places.items()}
    assert len(places) >= 24
    assert found.compared == found.pictures
    told = "\n".join(found.told(0))
    assert all(place in told for some in places.values() for place in some)
    assert "and 1 more (--places 0 names all)" in "\n".join(found.told(1))


def test_a_run_tells_what_it_uses_nevertheless_and_stops_when_too_much_is_bad(tmp_path: Path, inputs: Inputs) -> None:
    train, held_out, _ = planted(tmp_path)
    recipe = Recipe(data=(train,), held_out_data=(held_out,), max_bad_share=1.0, preflight_s=60.0)
    notes = "\n".join(supply(recipe, inputs).ledger.notes)
    assert "2 x duplicate, as in train.jsonl:35" in notes
    assert "1 x leak by looks, as in held.jsonl:3: held out, but train.jsonl:6 trains on a picture that looks the same" in notes
    with pytest.raises(DataError, match=r"of 38 samples are bad.*mend them, or raise max_bad_share"):
        supply(Recipe(data=(train,), held_out_data=(held_out,)), inputs)


def test_pictures_are_known_again_and_others_are_not() -> None:
    some = {f"{seed}": fingerprint(drawing(seed)) for seed in range(60)}
    known = Known(some)  # type: ignore[arg-type]
    for seed in range(60):
        for quality, side in ((30, 160), (90, 97)):
            stream = io.BytesIO()
            drawing(seed).resize((side, side * 120 // 160)).save(stream, "JPEG", quality=quality)
            assert known.same_as(fingerprint(Image.open(stream).convert("RGB"))) == [str(seed)]
    assert known.same_as(fingerprint(drawing(99))) == []


def test_no_time_compares_nothing_and_says_so(tmp_path: Path, inputs: Inputs) -> None:
    train, held_out, _ = planted(tmp_path)
    data = read_recipe_data(Recipe(data=(train,), held_out_data=(held_out,), max_bad_share=1.0), inputs)
    assert look(data, 0.0, 100.0).compared == 0
    assert {fault.kind for fault in look(data, 0.0, 100.0).faults} >= {"leak", "duplicate"}
    assert fingerprints([tmp_path / "0.png"], -1.0, 100.0) == {}
    assert any("pictures were compared" in note for note in look(data, 1e-9, 100.0).notes())
