"""Models are asked the same items, one after the other; a run that was stopped goes on; items that cannot be asked are told."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tessella.chat import Message
from tessella.checkpoint.read import load
from tessella.errors import ConfigError, DataError
from tessella.evaluate import run
from tessella.evaluate.run import Settings, evaluate
from tessella.evaluate.skills import perplexity, windows
from tessella.evaluate.task import Item, Task, items_from, read_items
from tessella.evaluate.tasks import TASKS
from tessella.evaluate.tasks.general import PASSAGE
from tessella.generate import all_logits, generate_batch
from tessella.inputs import ModelInput, Picture
from tessella.sampling import SamplingParams
from tiny import tiny_folder

SETTINGS = Settings(device="cpu", dtype="float32", batch_items=2)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return [tiny_folder(home / name, "LlamaForCausalLM", seed) for seed, name in enumerate(("one", "two"))]


def make_task(count=5, max_tokens=4):
    items = []
    for i in range(count):
        picture = Picture(Image.new("RGB", (56 + 40 * i, 60), (50 * i, 20, 200)))
        messages = (Message("user", f"<image>\nWhat is this? {i}"),)
        items.append(Item(f"k{i}", messages, (picture,), ("apple",), "apple"))
    items.append(Item("text", (Message("user", "Hello"),), (), ("apple",), "apple"))
    return Task("tiny", tuple(items), max_tokens=max_tokens)


def plain_answers(folder, task):
    """The oracle: each item alone."""
    loaded = load(folder, device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=task.max_tokens)
    inputs = [loaded.inputs.build(item.messages, item.pictures) for item in task.items]
    ids = [generate_batch(loaded.model, [one], params, loaded.stop_ids)[0] for one in inputs]
    return [loaded.tokenizer.decode(row).strip() for row in ids]


def test_answers_in_batches_are_the_answers_alone_and_lie_in_the_order_of_the_items(folders, tmp_path):
    task = make_task()
    rows = evaluate(folders, task, tmp_path, settings=SETTINGS, console=QUIET)
    assert [row.label for row in rows] == ["one", "two"]
    for row, folder in zip(rows, folders, strict=True):
        assert [answer.key for answer in row.score.answers] == [item.key for item in task.items]
        assert [answer.text for answer in row.score.answers] == plain_answers(folder, task)
    assert [answer.text for answer in rows[0].score.answers] != [answer.text for answer in rows[1].score.answers]
    assert rows[0].against_first is None and rows[1].against_first is not None


def test_right_answers_are_counted_and_models_compared_item_by_item(folders, tmp_path):
    task = make_task()
    said = plain_answers(folders[1], task)
    taught = Task(
        "tiny",
        tuple(Item(i.key, i.messages, i.pictures, (t or "-",)) for i, t in zip(task.items, said, strict=True)),
        max_tokens=4,
    )
    rows = evaluate(folders, taught, tmp_path, settings=SETTINGS, console=QUIET)
    spoken = sum(bool(text) for text in said)
    assert rows[1].score.right == spoken and rows[1].score.mean == spoken / len(said)
    first_right = [answer.right for answer in rows[0].score.answers]
    assert rows[1].against_first.only_this == spoken - sum(first_right)


def test_a_stopped_run_goes_on_and_gives_the_same(folders, tmp_path, monkeypatch):
    task = make_task()
    whole = evaluate(folders[:1], task, tmp_path / "whole", settings=SETTINGS, console=QUIET)[0]
    calls = []

    def stopped(model, inputs, *rest, **named):
        calls.append(len(inputs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_batch(model, inputs, *rest, **named)

    monkeypatch.setattr(run, "generate_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folders[:1], task, tmp_path / "cut", settings=SETTINGS, console=QUIET)
    path = next((tmp_path / "cut" / "answers").iterdir())
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "k2", "te')  # the machine went down in the middle of a line
    again = evaluate(folders[:1], task, tmp_path / "cut", settings=SETTINGS, console=QUIET)[0]
    assert again.taken_over == 2 and calls[2:] == [2, 2]
    assert again.score == whole.score
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == [item.key for item in task.items]


def test_answers_of_other_weights_questions_or_settings_are_not_taken_over(tmp_path):
    folder = tiny_folder(tmp_path / "model", "LlamaForCausalLM", 0)

    def taken_over(count, settings=SETTINGS):
        return evaluate([folder], make_task(count), tmp_path / "out", settings=settings, console=QUIET)[0].taken_over

    assert [taken_over(1), taken_over(1), taken_over(2)] == [0, 2, 0]
    assert taken_over(1, Settings(device="cpu", dtype="float32", system="Be brief.")) == 0
    tiny_folder(folder, "LlamaForCausalLM", 1)
    assert [taken_over(1), taken_over(1)] == [0, 2]


@pytest.mark.parametrize("damage", ["header", "line", "keys"])
def test_a_damaged_file_of_answers_is_told_and_not_scored(folders, tmp_path, damage):
    path = evaluate(folders[:1], make_task(1), tmp_path, settings=SETTINGS, console=QUIET)[0].answers_file
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = {"header": ["{}", *lines[1:]], "line": [lines[0], "{broken", lines[2]], "keys": [lines[0], '{"key": "k0"}']}[damage]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"jsonl:[12] is .*remove the file"):
        evaluate(folders[:1], make_task(1), tmp_path, settings=SETTINGS, console=QUIET)


def test_an_item_that_cannot_be_asked_is_wrong_told_and_asked_again_when_mended(folders, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    task = make_task(1)
    task = Task("tiny", (*task.items, Item("broken", (Message("user", "<image>\n?"),), (Picture(broken),), ("x",))), max_tokens=4)
    row = evaluate(folders[:1], task, tmp_path / "out", settings=SETTINGS, console=QUIET)[0]
    assert row.score.failed == 1 and row.score.total == 3
    assert "broken.png" in row.score.answers[-1].failed and not row.score.answers[-1].right
    Image.new("RGB", (60, 60)).save(broken)
    row = evaluate(folders[:1], task, tmp_path / "out", settings=SETTINGS, console=QUIET)[0]
    assert row.score.failed == 0 and row.taken_over == 2


def test_a_task_of_which_nothing_can_be_asked_is_an_error_with_the_reason(folders, tmp_path):
    task = Task("tiny", (Item("a", (Message("user", "<image>\n?"),), (Picture(tmp_path / "none.png"),), ("x",)),))
    with pytest.raises(DataError, match=r"none of 1 items.*none\.png"):
        evaluate(folders[:1], task, tmp_path / "out", settings=SETTINGS, console=QUIET)


def test_when_memory_runs_out_fewer_items_run_together(folders, tmp_path, monkeypatch):
    sizes = []

    def short_of_memory(model, inputs, *rest, **named):
        sizes.append(len(inputs))
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate_batch(model, inputs, *rest, **named)

    task = make_task(3)
    monkeypatch.setattr(run, "generate_batch", short_of_memory)
    settings = Settings(device="cpu", dtype="float32", batch_items=4)
    row = evaluate(folders[:1], task, tmp_path, settings=settings, console=QUIET)[0]
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert [answer.text for answer in row.score.answers] == plain_answers(folders[0], task)


def test_models_given_twice_and_labels_that_do_not_fit_are_refused(folders, tmp_path):
    for models, labels in (([], None), ([folders[0], folders[0]], None), (folders, ["only one"])):
        with pytest.raises(ConfigError):
            evaluate(models, make_task(1), tmp_path, labels=labels, settings=SETTINGS, console=QUIET)


def test_forgetting_asks_the_general_questions_and_reads_the_passage(folders, tmp_path, monkeypatch):
    few = Task("general", TASKS["general"]().items[:3], metric="contains", max_tokens=2)
    monkeypatch.setitem(run.TASKS, "general", lambda: few)
    rows = evaluate(folders, make_task(1), tmp_path, forgetting=True, settings=SETTINGS, console=QUIET)
    assert [row.general.total for row in rows] == [3, 3]
    assert rows[1].general_against_first is not None
    loaded = load(folders[0], device="cpu", dtype="float32")
    assert rows[0].perplexity == pytest.approx(perplexity(loaded, PASSAGE), rel=1e-5)


@given(st.integers(1, 300), st.integers(2, 64))
def test_windows_count_every_token_but_the_first_once_with_half_a_window_before_it(total, size):
    found = list(windows(total, size))
    assert [i for w in found for i in range(w.scored, w.end)] == list(range(1, total))
    for number, window in enumerate(found):
        assert window.end - window.start <= size and window.start < window.scored
        if number:
            assert window.scored - window.start >= size // 2


def test_perplexity_is_the_exponent_of_the_mean_loss_and_windows_change_only_the_context(folders):
    loaded = load(folders[0], device="cpu", dtype="float32")
    ids = torch.tensor(loaded.tokenizer.encode(PASSAGE[:400]))
    none = torch.zeros(len(ids), dtype=torch.bool)
    logits = all_logits(loaded.model, ModelInput(ids, none, none, torch.zeros((0, 3, 56, 56), dtype=torch.uint8), (), ()))
    mean = F.cross_entropy(logits[:-1], ids[1:])
    assert perplexity(loaded, PASSAGE[:400]) == pytest.approx(math.exp(mean), rel=1e-5)
    assert perplexity(loaded, PASSAGE[:400], window_tokens=32) != pytest.approx(math.exp(mean), rel=1e-5)
    with pytest.raises(DataError, match="1 tokens"):
        perplexity(loaded, "a")


def test_the_general_questions_are_forty_and_right_only_with_their_own_word():
    task = TASKS["general"]()
    assert len(task.items) == 40
    for item in task.items:
        assert task.judge.score(f"I believe it is {item.answers[0]}.", item.answers) == 1
        assert task.judge.score(item.question, item.answers) == 0 or "or a" in item.question, item.question


@dataclass(frozen=True)
class Sample:
    place: str
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...] = ()
    key: str = "k"
    label: str = ""


def test_held_out_samples_become_questions_whose_answer_is_the_last_message():
    turns = (Message("user", "<image>\na?"), Message("assistant", "b"), Message("user", "c?"), Message("assistant", " d "))
    items = items_from([Sample("f:1", turns, (Picture("x.png"),)), Sample("f:2", turns[2:], label="dish")])
    assert [item.key for item in items] == ["k", "k#2"]
    assert items[0].messages == turns[:3] and items[0].answers == ("d",) and items[0].label == "d"
    assert items[1].label == "dish" and items[0].pictures == (Picture("x.png"),)
    with pytest.raises(DataError, match="f:3"):
        items_from([Sample("f:3", turns[:1])])


def test_questions_are_read_from_json_lines(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [
        {"question": "What?", "image": "a.png", "answers": ["x", "y"], "kind": "food", "label": "z"},
        {"messages": [{"role": "user", "content": "Hi\u2028there"}], "answer": "yes", "key": "hello"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    first, second = read_items(path)
    assert first.messages == (Message("user", "<image>\nWhat?"),) and first.answers == ("x", "y") and first.label == "z"
    assert first.pictures == (Picture(tmp_path / "a.png"),) and first.key == "q.jsonl:1"
    assert second == Item("hello", (Message("user", "Hi\u2028there"),), (), ("yes",), "yes")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "q.jsonl:1: not JSON"),
        ("[]", "must be an object"),
        ('{"question": "a", "answer": "b", "colour": 1}', "colour is not known"),
        ('{"question": "a"}', "no answer"),
        ('{"answer": "b"}', "question or messages"),
        ('{"question": "a", "answer": "b", "image": "none.png"}', "none.png is missing"),
        ('{"question": "a", "answer": 3}', "must be a text"),
        ('{"question": "a", "answer": "b", "answers": ["c"]}', "both answer and answers"),
        ('{"question": "a", "answer": " "}', "missing or blank"),
        ('{"question": "<image> a <image>", "answer": "b"}', "0 pictures"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "answer": "b"}', "last message must be the user's"),
    ],
)
def test_a_bad_line_is_told_with_its_place_or_key(tmp_path, line, told):
    (tmp_path / "q.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match=r"q\.jsonl") as error:
        read_items(tmp_path / "q.jsonl")
    assert told in str(error.value)


def test_a_task_refuses_what_it_cannot_judge():
    item = Item("k", (Message("user", "?"),), (), ("宫保鸡丁",))
    for words, make in (
        ("holds no items", lambda: Task("t", ())),
        ("stand twice", lambda: Task("t", (item, item))),
        ("not known", lambda: Task("t", (item,), metric="bleu")),
        ("names no letter", lambda: Task("t", (item,), metric="choice")),
    ):
        with pytest.raises(DataError, match=words):
            make()
