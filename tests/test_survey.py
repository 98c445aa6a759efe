"""A survey says what a dataset holds, shows the very tokens that are learned, and names what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessella.errors import DataError
from tessella.inputs import Inputs
from tessella.tokenizer import Tokenizer
from tessella.train.dataset import read_dataset
from tessella.train.survey import Spread, Survey, render_survey, runs_of, survey
from tiny import ARCHITECTURES, tiny_config, tiny_tokenizer


@pytest.fixture(params=ARCHITECTURES)
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> Inputs:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return Inputs(tiny_config(request.param), Tokenizer.load(folder))


def rows(tmp_path: Path, some: list[Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
    return path


def row(question: str, answer: str, *images: str) -> dict[str, Any]:
    return {"image": list(images), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def found_in(survey_: Survey, words: str) -> bool:
    return any(words in finding for finding in survey_.findings)


def test_the_example_marks_the_answer_and_its_end_and_nothing_else(tmp_path: Path, inputs: Inputs) -> None:
    Image.new("RGB", (112, 56), "red").save(tmp_path / "a.png")
    found = survey(rows(tmp_path, [row("What is it?", "红烧肉 and an apple.", "a.png")]), inputs)
    assert [run.text for run in found.example if run.learned] == ["红烧肉 and an apple.<|im_end|>"]
    slots = next(run for run in found.example if run.text.endswith("slots]"))
    assert slots.tokens == 3 * 4  # two tiles and a thumbnail, 4 visual tokens each
    assert "«红烧肉 and an apple.<|im_end|>»" in render_survey(found)
    assert found.example_place == "rows.jsonl:1"


def test_the_table_counts_what_build_makes(tmp_path: Path, inputs: Inputs) -> None:
    Image.new("RGB", (112, 56), "red").save(tmp_path / "a.png")
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "b.png")
    path = rows(tmp_path, [row("One?", "1", "a.png"), row("Two of them?", "2 and more", "a.png", "b.png"), row("None?", "0")])
    found = survey(path, inputs)
    built = [inputs.build(s.messages, s.pictures, open_turn=False) for s in read_dataset(path)[0]]
    spreads = {spread.name: spread for spread in found.spreads}
    assert spreads["tokens"].total == sum(len(one) for one in built)
    assert spreads["tokens"].maximum == max(len(one) for one in built)
    assert spreads["learned tokens"].total == sum(int(one.learn.sum()) for one in built)
    assert spreads["tiles of a picture"].total == sum(sum(one.tiles_per_picture) for one in built)
    assert (spreads["pictures"].minimum, spreads["pictures"].maximum) == (0, 2)
    assert (spreads["width px"].minimum, spreads["width px"].maximum, spreads["height px"].maximum) == (56, 112, 56)
    text = render_survey(found)
    assert all(spread.name in text and f"{spread.total:,}" in text for spread in found.spreads)


def test_runs_hold_every_token_once_and_agree_with_the_mask(tmp_path: Path, inputs: Inputs) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    sample = read_dataset(rows(tmp_path, [row("What?", "Apple", "a.png")]))[0][0]
    one = inputs.build(sample.messages, sample.pictures, open_turn=False)
    runs = runs_of(one, inputs)
    assert sum(run.tokens for run in runs) == len(one)
    assert [run.learned for run in runs for _ in range(run.tokens)] == one.learn.tolist()


def test_what_is_wrong_is_named(tmp_path: Path, inputs: Inputs) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    Image.new("RGB", (10, 60), "red").save(tmp_path / "tiny.png")
    good = [row(f"What is number {n}?", "Always this", "a.png") for n in range(12)]
    wrong = [
        row("Ripe?", "Yes", "a.png"),
        row("Ripe?", "No", "a.png"),
        row("Twin?", "Yes"),
        row("Twin?", "Yes"),
        row("Look at <image> closely", "Yes", "a.png"),
        row("Small?", "Yes", "tiny.png"),
        row("Gone?", "Yes", "gone.png"),
        row("word " * 6000, "Yes"),
        "broken",
    ]
    found = survey(rows(tmp_path, good + wrong), inputs)
    assert (found.samples, found.skipped) == (18, 3)
    assert found_in(found, "as in rows.jsonl:20: ")
    assert found_in(found, "different answers: rows.jsonl:13 says 'Yes', rows.jsonl:14 says 'No'")
    assert found_in(found, "rows.jsonl:15 and rows.jsonl:16")
    assert found_in(found, "end in one and the same answer, 'Always this'")
    assert found_in(found, "before they show the picture: rows.jsonl:17")
    assert found_in(found, "a quarter of a tile: rows.jsonl:18")
    assert found_in(found, "picture missing: as in rows.jsonl:19")
    assert found_in(found, "no row: as in rows.jsonl:21")
    text = render_survey(found)
    assert all(f"! {finding}" in text for finding in found.findings)


def test_a_good_dataset_has_no_findings(tmp_path: Path, inputs: Inputs) -> None:
    for kind in ("apple", "pear"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for n in range(4):
            Image.new("RGB", (60, 60), (n, 0, 0)).save(tmp_path / "data" / kind / f"{n}.png")
    found = survey(tmp_path / "data", inputs)
    assert found.findings == ()
    assert found.labels == (("apple", 4), ("pear", 4))
    assert "Nothing wrong was found." in render_survey(found)


def test_samples_near_the_limit_and_rare_classes_are_named(tmp_path: Path, inputs: Inputs) -> None:
    for name in ("apple/1.png", "apple/2.png", "apple/3.png", "pear/1.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60), "red").save(tmp_path / "data" / name)
    longest = max(spread.maximum for spread in survey(tmp_path / "data", inputs).spreads if spread.name == "tokens")
    narrow = Inputs(inputs.config, inputs.tokenizer, context_tokens=longest)
    found = survey(tmp_path / "data", narrow)
    assert found_in(found, f"fill over 90 % of the context of {longest:,} tokens")
    assert found_in(found, "1 of 2 classes have fewer than 3 samples: pear")


def test_pixels_cut_off_in_the_middle_are_found(tmp_path: Path, inputs: Inputs) -> None:
    noise = Image.effect_noise((200, 200), 80).convert("RGB")
    noise.save(tmp_path / "a.jpg")
    noise.save(tmp_path / "b.png")
    raw = bytearray((tmp_path / "b.png").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 2000] = bytes(2000)  # the end is whole, so only decoding shows it
    (tmp_path / "b.png").write_bytes(raw)
    found = survey(rows(tmp_path, [row("What?", "x", "a.jpg"), row("Who?", "y", "b.png")]), inputs)
    assert found.reasons == (("picture unusable", 1),)


def test_a_survey_is_json(tmp_path: Path, inputs: Inputs) -> None:
    found = survey(rows(tmp_path, [row("What?", "x")]), inputs)
    again = json.loads(json.dumps(found.as_dict()))
    assert set(again) >= {"path", "samples", "skipped", "share_bad", "reasons", "spreads", "labels", "example", "findings"}
    assert again["samples"] == 1


def test_a_dataset_with_nothing_good_is_refused(tmp_path: Path, inputs: Inputs) -> None:
    with pytest.raises(DataError, match="all 1 samples are bad"):
        survey(rows(tmp_path, ["broken"]), inputs)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60))
def test_a_spread_is_in_order_and_made_of_the_values(values: list[int]) -> None:
    spread = Spread.of("x", values)
    five = [spread.minimum, spread.median, spread.p95, spread.maximum]
    assert five == sorted(five)
    assert set(five) <= set(values)
    assert (spread.minimum, spread.maximum, spread.total) == (min(values), max(values), sum(values))
    assert sum(value <= spread.median for value in values) * 2 >= len(values)
