"""Datasets: every sample used or skipped with its reason, splits that never leak and never change."""

import base64
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tessella.chat import IMAGE_MARK, Message
from tessella.errors import DataError
from tessella.inputs import Inputs
from tessella.tokenizer import Tokenizer
from tessella.train.classes import class_name
from tessella.train.dataset import Ledger, Sample, read_dataset, read_recipe_data, repeat
from tessella.train.recipe import Recipe
from tiny import tiny_config, tiny_tokenizer

DOCUMENTATION = Path(__file__).parents[1] / "docs/data.md"
MORE = ("meta.json", "dishes.jsonl", "clips.jsonl", "columns.jsonl")
GROCERY = Path(__file__).parents[2] / "shared/data/grocery-train-val.tar"


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def data_uri() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), "blue").save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def llava(question: str, answer: str, image: object = None) -> dict[str, Any]:
    row: dict[str, Any] = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return row if image is None else {"image": image, **row}


def said(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in sample.messages]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return Inputs(tiny_config("LlamaForCausalLM"), Tokenizer.load(folder))


# ---- formats


@pytest.mark.parametrize("array", [False, True])
def test_llava_rows_are_read_from_json_and_jsonl_with_the_line_they_stand_on(tmp_path: Path, array: bool) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(20, 50))
    rows = [
        llava("What is it?\n<image>", "An apple.", "a.png"),
        llava("<image>\n<image>\nSame?", "No.", ["a.png", "b.png"]),
        llava("Compare.", "They differ.", ["a.png", "b.png"]),
        llava("Hello", "Hi"),
        llava("Before <image> after", "Yes", ["b.png"]),
    ]
    if array:
        path = tmp_path / "rows.json"
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    else:
        path = lines(tmp_path / "rows.jsonl", rows)
    samples, ledger = read_dataset(path)
    assert [sample.place for sample in samples] == [f"{path.name}:{n}" for n in range(1 + array, 6 + array)]
    assert [sample.question for sample in samples] == [
        "<image>\nWhat is it?",  # the tutorial writes the mark last; chat shows the picture first
        "<image>\n<image>\nSame?",
        "Image-1: <image>\nImage-2: <image>\nCompare.",
        "Hello",
        "Before <image> after",
    ]
    assert samples[1].pictures[1].source == tmp_path / "b.png"
    assert samples[1].sizes == ((40, 30), (20, 50))
    assert (ledger.used, ledger.skipped, ledger.share_bad) == (5, [], 0.0)


def test_openai_messages_take_text_parts_data_uris_and_paths(tmp_path: Path) -> None:
    picture(tmp_path / "pics/a.png")
    part = {"type": "image_url", "image_url": {"url": "a.png"}}
    inline = {"type": "image_url", "image_url": data_uri()}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    answer = {"role": "assistant", "content": "Red."}
    rows = [
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": [part, text("Colour?")]}, answer]},
        {"messages": [{"role": "user", "content": [text("Colour?"), inline]}, answer]},
        {"messages": [{"role": "user", "content": [text("This"), part, text("or this?"), inline]}, answer]},
        {"messages": [{"role": "user", "content": [part, inline, text("Which?")]}, answer]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": [text("Hi")]}]},
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What?"}, answer]},
    ]
    samples, _ = read_dataset(lines(tmp_path / "chat.jsonl", rows), image_root=tmp_path / "pics")
    assert said(samples[0]) == [("system", "Be short."), ("user", "<image>\nColour?"), ("assistant", "Red.")]
    assert samples[1].question == "<image>\nColour?"
    assert samples[1].sizes == ((12, 10),)
    assert samples[2].question == "This\n<image>\nor this?\n<image>"
    assert samples[3].question == "Image-1: <image>\nImage-2: <image>\nWhich?"
    assert said(samples[4]) == [("user", "Hello"), ("assistant", "Hi")]
    assert samples[5].question == "<image>What?"
    assert samples[0].pictures[0].source == tmp_path / "pics/a.png"


def test_a_folder_of_folders_names_each_picture_after_the_folder_it_lies_in(tmp_path: Path) -> None:
    for name in ("Fruit/Apple/Golden-Delicious/1.png", "Fruit/Apple/Golden-Delicious/2.png", "Fruit/Pear/1.png", "红烧肉/1.jpg"):
        picture(tmp_path / name)
    (tmp_path / "Fruit/notes.txt").write_text("no picture")
    picture(tmp_path / "loose.png")
    samples, ledger = read_dataset(tmp_path, max_bad_share=0.5)
    assert Counter(sample.answer for sample in samples) == {"Golden Delicious": 2, "Pear": 1, "红烧肉": 1}
    assert all(sample.question.startswith("<image>\n") for sample in samples)
    assert "图" in samples[-1].question or "这" in samples[-1].question  # a Chinese name is asked for in Chinese
    assert ledger.skipped == [("loose.png", "in no class folder: put it into a folder named after its class")]
    assert any("1 .txt" in note for note in ledger.notes)


def test_folders_of_one_name_below_different_parents_are_different_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind in ("Apple/Green", "Pepper/Green", "Apple/Red"):
            picture(tmp_path / part / kind / "1.png")
    samples, _ = read_dataset(tmp_path)
    assert Counter(sample.label for sample in samples) == {"Apple Green": 2, "Pepper Green": 2, "Red": 2}


def test_train_and_val_folders_are_the_split_and_train_beside_classes_is_a_class(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "test/cat/4.png"):
        picture(tmp_path / "split" / name)
    train, ledger = read_dataset(tmp_path / "split", split="train", held_out=0.5)
    held, _ = read_dataset(tmp_path / "split", split="held_out")
    assert [sample.place for sample in train] == ["train/cat/1.png", "train/dog/2.png"]
    assert [sample.place for sample in held] == ["val/cat/3.png"]
    assert any("test/ is left alone" in note for note in ledger.notes)
    for name in ("train/1.png", "aeroplane/2.png"):
        picture(tmp_path / "toys" / name)
    toys, _ = read_dataset(tmp_path / "toys")
    assert sorted(sample.label for sample in toys) == ["aeroplane", "train"]
    only = tmp_path / "only"
    for number in range(10):
        picture(only / f"train/cat/{number}.png")
    assert len(read_dataset(only, split="held_out", held_out=0.2)[0]) == 2


def test_own_questions_and_answers_are_used_and_phrasings_vary_in_training_only(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / f"sour_cherry/{number}.png")
    own, _ = read_dataset(tmp_path, questions=("Which food?",), answer="It is {name}.")
    assert {(s.question, s.answer) for s in own} == {("<image>\nWhich food?", "It is sour cherry.")}
    train, _ = read_dataset(tmp_path, split="train", held_out=0.1)
    assert len({sample.question for sample in train}) > 2
    assert train == read_dataset(tmp_path, split="train", held_out=0.1)[0]
    both, _ = read_dataset(tmp_path, question_language="both")
    assert {"zh" if "？" in s.question or "。" in s.question else "en" for s in both} == {"zh", "en"}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_class_names_have_no_underscore_dash_or_double_space(folder: str) -> None:
    name = class_name(folder)
    assert not set("_-") & set(name)
    assert name == " ".join(name.split())


def test_the_examples_of_the_documentation_are_read(tmp_path: Path) -> None:
    for name in ("apple", "pear"):
        picture(tmp_path / f"photos/{name}.jpg")
    text = DOCUMENTATION.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- file: (\S+) -->\n```json\n(.*?)```", text, re.DOTALL))
    blocks = {name: block for name, block in blocks.items() if name not in MORE}  # tests/test_formats.py
    counts = {}
    for name, block in blocks.items():
        (tmp_path / name).write_text(block, encoding="utf-8")
        counts[name] = len(read_dataset(tmp_path / name, max_bad_share=0.0)[0])
    assert counts == {"llava.jsonl": 3, "messages.jsonl": 2, "sivqa_tidy.json": 1, "sharegpt.json": 1}
    (hidden,), _ = read_dataset(tmp_path / "sivqa_tidy.json")
    (shown,), _ = read_dataset(tmp_path / "sivqa_tidy.json", choices="shown")
    for sample in (hidden, shown):
        asked = sample.question.removeprefix("<image>\n").replace("\nC. 粤菜\nD. 鲁菜", " …").replace("\n", " ")
        assert f"| {asked} | {sample.answer} |" in text
    folders = re.findall(r'^      (\S+/\S+) +"(.+)"$', text, re.MULTILINE)
    for name, _ in folders:
        picture(tmp_path / "food" / name)
    samples, _ = read_dataset(tmp_path / "food")
    assert {sample.place: sample.label for sample in samples} == dict(folders)
    assert len(folders) == 3


def sivqa(dish: str, number: int, answer: str = "1") -> dict[str, Any]:
    return {
        "question": "图中的菜是哪个地区的？",
        "choices": ["川菜", "东北菜", "粤菜", "鲁菜"],
        "answer": answer,
        "question_type": "cuisine_type",
        "food_name": dish,
        "question_id": f"vqa-{number}",
        "question_en": "Which cuisine is it?",
        "choices_en": ["Sichuan", "Northeastern", "Cantonese", "Shandong"],
        "food_meta": {"food_name": dish, "food_file": "images/a.png", "main_ingredient": ["肉"], "id": number},
    }


def test_foodieqa_is_read_as_the_tutorial_prepares_it_and_with_the_choices_shown(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    path = tmp_path / "sivqa_tidy.json"
    path.write_text(json.dumps([sivqa("锅包肉", 1)], ensure_ascii=False), encoding="utf-8")
    (hidden,), _ = read_dataset(path)
    assert said(hidden) == [("user", "<image>\n图中的菜是哪个地区的？"), ("assistant", "东北菜，图中的菜是锅包肉")]
    assert hidden.label == "锅包肉"
    (shown,), _ = read_dataset(path, choices="shown")
    assert shown.answer == "B"
    assert shown.question == "<image>\n图中的菜是哪个地区的？\nA. 川菜\nB. 东北菜\nC. 粤菜\nD. 鲁菜\n请直接回答选项字母。"
    english, _ = read_dataset(path, choices="both", question_language="en")
    assert [sample.answer for sample in english] == ["Northeastern. The dish in the picture is 锅包肉", "B"]
    assert len(read_dataset(path, choices="both", question_language="both")[0]) == 4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.6))
def test_foodieqa_never_splits_a_dish(tmp_path_factory: pytest.TempPathFactory, seed: int, share: float) -> None:
    folder = tmp_path_factory.mktemp("foodieqa")
    picture(folder / "images/a.png")
    path = lines(folder / "rows.jsonl", [sivqa(f"dish {n % 17}", n) for n in range(60)])
    train, ledger = read_dataset(path, split="train", held_out=share, seed=seed)
    held, _ = read_dataset(path, split="held_out", held_out=share, seed=seed)
    assert not {sample.label for sample in train} & {sample.label for sample in held}
    assert len(train) + len(held) == 60 == ledger.used + ledger.other_split
    assert 0 <= len(held) - round(share * 60) < 4  # at most the rest of one dish too many


# ---- splits


def test_a_split_does_not_depend_on_the_order_of_the_rows_and_changes_with_the_seed(tmp_path: Path) -> None:
    rows = [llava(f"question {n}", f"answer {n}") for n in range(50)]
    shuffled = random.Random(1).sample(rows, len(rows))

    def held(name: str, some: list[dict[str, Any]], seed: int) -> set[str]:
        samples, _ = read_dataset(lines(tmp_path / name, some), split="held_out", held_out=0.2, seed=seed)
        return {sample.question for sample in samples}

    assert held("a.jsonl", rows, 0) == held("b.jsonl", shuffled, 0)
    assert len(held("a.jsonl", rows, 0)) == 10
    assert held("a.jsonl", rows, 0) != held("a.jsonl", rows, 1)


def test_questions_about_one_picture_stay_on_one_side(tmp_path: Path) -> None:
    for n in range(10):
        picture(tmp_path / f"{n}.png")
    path = lines(tmp_path / "rows.jsonl", [llava(f"question {n}", "yes", f"{n % 10}.png") for n in range(40)])
    train, _ = read_dataset(path, split="train", held_out=8)
    held, _ = read_dataset(path, split="held_out", held_out=8)
    assert len(held) == 8
    assert not {s.pictures[0].source for s in train} & {s.pictures[0].source for s in held}


def test_a_folder_is_split_evenly_over_its_classes(tmp_path: Path) -> None:
    for kind, number in (("many", 30), ("some", 20), ("few", 10)):
        for n in range(number):
            picture(tmp_path / f"{kind}/{n}.png")
    held, _ = read_dataset(tmp_path, split="held_out", held_out=0.1)
    assert Counter(sample.label for sample in held) == {"many": 3, "some": 2, "few": 1}


def test_keys_are_the_same_wherever_the_dataset_lies_and_differ_between_samples(tmp_path: Path) -> None:
    keys = []
    for place in ("here", "there/deeper"):
        picture(tmp_path / place / "a.png")
        path = lines(
            tmp_path / place / "rows.jsonl", [llava("one?", "1", "a.png"), llava("two?", "2", "a.png"), llava("one?", "1")]
        )
        keys.append([sample.key for sample in read_dataset(path)[0]])
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 3


# ---- what is wrong


def turns(*spoken: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in spoken]}


BAD_ROWS = [
    ('{"image": "a.png", ', "broken JSON", "line 2, column"),
    ("[1, 2]", "no row", "list"),
    ({"text": "x"}, "no conversation", "text"),
    ({"conversations": []}, "no conversation", ""),
    (llava("What?", "Apple", "none.png"), "picture missing", "none.png"),
    (llava("What?", "Apple", "broken.png"), "picture unusable", "broken.png"),
    (llava("What?", "Apple", "cut.png"), "picture unusable", "cut off"),
    (llava("What?", "Apple", "cut.jpg"), "picture unusable", "cut off"),
    (llava("What?", "Apple", "cut.webp"), "picture unusable", "cut off"),
    (llava("What?", "Apple", "https://example.org/a.png"), "picture on the web", "download"),
    (llava("<image>\nWhat?", "Apple"), "row without image", "1 <image>"),
    (llava("<image>\nWhat?", "Apple", ["a.png", "a.png"]), "pictures and marks differ", "2 pictures, but 1"),
    (llava("<image><image>\nWhat?", "Apple", "a.png"), "pictures and marks differ", "1 pictures, but 2"),
    (llava("What?", "Apple", 7), "image is no path", "7"),
    (llava("What?", "  ", "a.png"), "empty answer", ""),
    (llava(" ", "Apple"), "empty turn of the user", ""),
    (llava("What?", "See <image>", "a.png"), "picture in a turn of the assistant", ""),
    (turns(("tool", "x"), ("gpt", "y")), "unknown role", "tool"),
    (turns(("gpt", "Hello"), ("human", "Hi"), ("gpt", "How are you?")), "no question first", ""),
    (turns(("human", "Hi"), ("human", "You?"), ("gpt", "Yes")), "two turns of the user", ""),
    (turns(("human", "Hi")), "nothing to learn", ""),
    (turns(("human", "Hi"), ("system", "x"), ("gpt", "y")), "system message not first", ""),
    (turns(("system", "x")), "no question first", ""),
    ({"conversations": [{"from": "human", "value": None}]}, "broken turn", "None"),
    ({"video": "a.mp4", **llava("What?", "x")}, "video", ""),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "x"}]},
        "unknown part",
        "audio",
    ),
    ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, "broken turn", "None"),
    (sivqa("x", 1, answer="4"), "wrong answer index", '"4"'),
    (llava("What?", "Apple", "A" * 5000), "picture missing", "AAAA"),  # base64 without data: before it
    (llava("What?", "Apple", "~nobody/a.png"), "picture missing", "~nobody"),
    (llava("What?", "Apple", "."), "picture unusable", "folder"),
    ('{"n": ' + "1" * 5000 + "}", "broken JSON", "line 2"),
    ("[" * 100_000, "broken JSON", "line 2"),
    ('{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}', "broken text", "surrogate"),
    ({**sivqa("x", 1), "choices": ["a", "b"]}, "no choices", "4 texts"),
    ({**sivqa("x", 1), "food_meta": {"food_file": "a.png"}}, "no food_name", "text"),
]


@pytest.mark.parametrize(("row", "kind", "detail"), BAD_ROWS, ids=[f"{n}-{kind}" for n, (_, kind, _) in enumerate(BAD_ROWS)])
def test_a_bad_row_is_skipped_with_its_line_and_reason_and_the_others_are_used(
    tmp_path: Path, row: object, kind: str, detail: str
) -> None:
    whole = picture(tmp_path / "a.png", size=(300, 200))
    (tmp_path / "broken.png").write_text("this is no picture")
    noise = Image.effect_noise((200, 200), 80).convert("RGB")
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        noise.save(tmp_path / name)
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    good = llava("What?", "Apple", whole.name)
    samples, ledger = read_dataset(lines(tmp_path / "rows.jsonl", [good, row, good]), max_bad_share=0.5)
    assert [sample.place for sample in samples] == ["rows.jsonl:1", "rows.jsonl:3"]
    ((place, reason),) = ledger.skipped
    assert place == "rows.jsonl:2"
    assert reason.startswith(kind)
    assert detail in reason
    assert ledger.reasons() == [(reason.partition(":")[0], 1)]
    assert f"rows.jsonl:2{reason.removeprefix(reason.partition(':')[0])}" in ledger.report()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "a.png", "<image>", "user", "gpt", "text", "image_url"])
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "type", "text", "image_url", "url"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)
KEYS = ["image", "images", "conversations", "messages", "question", "choices", "answer", "food_meta", "food_name", "food_file"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5) | JSON, max_size=4))
def test_whatever_the_rows_hold_each_is_used_or_skipped(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [llava("q", "a"), *rows]), encoding="utf-8")
    samples, ledger = read_dataset(path, max_bad_share=1.0)
    places = [sample.place for sample in samples] + [place for place, _ in ledger.skipped]
    assert sorted(places) == sorted(f"rows.jsonl:{n}" for n in range(1, len(rows) + 2))
    ledger.report().encode()


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere/cat/1.png")
    picture(tmp_path / "data/dog/2.png")
    (tmp_path / "data/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "data/dog/up").symlink_to(tmp_path / "data")
    samples, ledger = read_dataset(tmp_path / "data")
    assert [sample.label for sample in samples] == ["cat", "dog"]
    assert any("links to a folder that holds it" in note for note in ledger.notes)


def test_bytes_that_are_no_utf8_cost_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(llava("What?", "Apple")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + b'{"x": "\xff"}\n\n' + good)
    samples, ledger = read_dataset(path, max_bad_share=0.5)
    assert [sample.place for sample in samples] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert ledger.skipped[0][0] == "rows.jsonl:2"
    assert "no UTF-8" in ledger.skipped[0][1]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', "line 3, column 6"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "line 3, column 1"),
        ('[\n{"a": 1},\n]', "line 3, column 1"),
        ('[\n{"a": 1}\n] x', "line 3, column 3"),
        ('[\n{"a": 1},\n{"a": "', "line 3, column 7"),
        ('[\n{"a": 1}', "line 2, column 9"),
    ],
)
def test_a_broken_array_is_refused_with_line_and_column(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=where):
        read_dataset(path)


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=6
    ),
    st.sampled_from(["", " ", "\n", "\r\n\t"]),
)
def test_an_array_is_cut_into_the_items_that_json_reads(item: object, space: str) -> None:
    from tessella.train.readers import _array_items  # the scanner alone, without a file for each of 200 examples

    for items in ([], [item], [item, 1, item]):
        text = f"[{space}" + f"{space},{space}".join(json.dumps(one) for one in items) + f"{space}]{space}"
        assert [found for _, found in _array_items("x", text)] == json.loads(text) == items


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "folder").mkdir()
    for name in ("empty.json", "none.json", "folder"):
        with pytest.raises(DataError, match="is empty"):
            read_dataset(tmp_path / name)


def test_all_samples_bad_is_refused_with_the_most_frequent_reasons_whatever_the_limit(tmp_path: Path) -> None:
    rows = [llava("What?", "x", f"{n}.png") for n in range(7)] + [llava("What?", "")] * 3
    with pytest.raises(
        DataError, match=r"all 10 samples are bad(.|\n)*7 x picture missing, as in rows.jsonl:1(.|\n)*3 x empty answer"
    ):
        read_dataset(lines(tmp_path / "rows.jsonl", rows), max_bad_share=1.0)


def test_a_run_stops_when_more_than_the_stated_share_is_bad(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [llava(f"q {n}", "a" if n else "") for n in range(20)])
    assert read_dataset(path, max_bad_share=0.05)[1].share_bad == 0.05
    with pytest.raises(DataError, match=r"1 of 20 samples are bad, 5\.0%; at most 4\.0%(.|\n)*empty answer"):
        read_dataset(path, max_bad_share=0.04)


def test_over_long_samples_are_refused_with_the_number_and_never_cut(tmp_path: Path, inputs: Inputs) -> None:
    picture(tmp_path / "a.png", size=(560, 560))
    rows = [llava("What?", "Apple"), llava("word " * 6000, "Apple"), llava("What?", "Apple", "a.png")]
    samples, ledger = read_dataset(lines(tmp_path / "rows.jsonl", rows), max_bad_share=0.5, inputs=inputs)
    assert [sample.place for sample in samples] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert ledger.skipped[0][0] == "rows.jsonl:2"
    assert "at most 4,096" in ledger.skipped[0][1]
    built = inputs.build(samples[1].messages, samples[1].pictures, open_turn=False)
    assert samples[1].tokens == len(built)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing.json", "no such file"), ("photos.tar", "unpack it"), ("object.json", "one object over many lines")],
)
def test_what_is_no_dataset_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "photos.tar").write_bytes(b"x")
    (tmp_path / "object.json").write_text('{\n"a": 1\n}')
    with pytest.raises(DataError, match=words):
        read_dataset(tmp_path / name)


def test_format_and_path_must_agree(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [llava("What?", "x")])
    for where, format in ((path, "folder"), (tmp_path, "llava"), (path, "xml")):
        with pytest.raises(DataError, match="format"):
            read_dataset(where, format=format)
    with pytest.raises(DataError, match="must have messages"):
        read_dataset(path, format="openai")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [llava("What?", "x"), llava("Who?", "y")])
    with pytest.raises(DataError, match=r"no sample is in the held_out part; 2 are in the other"):
        read_dataset(path, split="held_out")
    with pytest.raises(DataError, match=r"held_out is 2, but there are only 2"):
        read_dataset(path, held_out=2)


# ---- recipes


def test_a_recipes_data_is_joined_split_and_repeated(tmp_path: Path) -> None:
    first = lines(tmp_path / "first.jsonl", [llava(f"q {n}", "a") for n in range(20)])
    second = lines(tmp_path / "second.jsonl", [llava(f"r {n}", "a") for n in range(10)])
    data = read_recipe_data(Recipe(data=(first, second), held_out=0.1, repeat=(1.0, 2.5)))
    assert len(data.held_out) == 2 + 1
    assert len(data.train) == 18 + 9 * 2 + round(9 / 2)
    assert len({sample.key for sample in data.train}) == len(data.train)
    assert data.ledger.used == 30
    other = read_recipe_data(Recipe(data=(first,), held_out_data=(second,)))
    assert (len(other.train), len(other.held_out), other.ledger.used) == (20, 10, 30)


def test_held_out_pictures_that_are_trained_on_are_noted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    first = lines(tmp_path / "first.jsonl", [llava("q", "a", "a.png"), llava("r", "b", "a.png")])
    data = read_recipe_data(Recipe(data=(first,), held_out_data=(first,)))
    assert any("2 held-out samples show pictures that are trained on" in note for note in data.ledger.notes)


def test_a_recipe_without_data_is_refused() -> None:
    with pytest.raises(DataError, match="names no data"):
        read_recipe_data(Recipe())


@given(times=st.floats(0, 4), seed=st.integers(0, 9))
def test_repeat_keeps_its_fraction(times: float, seed: int) -> None:
    samples = [Sample(str(n), (Message("user", "q"), Message("assistant", "a")), (), f"key {n}") for n in range(40)]
    repeated = repeat(samples, times, seed)
    assert abs(len(repeated) - times * 40) <= 0.5 + 1e-9
    counts = Counter(sample.place for sample in repeated)
    assert not counts or max(counts.values()) - min(counts.get(str(n), 0) for n in range(40)) <= 1
    assert repeated == repeat(samples, times, seed)


def test_ledgers_add_up() -> None:
    whole, part = Ledger(3, [("a", "x: 1")], ["n"]), Ledger(1, [("b", "x: 2"), ("c", "y")], [], 2)
    whole.add(part)
    assert (whole.used, whole.other_split, whole.reasons()) == (4, 2, [("x", 2), ("y", 1)])
    assert whole.share_bad == 3 / 9
    assert Ledger().share_bad == 0.0


def test_thousands_of_pictures_are_looked_at_in_seconds(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    import time

    raw = picture(tmp_path / "class/0.png").read_bytes()
    for n in range(1, 2000):
        (tmp_path / f"class/{n}.png").write_bytes(raw)
    began = time.perf_counter()
    samples, _ = read_dataset(tmp_path)
    took_s = time.perf_counter() - began
    record_property("seconds", took_s)
    assert len(samples) == 2000
    assert took_s < 20  # about 1 s on two quiet cores


def test_the_grocery_photos_are_read_whole(tmp_path: Path) -> None:
    if not GROCERY.is_file():
        pytest.skip(f"{GROCERY} is not here: the real photos are not part of the repository")
    import tarfile

    with tarfile.open(GROCERY) as tar:
        tar.extractall(tmp_path, filter="data")
    train, ledger = read_dataset(tmp_path, split="train")
    held, _ = read_dataset(tmp_path, split="held_out")
    assert (len(train), len(held), ledger.skipped) == (2640, 296, [])
    assert len({sample.label for sample in train}) == 81
    assert {sample.label for sample in held} <= {sample.label for sample in train}
    assert all(sample.question.startswith(IMAGE_MARK) for sample in train)
