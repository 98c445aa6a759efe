"""Every way in which a dataset may be stored becomes the same samples; what cannot be read is named with its place."""

import io
import json
import re
import sys
import tarfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="PyAV is not installed: it is in the data extra")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: it is in the data extra")

import av
import pyarrow
from pyarrow import parquet

from tessella.chat import Message
from tessella.errors import ConfigError, DataError, TrainingError
from tessella.geometry import Size
from tessella.image import open_image, read_size
from tessella.inputs import Inputs
from tessella.tokenizer import Tokenizer
from tessella.train.augment import augment, may_mirror
from tessella.train.batch import Steps
from tessella.train.dataset import Sample, read_dataset, read_recipe_data
from tessella.train.grounding import check_boxes, from_pixels
from tessella.train.held import Embedded
from tessella.train.reading import Reading, columns_of
from tessella.train.recipe import Recipe
from tessella.train.streamed import Shuffled, Streamed
from tessella.train.supply import supply
from tessella.train.tables import Hub
from tiny import tiny_config, tiny_tokenizer

DOCUMENTATION = Path(__file__).parents[1] / "docs/data.md"


def jpeg(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(stream, "JPEG")
    return stream.getvalue()


def clip(path: Path, frames: int = 30) -> Path:
    """A video of 48 x 64 px whose grey level rises by 8 a frame, ten frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return Inputs(tiny_config("LlamaForCausalLM"), Tokenizer.load(folder))


def test_the_further_examples_of_the_documentation_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("apple", "pear"):
        (tmp_path / f"photos/{name}.jpg").write_bytes(jpeg())
    clip(tmp_path / "videos/clip.mp4")
    text = DOCUMENTATION.read_text(encoding="utf-8")
    for name, block in re.findall(r"<!-- file: (\S+) -->\n```json\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(block, encoding="utf-8")
    for name, code in re.findall(r"<!-- run: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, name, "exec"), {})
    columns = Reading(columns=columns_of(("image=photo", "question=asked", "answer=said")))
    answers = {}
    for name in ("meta.json", "sharegpt.json", "columns.jsonl", "food.parquet", "shard-000.tar"):
        samples, ledger = read_dataset(Path(name), reading=columns if name == "columns.jsonl" else None, max_bad_share=0.0)
        assert ledger.notes == []
        answers[name] = [sample.answer for sample in samples]
        assert all(open_image(picture.source).size == read_size(picture.source) for one in samples for picture in one.pictures)
    assert answers == {
        "meta.json": ["<ref>apple</ref><box>[[100, 200, 500, 900]]</box>", "The second.", "It gets brighter."],
        "sharegpt.json": ["An apple."],
        "columns.jsonl": ["An apple."],
        "food.parquet": ["An apple."],
        "shard-000.tar": ["An apple.", "A red apple.", "apple"],
    }
    flags = set(re.findall(r"--([a-z][a-z-]+)", text)) - {"json", "model", "metric", "data", "resume"}
    known = {name.replace("_", "-") for name in Recipe.__dataclass_fields__}
    assert flags - known == {"recipe", "forecast", "places"} & flags


def test_a_meta_file_repeats_its_parts_and_keeps_the_fraction(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(10):
        (tmp_path / f"photos/{number}.jpg").write_bytes(jpeg())
    lines(tmp_path / "a.jsonl", [row(f"What is {n}?", "x", image=f"{n}.jpg") for n in range(10)])
    lines(tmp_path / "b.jsonl", [row(f"Say {n}", "y") for n in range(4)])
    meta = {
        "a": {"root": "photos", "annotation": "a.jsonl", "repeat_time": 2.5, "data_augment": True, "max_dynamic_patch": 2},
        "b": {"annotation": "b.jsonl", "length": 9, "odd": 1},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    data = read_recipe_data(Recipe(data=(tmp_path / "meta.json",), held_out=0))
    said = [sample.answer for sample in data.train]
    assert (said.count("x"), said.count("y")) == (25, 4)
    assert all(sample.jpeg == (sample.answer == "x") for sample in data.train)
    assert {picture.max_tiles for sample in data.train for picture in sample.pictures} == {2}
    assert [note for note in data.ledger.notes if "length says 9, 4 rows" in note]
    assert [note for note in data.ledger.notes if "odd is not known" in note]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"annotation": "none.jsonl"}, "neither beside meta.json nor here"),
        ({"annotation": "a.jsonl", "repeat_time": -1}, "repeat_time is -1"),
        ({"annotation": "a.jsonl", "max_dynamic_patch": 99}, "from 1 to 40"),
        ({"root": "x"}, "no annotation"),
    ],
)
def test_a_faulty_meta_file_names_its_part(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    lines(tmp_path / "a.jsonl", [row("Hi", "Ho")])
    (tmp_path / "meta.json").write_text(json.dumps({"good": {"annotation": "a.jsonl"}, "bad": entry}))
    with pytest.raises(DataError, match=words):
        read_dataset(tmp_path / "meta.json")


def test_a_video_is_its_middle_frames_one_tile_each(tmp_path: Path, inputs: Inputs) -> None:
    clip(tmp_path / "clip.mp4")
    path = lines(
        tmp_path / "clips.jsonl", [row("<video>\nWhat?", "Grey.", video="clip.mp4"), row("What?", "Grey.", video="clip.mp4")]
    )
    samples, _ = read_dataset(path, reading=Reading(video_frames=3), inputs=inputs)
    for sample in samples:
        assert sample.question == "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\nWhat?"
        levels = [np.asarray(open_image(picture.source)).mean() for picture in sample.pictures]
        assert np.allclose(levels, [8 * 5, 8 * 15, 8 * 25], atol=6)
        built = inputs.build(sample.messages, sample.pictures, open_turn=False)
        assert (built.tiles_per_picture, len(built)) == ((1, 1, 1), sample.tokens)


def test_a_video_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    whole = clip(tmp_path / "whole.mp4")
    (tmp_path / "a.jpg").write_bytes(jpeg())
    faults = {
        "video missing": row("<video>?", "x", video="none.mp4"),
        "video unusable": row("<video>?", "x", video="broken.mp4"),
        "video is no path": row("<video>?", "x", video=["a", "b"]),
        "video shown 2 times": row("<video><video>?", "x", video=whole.name),
        "video and pictures": row("<video>?", "x", video=whole.name, image="a.jpg"),
        "video missing: <video> is written": row("<video>?", "x"),
    }
    _, ledger = read_dataset(lines(tmp_path / "rows.jsonl", [row("Hi", "Ho"), *faults.values()]), max_bad_share=1.0)
    assert [place for place, _ in ledger.skipped] == [f"rows.jsonl:{n}" for n in range(2, 8)]
    assert all(reason.startswith(kind) for (_, reason), kind in zip(ledger.skipped, faults, strict=True)), ledger.skipped


def test_rows_say_and_answer_under_any_names(tmp_path: Path) -> None:
    rows = [
        {"q": "What?", "a": "This.", "s": "Be short."},
        {"q": "How many?", "a": ["two", "three", "two"], "s": ""},
        {"texts": "x"},
    ]
    reading = Reading(columns=columns_of(("question=q", "answer=a", "system=s")))
    samples, ledger = read_dataset(lines(tmp_path / "rows.jsonl", rows), reading=reading, max_bad_share=1.0)
    assert [[message.text for message in sample.messages] for sample in samples] == [
        ["Be short.", "What?", "This."],
        ["How many?", "two"],
    ]
    assert 'the row has no "q"' in ledger.skipped[0][1]
    for columns, words in ((("photo=x",), "OURS=THEIRS"), (("imag=x",), "did you mean image=x"), (("image",), "OURS=THEIRS")):
        with pytest.raises(ConfigError, match=words):
            Recipe(columns=columns)
    with pytest.raises(ConfigError, match="twice"):
        columns_of(("image=a", "image=b"))


def test_parquet_shows_what_is_embedded_and_what_is_named(tmp_path: Path) -> None:
    (tmp_path / "pear.jpg").write_bytes(jpeg("green"))
    rows = [
        {"image": {"bytes": jpeg("red"), "path": "x.jpg"}, "question": "First?", "answer": "red"},
        {"image": {"bytes": None, "path": "pear.jpg"}, "question": "Second?", "answer": "green"},
        {"image": {"bytes": jpeg()[:200], "path": None}, "question": "Third?", "answer": "cut"},
        {"image": {"bytes": jpeg("red"), "path": None}, "question": "Fourth?", "answer": "red"},
        {"image": None, "question": "Fifth?", "answer": "none"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "food.parquet", row_group_size=2)
    samples, ledger = read_dataset(tmp_path / "food.parquet", max_bad_share=0.5)
    assert [sample.place for sample in samples] == [f"food.parquet:{n}" for n in (1, 2, 4, 5)]
    assert ledger.skipped[0][0] == "food.parquet:3"
    assert "picture unusable" in ledger.skipped[0][1]
    colours = [np.asarray(open_image(sample.pictures[0].source))[5, 5].argmax() for sample in samples[:3]]
    assert colours == [0, 1, 0]
    parquet.write_table(pyarrow.Table.from_pylist([rows[0], rows[1], rows[4], rows[3]]), tmp_path / "whole.parquet")
    for seed in range(6):  # the same bytes never stand on both sides of a split
        held = read_dataset(tmp_path / "whole.parquet", split="held_out", held_out=1, seed=seed)[0]
        places = {sample.place[-1] for sample in held}
        assert not places & {"1", "4"} or {"1", "4"} <= places


def test_parquet_lists_and_other_peoples_words(tmp_path: Path) -> None:
    both = [{"bytes": jpeg("red"), "path": None}, {"bytes": jpeg("green"), "path": None}]
    rows = [{"images": both, "texts": [{"user": "Which is green?", "assistant": "The second."}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "food.parquet")
    (sample,), _ = read_dataset(tmp_path / "food.parquet")
    assert sample.question == "Image-1: <image>\nImage-2: <image>\nWhich is green?"
    assert [np.asarray(open_image(one.source))[5, 5].argmax() for one in sample.pictures] == [0, 1]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"broken\.parquet is no parquet file"):
        read_dataset(tmp_path / "broken.parquet")


def test_a_tar_joins_files_of_one_name(tmp_path: Path) -> None:
    members = {
        "x/0.jpg": jpeg("red"),
        "x/0.json": json.dumps(row("What?", "Red.")).encode(),
        "x/1.left.jpg": jpeg("red"),
        "x/1.right.jpg": jpeg("green"),
        "x/1.json": json.dumps(row("<image> or <image>?", "b", image=["1.right.jpg", "1.left.jpg"])).encode(),
        "x/2.json": b"{broken",
        "x/3.jpg": jpeg()[:200],
        "x/3.txt": b"cut off",
        "x/4.png": jpeg("green"),
        "x/4.cls": b"green_apple",
    }
    samples, ledger = read_dataset(tar_of(tmp_path / "shard.tar", members), max_bad_share=0.5)
    assert [sample.place for sample in samples] == ["shard.tar:x/0", "shard.tar:x/1", "shard.tar:x/4"]
    assert [np.asarray(open_image(one.source))[5, 5].argmax() for one in samples[1].pictures] == [1, 0]
    assert samples[2].answer == samples[2].label == "green apple"
    assert sorted((place, reason.split(":")[0]) for place, reason in ledger.skipped) == [
        ("shard.tar:x/2", "broken JSON"),
        ("shard.tar:x/3", "picture unusable"),
    ]
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        tar_of(folder / f"{number}.tar", {"a.jpg": jpeg(), "a.txt": b"apple"})
    assert [sample.place for sample in read_dataset(folder)[0]] == ["0.tar:a", "1.tar:a"]
    with pytest.raises(DataError, match=r"is packed; unpack it and give the folder, or the JSON file"):
        read_dataset(tar_of(tmp_path / "photos.tar", {"apple/1.jpg": jpeg()}))


# ---- boxes


def test_pixels_become_thousandths_and_what_lies_outside_is_named() -> None:
    talk = (
        Message("user", "<image>\nWhere?"),
        Message("assistant", "<ref>a</ref><box>[[20, 30, 200, 300]]</box> and <box>[0,0,400,600]</box>"),
    )
    assert (
        from_pixels(talk, [Size(400, 600)])[1].text
        == "<ref>a</ref><box>[[50, 50, 500, 500]]</box> and <box>[[0, 0, 1000, 1000]]</box>"
    )
    with pytest.raises(DataError, match="of 2 pictures of different sizes"):
        from_pixels(talk, [Size(400, 600), Size(10, 10)])
    with pytest.raises(DataError, match="box outside"):
        from_pixels(talk, [Size(100, 600)])
    check_boxes(talk)
    for box, words in (
        ("[[0, 0, 1001, 9]]", "box outside"),
        ("[[9, 0, 1, 9]]", "box outside"),
        ("[[1, 2, 3]]", "four numbers"),
        ("1, 2, x", "broken box"),
    ):
        with pytest.raises(DataError, match=words):
            check_boxes([Message("assistant", f"<box>{box}</box>")])


# ---- mixtures and augmentation


def test_weights_are_the_shares_of_an_epoch_whatever_the_sizes(tmp_path: Path) -> None:
    few, many = (
        lines(tmp_path / "few.jsonl", [row(f"q{n}", "few") for n in range(10)]),
        lines(tmp_path / "many.jsonl", [row(f"q{n}", "many") for n in range(90)]),
    )
    train = read_recipe_data(Recipe(data=(few, many), weights=(3.0, 1.0), held_out=0)).train
    said = [sample.answer for sample in train]
    assert (said.count("few"), said.count("many")) == (75, 25)
    for wrong, words in (
        ({"weights": (1.0,)}, "1 numbers for 2"),
        ({"weights": (1.0, 1.0), "repeat": (1.0, 1.0)}, "give one of them"),
        ({"weights": (0.0, 0.0)}, "one above 0"),
        ({"weights": (-1.0, 2.0)}, "0 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            Recipe(data=(few, many), **wrong)


def test_jpeg_changes_pixels_a_little_and_repeats_itself() -> None:
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    once, again = (augment(picture, "jpeg", seed=0, epoch=1, sample="a") for _ in range(2))
    assert once.tobytes() == again.tobytes() != picture.tobytes()
    assert np.abs(np.asarray(once, int) - np.asarray(picture, int)).mean() < 12
    assert augment(picture, "none", seed=0, epoch=1, sample="a", jpeg=True).tobytes() == once.tobytes()
    assert augment(picture, "none", seed=0, epoch=1, sample="a") is picture


def test_nothing_is_mirrored_that_speaks_of_sides_or_holds_boxes() -> None:
    def talk(text: str) -> list[Message]:
        return [Message("user", f"<image>\n{text}"), Message("assistant", "yes")]

    assert not any(
        may_mirror(talk(text)) for text in ("What is left of it?", "Turn RIGHT", "左边是什么？", "<box>[[1, 2, 3, 4]]</box>")
    )
    assert all(may_mirror(talk(text)) for text in ("What is it?", "A bright leftover? No, brights."[:12], "这是什么？"))
    split = Image.new("RGB", (64, 32), "red")
    split.paste((0, 0, 255), (32, 0, 64, 32))
    looks = [augment(split, "photo", seed=0, epoch=epoch, sample="a", mirror=False) for epoch in range(12)]
    assert all(np.asarray(look)[16, 4].argmax() == 0 for look in looks)
    mirrored = [augment(split, "photo", seed=0, epoch=epoch, sample="a") for epoch in range(12)]
    assert any(np.asarray(look)[16, 4].argmax() == 2 for look in mirrored)


def test_what_is_never_mirrored_is_told(tmp_path: Path, inputs: Inputs) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    path = lines(tmp_path / "rows.jsonl", [row("What is on the left?", "x", image="a.jpg"), row("What?", "y", image="a.jpg")])
    notes = supply(Recipe(data=(path,), held_out=0, augment="photo"), inputs).ledger.notes
    assert [note for note in notes if note.startswith("1 samples are never mirrored")]


# ---- streaming


def streamed(path: Path, inputs: Inputs, **more: Any) -> Streamed:
    return Streamed(Recipe(data=(path,), stream=True, held_out=0, **more), inputs)


def test_a_streamed_set_is_the_read_one_and_a_resumed_run_goes_on_exactly(tmp_path: Path, inputs: Inputs) -> None:
    rows: list[Any] = [row(f"Question {n}?", f"answer {n}") for n in range(23)]
    path = lines(tmp_path / "rows.jsonl", rows)
    read, _ = read_dataset(path, inputs=inputs)
    assert list(streamed(path, inputs)) == read

    def steps() -> Steps:
        return Steps(streamed(path, inputs), inputs, looks=46, samples_per_step=4, tokens_per_pass=4096, seed=5)

    whole = [steps_places for step in range(12) for steps_places in steps_of(steps())[step]]
    assert sorted(whole) == sorted([f"rows.jsonl:{n}" for n in range(1, 24)] * 2)
    later = steps()  # as after a kill: a new process that begins at step 7
    assert [later[step].places for step in range(7, 12)] == [tuple(steps_of(steps())[step]) for step in range(7, 12)]


def steps_of(steps: Steps) -> list[tuple[str, ...]]:
    return [steps[step].places for step in range(len(steps))]


def test_bad_rows_of_a_stream_are_skipped_with_their_place(tmp_path: Path, inputs: Inputs) -> None:
    path = lines(tmp_path / "rows.jsonl", [row("Hi", "Ho"), row("What?", "x", image="none.jpg"), {"x": 1}])
    step = Steps(streamed(path, inputs), inputs, looks=3, samples_per_step=3, tokens_per_pass=4096, seed=0)[0]
    assert step.places == ("rows.jsonl:1",)
    assert {place for place, _ in step.skipped} == {"rows.jsonl:2", "rows.jsonl:3"}
    assert any("picture missing" in reason for _, reason in step.skipped)


def test_tars_and_parquet_are_streamed_too(tmp_path: Path, inputs: Inputs) -> None:
    tar = tar_of(tmp_path / "s.tar", {f"{n}.{end}": raw for n in range(5) for end, raw in (("jpg", jpeg()), ("txt", b"apple"))})
    rows = [{"image": {"bytes": jpeg(), "path": None}, "question": f"q{n}", "answer": "a"} for n in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=2)
    both = Streamed(Recipe(data=(tar, tmp_path / "p.parquet"), stream=True, held_out=0), inputs)
    assert len(both) == 14
    built = Steps(both, inputs, looks=14, samples_per_step=14, tokens_per_pass=4096, seed=0)[0]
    assert len(built.places) == 14
    assert built.skipped == ()


@pytest.mark.parametrize("in_order", [False, True])
def test_an_order_holds_each_row_once_and_shuffles_within_blocks(in_order: bool) -> None:
    order = Shuffled(103, 10, seed=1, epoch=2, blocks_in_order=in_order)
    assert sorted(order) == list(range(103))
    blocks = [{index // 10 for index in order[start : start + 10]} for start in range(0, 103, 10)]
    assert all(len(block) == 1 for block in blocks)
    assert (blocks == [{n} for n in range(11)]) == in_order
    assert list(order) != list(Shuffled(103, 10, seed=1, epoch=3, blocks_in_order=in_order))


def test_what_cannot_be_streamed_says_so(tmp_path: Path, inputs: Inputs) -> None:
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([row("Hi", "Ho")]))
    with pytest.raises(DataError, match="one JSON array"):
        streamed(array, inputs)
    with pytest.raises(DataError, match="folder of pictures"):
        streamed(tmp_path, inputs)
    with pytest.raises(DataError, match="no such file"):
        streamed(tmp_path / "none.jsonl", inputs)
    for wrong, words in (({"held_out": 0.1}, "holds nothing out"), ({"held_out": 0, "packing": "grouped"}, "grouped")):
        with pytest.raises(ConfigError, match=words):
            Recipe(data=(array,), stream=True, **wrong)


# ---- the hub, by a stand-in of the datasets package


class FakeTable:
    """What we use of datasets.Dataset and IterableDataset."""

    features: Any = None

    def __init__(self, rows: list[Any], lost_at: int | None = None):
        self.rows, self.lost_at = rows, lost_at
        self.info = types.SimpleNamespace(splits={"train": types.SimpleNamespace(num_examples=len(rows))})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]

    def skip(self, count: int) -> Any:
        for number in range(count, len(self.rows)):
            if number == self.lost_at:
                raise ConnectionError("the network is unreachable")
            yield self.rows[number]


def hub_of(monkeypatch: pytest.MonkeyPatch, table: FakeTable) -> None:
    fake = types.ModuleType("datasets")

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> FakeTable:
        if name == "nobody/none":
            raise FileNotFoundError("Dataset 'nobody/none' doesn't exist on the Hub")
        assert (name, config, split) == ("some/food", "big", "train")
        return table

    for name, value in {
        "load_dataset": load_dataset,
        "Image": type("Image", (), {}),
        "ClassLabel": type("ClassLabel", (), {}),
    }.items():
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def food_rows(count: int) -> list[dict[str, Any]]:
    return [{"image": {"bytes": jpeg(), "path": None}, "question": f"q{n}", "answer": f"a{n}"} for n in range(count)]


def test_a_hub_set_is_read_by_name(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    hub_of(monkeypatch, FakeTable(food_rows(5)))
    samples, _ = read_dataset(Path("hf:some/food:big"), inputs=inputs)
    assert [sample.place for sample in samples] == [f"some/food:{n}" for n in range(1, 6)]
    assert all(len(inputs.build(one.messages, one.pictures, open_turn=False)) == one.tokens for one in samples)
    with pytest.raises(DataError, match="check name and network"):
        read_dataset(Path("hf:nobody/none"))


def test_a_hub_stream_goes_on_where_it_was_and_a_lost_network_says_how(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    hub_of(monkeypatch, FakeTable(food_rows(9)))
    table = Hub("hf:some/food:big", stream=True)
    assert [table.row(n)["answer"] for n in (0, 1, 5, 6, 2)] == ["a0", "a1", "a5", "a6", "a2"]
    assert isinstance(table.row(3)["image"], Embedded)
    some = streamed(Path("hf:some/food:big"), inputs)
    assert sorted(sample.answer for sample in some) == [f"a{n}" for n in range(9)]
    hub_of(monkeypatch, FakeTable(food_rows(9), lost_at=4))
    lost = Steps(streamed(Path("hf:some/food:big"), inputs), inputs, looks=9, samples_per_step=9, tokens_per_pass=4096, seed=0)
    with pytest.raises(TrainingError, match=r"broke off at row 5.*--resume"):
        lost[0]


def test_without_the_datasets_package_a_sentence_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_dataset(Path("hf:some/food"))


def test_samples_can_be_compared(tmp_path: Path) -> None:
    assert isinstance(read_dataset(lines(tmp_path / "a.jsonl", [row("Hi", "Ho")]))[0][0], Sample)
