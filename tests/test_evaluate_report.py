"""The page holds all it shows, escapes what models say, is well-formed, and says the same as the JSON."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tessella.chat import Message
from tessella.errors import DataError, WriteError
from tessella.evaluate.curve import loss_curve, read_losses
from tessella.evaluate.metrics import mcnemar
from tessella.evaluate.report import as_html, as_json, cards, confusions, thumbnail, write_html
from tessella.evaluate.run import Judged, Row, Score
from tessella.evaluate.task import Item, Task
from tessella.inputs import Picture
from tessella.provenance import Provenance, provenance

VOID = {"meta", "img", "br", "input", "link", "hr"}
NASTY = "<script>alert('1')</script> & \"quoted\" \x00\x1b[31m \ud800 图"
ORIGIN = Provenance("2026-01-02T03:04:05+00:00", "tessella evaluate 'a b' <c>", "0123456789ab", "a CPU, 2 cores")


class Checker(HTMLParser):
    """Every element that is opened is closed, in order; ids are unique; nothing is fetched from anywhere."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.sources, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        assert len(named) == len(attrs), f"<{tag}> holds an attribute twice"
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.sources += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(source.startswith(("data:image/", "#")) for source in checker.sources)
    assert not re.search(r"@import|url\((?!#)", page)
    return checker


def picture(colour):
    out = io.BytesIO()
    Image.new("RGB", (640, 300), colour).save(out, "PNG")
    return Picture(out.getvalue())


def row(label, task, texts, *, first=None, general=None):
    judged = tuple(
        Judged(item.key, text, task.judge.score(text, item.answers)) for item, text in zip(task.items, texts, strict=True)
    )
    score = Score(task.name, task.metric, judged)
    test = score.against(first.score) if first else None
    return Row(f"models/{label}", label, score, test, 1.25, 0, "cpu", "float32", Path("answers/x.jsonl"), general, test, 8.5)


@pytest.fixture
def task():
    labels = ("apple", "apple", "pear", NASTY)
    colours = ("red", "darkred", "green", "blue")
    items = tuple(
        Item(f"k{i}", (Message("user", f"<image>\nWhat is <b>{i}</b>?"),), (picture(colour),), (label,), label)
        for i, (label, colour) in enumerate(zip(labels, colours, strict=True))
    )
    return Task("fruit", items, about="four fruits")


@pytest.fixture
def rows(task):
    before = row("before", task, ("pear", "pear", "pear", NASTY + "x"))
    return [before, row("after", task, ("Apple.", "an apple", "plum", NASTY), first=before)]


def test_the_page_is_well_formed_escaped_and_needs_nothing_beside_it(task, rows, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "held_out_loss": 2.5}\n')
    page = as_html(rows, task, title=f"a | b {NASTY}", metrics=metrics, origin=ORIGIN)
    checker = check(page)
    page.encode("utf-8")  # a lone surrogate would raise
    assert "script" not in checker.tags and "b" not in checker.tags
    assert "&lt;script&gt;alert" in page
    assert "\x00" not in page and "\x1b" not in page and "\ufffd" in page
    assert checker.tags.count("img") == 4 and "held out loss" in page
    for words in ("tessella evaluate &#39;a b&#39; &lt;c&gt;", "0123456789ab", "a CPU, 2 cores", "2026-01-02"):
        assert words in page


def test_the_page_shows_both_answers_scores_intervals_and_the_test(task, rows):
    page = as_html(rows, task, origin=ORIGIN)
    assert "25.0\u00a0%" in page and "75.0\u00a0%" in page
    low, high = rows[1].score.interval
    assert f"{100 * low:.1f}\u00a0% to {100 * high:.1f}\u00a0%" in page
    assert "3 only this one, 1 only the first" in page
    assert page.count('class="right-answer"') == 4 and page.count('class="wrong-answer"') == 4
    assert 'class="card gained"' in page and 'class="card lost"' in page
    assert "the one compared with" in page


def test_the_question_is_said_once_when_it_is_always_the_same(task, rows):
    same = Task("fruit", tuple(Item(i.key, (Message("user", "What?"),), i.pictures, i.answers, i.label) for i in task.items))
    assert as_html(rows, same, origin=ORIGIN).count("What?") == 1
    assert "What is &lt;b&gt;2&lt;/b&gt;?" in as_html(rows, task, origin=ORIGIN)


def test_one_model_text_only_and_the_forgetting_part_make_a_valid_page(task):
    plain = Task("talk", (Item("one", (Message("user", "Capital?"),), (), ("Paris", "paris city")),), metric="contains")
    alone = row("alone", plain, ("It is Paris",))
    check(as_html([alone], plain, origin=ORIGIN))
    with_general = row("alone", plain, ("Rome",), general=alone.score)
    page = as_html([with_general, row("new", plain, ("Paris",), first=with_general, general=alone.score)], plain, origin=ORIGIN)
    check(page)
    assert "not forgotten" in page and "8.50" in page


def test_no_group_of_items_is_hidden_by_a_larger_one(task):
    many = Task("many", tuple(Item(str(i), (Message("user", "?"),), (), ("yes",)) for i in range(100)))
    before = row("before", many, ["no"] * 98 + ["yes", "yes"])
    after = row("after", many, ["yes"] * 98 + ["no", "yes"], first=before)
    shown = cards([before, after], many, 20)
    assert len(shown) == 20
    assert [card.change for card in shown].count("gained") == 18
    assert {card.change for card in shown} == {"gained", "lost", "right"}
    assert "20 of 100 are shown" in as_html([before, after], many, origin=ORIGIN, most_items=20)


def test_confusions_count_what_was_said_instead_worst_first(task, rows):
    found = {one.label: one.models for one in confusions(rows, task)}
    assert found["apple"] == ((0, 2, (("pear", 2),)), (2, 2, ()))
    assert found["pear"] == ((1, 1, ()), (0, 1, (("plum", 1),)))
    assert confusions(rows, task)[0].label == "pear"


def test_a_picture_that_cannot_be_read_does_not_stop_the_page(task, rows):
    assert thumbnail(Picture(b"no picture")) == ""
    small = thumbnail(task.items[0].pictures[0])
    image = Image.open(io.BytesIO(base64.b64decode(small.split(",")[1])))
    assert max(image.size) <= 208 and image.size[0] / image.size[1] == pytest.approx(640 / 300, rel=0.02)


def test_json_says_the_same_as_the_rows_and_can_be_read_back(task, rows):
    said = json.loads(json.dumps(as_json(rows, task, ORIGIN)))
    assert [one["score"] for one in said["rows"]] == [0.25, 0.75]
    assert said["rows"][0]["against_first"] is None
    test = mcnemar([False, False, True, False], [True, True, False, True])
    assert said["rows"][1]["against_first"] == {"model": "models/before", **test._asdict()}
    assert said["origin"]["commit"] == "0123456789ab"


def test_every_key_of_the_json_is_documented(task, rows):
    general = rows[0].score
    told = as_json(
        [row("a", task, ("x",) * 4, general=general), row("b", task, ("x",) * 4, first=rows[0], general=general)], task
    )
    documented = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    part = documented.split("## evaluate")[1].split("\n## ")[0]

    def keys(value):
        if isinstance(value, dict):
            return set(value).union(*(keys(inner) for inner in value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    assert sorted(key for key in keys(told) if f"`{key}`" not in part) == []


def test_a_report_that_cannot_be_written_says_so_and_leaves_the_old_one(task, rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"):
        write_html(tmp_path / "file" / "report.html", rows, task)
    write_html(tmp_path / "report.html", rows, task, origin=ORIGIN)
    assert [path.name for path in tmp_path.iterdir() if "report" in path.name] == ["report.html"]


def test_a_curve_takes_the_colours_of_the_page_and_survives_a_cut_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 3.0, "lr": 1}\n{"note": "x"}\n{"step": 2, "loss": 2.5}\n{"step": 3, "lo')
    assert read_losses(metrics) == {"loss": [(1, 3.0), (2, 2.5)]}
    svg = loss_curve(metrics)
    assert svg.startswith("<svg") and "currentColor" in svg
    assert not any(left in svg for left in ("<style", "<?xml", "#010203"))
    metrics.write_text('broken\n{"step": 1, "loss": 3.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not JSON"):
        loss_curve(metrics)
    with pytest.raises(DataError, match="not a file"):
        loss_curve(tmp_path / "none.jsonl")


def test_a_number_knows_its_date_command_and_hardware():
    origin = provenance()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", origin.date)
    assert origin.command and "cores" in origin.hardware and "torch" in origin.hardware
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", origin.commit)
