"""The web chat's parts that need no browser: messages, boxes, rows, words, the way to the server, the door."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="THE WEB CHAT IS NOT TESTED: gradio is not installed; it is in the ui extra")

import gradio as gr

from chat_processes import free_port
from tessella import cli
from tessella.errors import ConfigError, DataError
from tessella.foods import STYLES, foods
from tessella.marks import Box, boxes_in
from tessella.train.readers import draft_row
from tessella.ui import launch, words
from tessella.ui.boxes import draw, without_tags
from tessella.ui.client import Choice, Server, choices
from tessella.ui.conversation import Answer, Settings, Turn, messages_of, record_of, request_of, row_of
from tessella.ui.deeds import Deeds
from tessella.ui.pictures import Picture, take_in, thumbnail
from tessella.ui.shelf import rows_of_folder
from tessella.ui.talk import Talk
from tessella.ui.transcript import facts, markdown, turns_as_parts
from tessella.ui.trouble import Trouble
from tessella.webchat import Ui, food_rows


def answered(question: str, *texts: str, pictures: tuple[Picture, ...] = ()) -> Turn:
    return Turn(question, pictures, [Answer(f"model-{number}", Settings(), text, "stop") for number, text in enumerate(texts)])


@pytest.fixture
def red(tmp_path: Path) -> Picture:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "red.png")
    return take_in(tmp_path / "red.png", tmp_path)


# ---- words


def test_every_word_has_two_languages_and_the_same_values() -> None:
    for key, texts in words._WORDS.items():
        english, chinese = ({part.split("}")[0] for part in text.split("{")[1:]} for text in texts)
        assert english == chinese, key
    assert len(words.QUESTIONS["en"]) == len(words.QUESTIONS["zh"])


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("de-DE,de;q=0.9", "en"),
        ("", "en"),
        ("fr, zh-TW", "zh"),
    ],
)
def test_a_browser_is_spoken_to_as_it_prefers(accepted: str, language: str) -> None:
    assert words.language_of(accepted) == language


# ---- conversations


def test_each_column_remembers_its_own_answers_and_what_was_before_the_comparison(red: Picture) -> None:
    turns = [answered("one", "alone", pictures=(red,)), answered("two", "left", "right"), answered("three", "", "heard")]
    left, right = (messages_of(turns, column, "sys") for column in (0, 1))
    assert [message["content"] for message in right if message["role"] == "assistant"] == ["alone", "right", "heard"]
    assert [message["content"] for message in left if message["role"] == "assistant"] == ["alone", "left"]
    assert left[0] == {"role": "system", "content": "sys"} and left[-1]["role"] == "assistant"
    assert [part["type"] for part in left[1]["content"]] == ["image_url", "text"]


def test_what_is_left_out_is_left_to_the_server() -> None:
    body = request_of([], Turn("hello"), 0, "tiny", Settings())
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert not {"seed", "max_tiles"} & body.keys()
    assert request_of([], Turn("hello"), 0, "tiny", Settings(seed=0))["seed"] == 0


def test_a_saved_row_teaches_what_was_shown_asked_and_answered(red: Picture, tmp_path: Path) -> None:
    turns = [answered("what?", "red", pictures=(red,)), answered("and two more?", "same", "other", pictures=(red, red))]
    draft = draft_row("x:1", json.loads(json.dumps(row_of(turns, 1))), tmp_path)
    assert [message.role for message in draft.messages] == ["user", "assistant"] * 2
    assert draft.messages[-1].text == "other" and len(draft.sources) == 3
    assert "".join(message.text for message in draft.messages).count("<image>") == 3
    for save in (record_of, lambda turns: row_of(turns, 0), lambda _: row_of([answered("q", "")], 0)):
        with pytest.raises(Trouble, match="nothing to"):
            save([])


def test_the_server_gets_a_picture_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    image = Image.new("RGB", (80, 40), "blue")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter, as a phone writes it
    image.save(path, exif=exif)
    picture = take_in(path, tmp_path)
    head, _, data = picture.data_url().partition(",")
    assert head == "data:image/jpeg;base64" and len(data) == -(-path.stat().st_size // 3) * 4
    assert (picture.width_px, picture.height_px) == (40, 80)
    assert Image.open(picture.shown).size == (40, 80)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, b"GIF89a\x01"])
def test_what_is_no_picture_is_told_with_its_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(Trouble, match=r"odd\.png is no picture") as caught:
        take_in(tmp_path / "odd.png", tmp_path)
    assert "odd.png" in caught.value.sentence("zh") and caught.value.sentence("zh") != str(caught.value)


# ---- boxes


def test_boxes_are_found_and_read_as_numbers() -> None:
    text = "A <ref>dumpling</ref><box>[[10, 20, 500, 600], [0,0,1000,1000]]</box> and <box>[5,5,9,9]</box>."
    assert boxes_in(text) == [Box("dumpling", 10, 20, 500, 600), Box("dumpling", 0, 0, 1000, 1000), Box("", 5, 5, 9, 9)]
    assert without_tags(text) == "A dumpling ①② and ③."
    for senseless in (
        "<box>[[500, 20, 10, 600]]</box>",
        "<box>[[0, 0, 2000, 5]]</box>",
        "<box>[[1, 2, 3]]</box>",
        "<box>no</box>",
    ):
        assert boxes_in(senseless) == [] and without_tags(senseless) == senseless


def test_a_box_is_drawn_where_it_is(red: Picture, tmp_path: Path) -> None:
    with Image.open(draw(red, [Box("", 500, 200, 900, 800)], tmp_path)) as drawn:
        image = drawn.convert("RGB")
    assert image.size == (640, 320)
    orange, inside = image.getpixel((320, 200)), image.getpixel((450, 160))  # on the left edge, and in the middle
    assert orange[1] > 100 and inside[0] > 200 and inside[1] < 60


# ---- what is shown


def test_nothing_said_becomes_html_of_its_own() -> None:
    html = markdown("<img src=x onerror=alert(1)> ![x](http://e.example/x.png) [a](javascript:alert(1)) `<b>` **ok**")
    assert "<img" not in html and 'href="javascript' not in html and "&lt;b&gt;" in html and "<strong>ok</strong>" in html
    assert 'rel="noopener noreferrer"' in markdown("[a](https://e.example)")
    parts = turns_as_parts([answered('" onmouseover="x', "a")], "en", Path("."), busy=False)
    assert (
        "&quot; onmouseover=&quot;x" in parts["turns"][0]["question"] and '" onmouseover="x' not in parts["turns"][0]["question"]
    )


def test_numbers_that_nobody_gave_are_not_told() -> None:
    assert facts(Answer("m", Settings()), "en") == ""
    answer = Answer("m", Settings(), "text", "length", None, 1234, 11, 3, 0.5, 1.5)
    assert facts(answer, "en") == (
        "1,234 tokens asked · tiles: 3 · 11 answered · first after 0.50 s · 10 tokens/s · cut at the longest length"
    )
    assert "10 token/秒" in facts(answer, "zh")


# ---- the quick bar


def test_every_shipped_food_is_in_the_quick_bar_once() -> None:
    rows = food_rows()
    assert [row.names["en"] for row in rows] == ["Fruit", "Vegetables", "Dishes", "Asian dishes", "Sweets", "Drinks"]
    items = [item for row in rows for item in row.items]
    assert [item.names["zh"] for item in items] == [food.chinese for food in foods()]
    assert {item.path.parent.name for item in items} == {STYLES[-1]}


def test_a_folder_of_ones_own_has_a_row_for_each_subfolder(tmp_path: Path, picture: Callable[[str], Path]) -> None:
    for name in ("b/one.png", "b/two.png", "a/three.png", "a/notes.txt", ".hidden/four.png", "empty/x.txt", "five.png"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_bytes(picture("#ff0000").read_bytes())
    rows = rows_of_folder(tmp_path / "mine")
    found = [(row.names["en"], [item.names["zh"] for item in row.items]) for row in rows]
    assert found == [("a", ["three"]), ("b", ["one", "two"]), ("mine", ["five"])]
    assert thumbnail(rows[0].items[0].path).startswith("data:image/webp;base64,")
    for wrong in (tmp_path / "mine" / "empty", tmp_path / "nowhere", tmp_path / "mine" / "five.png"):
        with pytest.raises(DataError, match=r"give a folder|no picture"):
            rows_of_folder(wrong)


# ---- the way to the server


@pytest.fixture
def odd_server() -> Iterator[Callable[[int, bytes], Server]]:
    """Servers that answer everything with one status and body."""
    servers = []

    def serve(status: int, body: bytes) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return Server(f"http://127.0.0.1:{server.server_port}")

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


async def all_pieces(server: Server) -> list[dict[str, Any]]:
    return [piece async for piece in server.pieces({"model": "x"})]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b'{"error": {"message": "no key; send one"}}', r"\(401\): no key; send one"),
        (502, b"<html>", r"\(502\): Bad Gateway"),
        (200, b"<html>hello</html>", "went away in the middle"),
        (200, b"data: {broken\n\n", "went away in the middle"),
        (200, b'data: {"error": {"message": "out of blocks; ask less"}}\n\n', "out of blocks; ask less"),
    ],
)
def test_what_a_server_says_instead_of_an_answer_is_a_sentence(
    status: int, body: bytes, told: str, odd_server: Callable[[int, bytes], Server]
) -> None:
    with pytest.raises(Trouble, match=told):
        asyncio.run(all_pieces(odd_server(status, body)))


def test_an_answer_may_hold_any_sign(odd_server: Callable[[int, bytes], Server]) -> None:
    said = {"choices": [{"delta": {"content": "a\u2028b\u0085c 饺子"}}]}
    server = odd_server(200, f"data: {json.dumps(said, ensure_ascii=False)}\r\n\r\ndata: [DONE]\n\n".encode())
    assert asyncio.run(all_pieces(server)) == [said]


def test_models_of_several_servers_are_told_apart(
    odd_server: Callable[[int, bytes], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked the way to this machine itself
    one, odd, away = odd_server(200, b'{"data": [{"id": "tiny"}]}'), odd_server(200, b"{}"), Server("http://127.0.0.1:9")
    found, troubles = asyncio.run(choices((one, odd, away)))
    assert [choice.label for choice in found] == [f"tiny @ {one.url.removeprefix('http://')}"]
    assert [trouble.key for trouble in troubles] == ["odd", "away"]
    assert asyncio.run(choices((one,)))[0][0].label == "tiny"


def test_what_a_person_chose_is_left_alone_while_it_is_served(odd_server: Callable[[int, bytes], Server], tmp_path: Path) -> None:
    deeds = Deeds((odd_server(200, b'{"data": [{"id": "a"}, {"id": "b"}]}'),), food_rows(), tmp_path, lambda _: {})

    async def look(*chosen: Any) -> tuple[Any, ...]:
        return await deeds.look("en", *chosen)

    _, first, second, offered = asyncio.run(look(None, None, []))
    assert (first["value"], second["value"], offered) == ("a", "b", ["a", "b"])
    assert all(update == gr.skip() for update in asyncio.run(look("b", "a", offered))[1:])
    _, first, second, _ = asyncio.run(look("b", "gone", ["b", "gone"]))
    assert (first["value"], second["value"]) == ("b", "b")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://a/?x=1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Server(url)


# ---- a tab


class Slow(Server):
    """Answers for ever."""

    async def pieces(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        while True:
            yield {"choices": [{"delta": {"content": "on "}}]}
            await asyncio.sleep(0.01)


def test_while_it_answers_nothing_else_is_begun_and_stopping_keeps_what_came() -> None:
    talk, whom = Talk(), [Choice("slow", "slow", Slow("http://127.0.0.1:9"))]

    async def ask() -> None:
        looks = 0
        async for _ in talk.ask("hello", (), whom, Settings()):
            looks += 1
            if looks == 3:
                for deed in (lambda: talk.ask("x", (), whom, Settings()), talk.undo, lambda: talk.correct(0, 0, "x")):
                    with pytest.raises(Trouble, match="still answering"):
                        deed()
                talk.stop()

    asyncio.run(ask())
    (answer,) = talk.turns[0].answers
    assert answer.ended == "stopped" and answer.text.startswith("on on ") and not talk.busy


def test_a_question_needs_words_and_somebody_to_ask() -> None:
    talk = Talk()
    for question, whom in ((" ", [Choice("a", "a", Server("http://a"))]), ("what?", [])):
        with pytest.raises(Trouble):
            talk.ask(question, (), whom, Settings())
    assert not talk.turns


# ---- the door


def test_the_page_about_it_names_every_flag_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "web-chat.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| `--")]
    named = {flag for line in table for flag in re.findall(r"--([a-z-]+)", line.split("|")[1])}
    assert named == {field.name.replace("_", "-").replace("open", "no-open") for field in fields(Ui)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--server", "gpu-box"], '"gpu-box" is no address'),
        (["--pictures", "./nowhere"], "nowhere cannot be read"),
        (["--port", "0"], "port is 0"),
        (["--password", "short"], "at least 8"),
        (["--share"], "--share opens the page to the internet"),
        (["--json", "no/such/folder/x.json"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_2(words: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", *words]) == 2
    error = capfd.readouterr().err
    assert error.startswith("tessella: ") and told in error and "Traceback" not in error


def options(**changes: Any) -> launch.Options:
    return launch.Options(servers=(Server("http://127.0.0.1:9"),), rows=food_rows()[:1], **changes)


def test_only_this_machine_comes_in_without_a_password() -> None:
    assert options().closed and options(host="localhost").closed and options(host="::1").closed
    for open_ in (options(host="0.0.0.0"), options(host="192.168.1.5"), options(host="box.example"), options(share=True)):
        assert not open_.closed
    with pytest.raises(ConfigError, match="at least 8"):
        options(password="short")
    with pytest.raises(ConfigError, match="port is 70000"):
        options(port=70000)


def test_a_tunnel_is_never_opened_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no terminal"):
        launch.serve(options(share=True), print)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "")
    with pytest.raises(ConfigError, match="not shared"):
        launch.serve(options(share=True), print)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A page that is really served, in this process; gives its address."""
    pages = []

    def open_door(password: str | None = None, **changes: Any) -> str:
        wish = options(port=free_port(), open=False, **changes)
        page = launch.build(wish.servers, wish.rows, tmp_path)
        pages.append(page)
        return launch.open_page(page, wish, password, tmp_path).rstrip("/")

    yield open_door
    for page in pages:
        page.close(verbose=False)


def status_of(url: str, **headers: str) -> tuple[int, Any]:
    try:
        with build_opener(ProxyHandler({})).open(Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers
    except HTTPError as error:
        return error.code, error.headers


def test_a_page_on_this_machine_answers_to_its_own_names_only_and_loads_from_nowhere_else(door: Callable[..., str]) -> None:
    address = door(allowed_hosts=("chat.example.org",))
    for name, expected in (
        ("localhost", 200),
        ("chat.example.org:443", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
    ):
        status, headers = status_of(f"{address}/", Host=name)
        assert status == expected, name
        assert "default-src 'self'" in headers["content-security-policy"] and "http" not in headers["content-security-policy"]
    for path in ("/gradio_api/file=/etc/passwd", f"/gradio_api/file={Path(__file__)}"):
        assert status_of(address + path)[0] == 403


def test_the_page_has_its_words_before_any_script_has_asked_for_them(door: Callable[..., str]) -> None:
    with build_opener(ProxyHandler({})).open(f"{door()}/config", timeout=10) as answer:
        config = json.loads(answer.read())
    said = {str(part["props"].get(name)) for part in config["components"] for name in ("label", "value", "placeholder", "info")}
    for key in ("model", "compare", "temperature", "new", "export_json", "placeholder", "tiles_info"):
        assert words.say("en", key) in said, key
    assert not said & {"Run", "Dropdown", "Slider", "Textbox", "Checkbox", "Number"}


def test_a_password_guards_page_and_pictures(door: Callable[..., str], tmp_path: Path) -> None:
    address = door(password="open sesame")
    Image.new("RGB", (9, 9)).save(tmp_path / "shown.png")
    for path in ("/config", f"/gradio_api/file={tmp_path / 'shown.png'}", "/gradio_api/info"):
        assert status_of(address + path)[0] == 401, path
    assert status_of(f"{door()}/gradio_api/file={tmp_path / 'shown.png'}")[0] == 200
