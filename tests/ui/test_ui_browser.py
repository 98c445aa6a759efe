"""The web chat as a person has it: in a browser, through the mouse, the keyboard and the clipboard, against a stand-in server."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chat_pages import Chat
from chat_processes import CHROMIUM, StandIn, fetch, free_port, wait_for
from tessella.checkpoint.builtin import cache_folder
from tessella.checkpoint.smollm2 import language_base
from tessella.errors import DownloadError
from tessella.train.readers import draft_row

NOT_TESTED = "THE WEB CHAT IS NOT TESTED IN A BROWSER:"
pytest.importorskip("gradio", reason=f"{NOT_TESTED} gradio is not installed; it is in the ui extra")
pytest.importorskip("playwright", reason=f"{NOT_TESTED} playwright is not installed; it is in the test extra")
if CHROMIUM is None:
    pytest.skip(f"{NOT_TESTED} no chromium on this machine; apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def address(browser: Any, stand_in: StandIn, serve_chat: Callable[..., str]) -> str:
    return serve_chat("--server", stand_in.url)


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Callable[..., Chat]]:
    """Opens the page in a tab of a browser of its own; at the end nothing was fetched from elsewhere and no script failed."""
    tabs: list[Chat] = []

    def open_tab(**options: Any) -> Chat:
        tabs.append(Chat(browser.new_context(**{"locale": "en-US", **options}), address))
        return tabs[-1]

    yield open_tab
    for chat in tabs:
        chat.context.close()
        assert not chat.elsewhere and not chat.faults


@pytest.fixture(scope="module")
def kept_tab(browser: Any, address: str) -> Iterator[Chat]:
    """One tab for all tests that leave the settings as they are: opening a page is what takes longest."""
    chat = Chat(browser.new_context(locale="en-US", permissions=["camera"]), address)
    yield chat
    chat.context.close()
    assert not chat.elsewhere and not chat.faults


@pytest.fixture
def chat(kept_tab: Chat) -> Chat:
    """A new conversation in the kept tab."""
    kept_tab.page.get_by_role("button", name="New conversation").click()
    kept_tab.page.wait_for_function("document.querySelectorAll('.turn, #box .thumbnail-item').length === 0")
    kept_tab.mark()
    return kept_tab


def test_pictures_answers_and_turns_follow_each_other(chat: Chat, picture: Callable[[str], Path]) -> None:
    chat.show(picture("#ff0000"))
    chat.ask("what is it?")
    assert chat.answer() == "tiny heard “what is it?”, turn 1, pictures #ff0000."
    facts = chat.facts()
    assert re.fullmatch(r"263 tokens asked · tiles: 1 · \d+ answered · first after [\d.]+ s · [\d.]+ tokens/s", facts), facts
    chat.show(picture("#00ff00"), picture("#0000ff"))
    chat.ask("and these?")
    assert chat.answer() == "tiny heard “and these?”, turn 2, pictures #ff0000 #00ff00 #0000ff."
    chat.ask("thank you")
    assert chat.answer() == "tiny heard “thank you”, turn 3, pictures #ff0000 #00ff00 #0000ff."
    assert chat.page.locator(".question img").count() == 3


def test_an_answer_is_seen_while_it_grows_and_stops_when_told(chat: Chat, stand_in: StandIn) -> None:
    chat.ask("slowly, to be stopped", wait=False)
    chat.page.wait_for_function("document.querySelector('.answer .said')?.textContent.includes('word3')")
    assert not chat.facts().startswith("7 tokens")
    chat.page.get_by_role("button", name="Stop").click()
    chat.page.wait_for_function("document.querySelector('.answer .facts').textContent.includes('stopped')")
    wait_for(lambda: "slowly, to be stopped" in stand_in.left(), 3)
    kept = chat.text()
    chat.ask("go on")
    assert "turn 2" in chat.answer()
    assert kept.startswith("word0") and chat.text(0) == kept


def test_the_end_stays_in_sight_until_a_person_scrolls_up(chat: Chat, picture: Callable[[str], Path]) -> None:
    below = (
        "(() => { const log = document.querySelector('.turns'); return log.scrollHeight - log.scrollTop - log.clientHeight; })()"
    )
    for colour in ("#ff0000", "#00ff00", "#0000ff"):
        chat.show(picture(colour))
        chat.ask("where is it?")
    chat.page.wait_for_function(f"{below} < 2")
    chat.ask("slowly", wait=False)
    chat.page.wait_for_function("[...document.querySelectorAll('.answer .said')].at(-1).textContent.includes('word2')")
    chat.page.evaluate("document.querySelector('.turns').scrollTop = 0")
    chat.page.wait_for_function("[...document.querySelectorAll('.answer .said')].at(-1).textContent.includes('word6')")
    assert chat.page.evaluate("document.querySelector('.turns').scrollTop") == 0
    chat.done()


def test_a_tab_that_is_closed_stops_its_answer(tab: Callable[..., Chat], stand_in: StandIn) -> None:
    chat = tab()
    chat.ask("slowly, then gone", wait=False)
    chat.page.wait_for_function("document.querySelector('.answer .said')?.textContent.includes('word1')")
    chat.page.close()
    wait_for(lambda: "slowly, then gone" in stand_in.left(), 5)


def test_two_tabs_at_once_stay_apart(tab: Callable[..., Chat]) -> None:
    one, other = tab(), tab()
    one.ask("slowly", wait=False)
    one.page.wait_for_function("document.querySelector('.answer .said')?.textContent.includes('word2')")
    other.ask("quickly")
    assert other.answer() == "tiny heard “quickly”, turn 1, pictures none."
    assert "quickly" not in one.page.inner_text("#transcript")


def test_two_models_answer_side_by_side(tab: Callable[..., Chat], stand_in: StandIn) -> None:
    chat = tab()
    chat.ask("before")
    chat.page.get_by_label("Compare two side by side").check()
    chat.page.locator("#second input").wait_for()
    chat.ask("compare")
    texts = [chat.text(1, column) for column in (0, 1)]
    assert texts == [f"{model} heard “compare”, turn 2, pictures none." for model in ("tiny", "tiny-foods")]
    left, right = (chat.page.locator(".turn").nth(1).locator(".answer").nth(column).bounding_box() for column in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    asked = len(stand_in.seen())
    chat.press("Answer again", column=1)
    chat.done()
    assert [body["model"] for body in stand_in.seen()[asked:]] == ["tiny-foods"]


def test_the_page_opens_with_the_two_models_that_it_was_told(
    browser: Any, stand_in: StandIn, serve_chat: Callable[..., str]
) -> None:
    chat = Chat(browser.new_context(locale="en-US"), serve_chat("--server", stand_in.url, "--compare", "tiny-foods,tiny"))
    chat.ask("both?")
    assert [chat.text(0, column) for column in (0, 1)] == [
        f"{model} heard “both?”, turn 1, pictures none." for model in ("tiny-foods", "tiny")
    ]
    chat.context.close()
    assert not chat.elsewhere and not chat.faults


def test_editing_taking_back_and_correcting(chat: Chat, picture: Callable[[str], Path], stand_in: StandIn) -> None:
    chat.show(picture("#ff0000"))
    chat.ask("first")
    chat.ask("second")
    chat.press("Edit and ask again", turn=0)
    chat.page.get_by_role("textbox", name="Edit and ask again").fill("better <first>")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_function("document.querySelectorAll('.turn').length === 1")
    chat.done()
    assert chat.answer() == "tiny heard “better <first>”, turn 1, pictures #ff0000."
    chat.press("Correct the answer", turn=0)
    chat.page.get_by_role("textbox", name="Correct the answer").fill("a tomato")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_function("document.querySelector('.answer .said').textContent.trim() === 'a tomato'")
    assert "corrected by hand" in chat.facts()
    chat.ask("third")
    assert stand_in.seen()[-1]["messages"][1] == {"role": "assistant", "content": "a tomato"}
    chat.press("Take back", turn=1)
    chat.page.wait_for_function("document.querySelectorAll('.turn').length === 1")
    assert chat.page.input_value("#box textarea") == "third"
    chat.page.get_by_role("button", name="New conversation").click()
    chat.page.wait_for_function("document.querySelectorAll('.turn').length === 0")


def test_pictures_are_pasted_and_dropped(chat: Chat, picture: Callable[[str], Path]) -> None:
    for event, colour, number in (("paste", "#ff0000", 1), ("drop", "#00ff00", 2)):
        raw = base64.b64encode(picture(colour).read_bytes()).decode()
        chat.page.evaluate(
            """([event, raw]) => {
              const bytes = Uint8Array.from(atob(raw), (c) => c.charCodeAt(0));
              const data = new DataTransfer();
              data.items.add(new File([bytes], event + '.png', { type: 'image/png' }));
              const target = document.querySelector('#box textarea');
              const made = event === 'paste'
                ? new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true })
                : new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
              target.dispatchEvent(made);
            }""",
            [event, raw],
        )
        chat.shown(number)
    chat.ask("which colours?")
    assert chat.answer().endswith("pictures #ff0000 #00ff00.")


def test_the_camera_takes_a_picture(chat: Chat) -> None:
    chat.page.get_by_role("button", name="Camera").click()
    chat.page.wait_for_function("document.querySelector('#camera video').videoWidth > 0")
    chat.page.get_by_role("button", name="Take a picture").click()
    chat.shown(1)
    chat.ask("what do you see?")
    assert re.search(r"pictures #[0-9a-f]{6}\.", chat.answer())


def test_the_quick_bar_shows_and_asks(chat: Chat) -> None:
    chat.page.get_by_role("button", name="Sweets").click()
    chat.page.get_by_role("button", name="doughnut").click()
    chat.shown(1)
    chat.page.get_by_role("button", name="What food is in this picture?").click()
    chat.done()
    assert re.search(r"heard “What food is in this picture\?”, turn 1, pictures #[0-9a-f]{6}\.", chat.answer())


def test_the_settings_reach_the_server(tab: Callable[..., Chat], stand_in: StandIn) -> None:
    chat = tab()
    for name, value in (("Seed", "7"), ("System prompt", "You are a cook."), ("Longest answer, in tokens", "99")):
        chat.page.get_by_label(name).fill(value)
        chat.page.keyboard.press("Tab")
    for part, value in (("#temperature", "0.5"), ("#top-p", "0.9"), ("#tiles", "4")):
        field = chat.page.locator(f"{part} input[type=number]")
        field.fill(value)
        field.press("Tab")
    chat.ask("hello")
    body = stand_in.seen()[-1]
    expected = {"seed": 7, "max_tokens": 99, "temperature": 0.5, "top_p": 0.9, "max_tiles": 4, "stream": True}
    assert {name: body[name] for name in expected} == expected
    assert body["messages"][0] == {"role": "system", "content": "You are a cook."}
    chat.page.get_by_label("Seed").fill("seven")
    chat.ask("hello", wait=False)
    chat.page.get_by_text("The seed is “seven”, must be a whole number").wait_for()


def test_what_an_answer_marks_is_drawn_on_the_picture(chat: Chat, picture: Callable[[str], Path]) -> None:
    chat.show(picture("#0000ff"))
    chat.ask("where is the red square?")
    assert chat.answer() == "It is red square ①, look."
    drawn = chat.page.locator(".boxed img")
    chat.page.wait_for_function("document.querySelector('.boxed img').naturalWidth === 640")
    assert drawn.get_attribute("alt") == "What the answer marks on 0000ff.png"
    assert chat.page.inner_text(".boxed figcaption") == "1 red square"


def test_a_conversation_is_saved_and_can_be_learned_from(chat: Chat, picture: Callable[[str], Path], tmp_path: Path) -> None:
    chat.page.get_by_role("button", name="Conversation (JSON)").click()
    chat.page.get_by_text("Nothing was said yet").wait_for()
    chat.show(picture("#ff0000"))
    chat.ask("what is it?")
    saved = {}
    for name in ("Conversation (JSON)", "Training sample (JSONL)"):
        with chat.page.expect_download() as download:
            chat.page.get_by_role("button", name=name).click()
        saved[download.value.suggested_filename] = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    (turn,) = saved["conversation.json"]["turns"]
    assert turn["answers"][0]["text"] == chat.answer() and turn["answers"][0]["tiles"] == 1
    draft = draft_row("sample.jsonl:1", saved["sample.jsonl"], tmp_path)
    assert [message.text for message in draft.messages] == ["<image>\nwhat is it?", chat.answer()]
    assert draft.sources == (turn["pictures"][0]["url"],)


def test_a_refusal_is_a_sentence_and_what_is_no_picture_too(chat: Chat, tmp_path: Path) -> None:
    chat.ask("refuse this")
    assert chat.page.inner_text(".answer .trouble") == "The server says (400): 4,812 tokens; at most 4,096: fewer tiles"
    chat.ask("break here")
    assert "The server went away in the middle" in chat.page.locator(".answer .trouble").nth(1).inner_text()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    chat.show(tmp_path / "broken.png")
    chat.ask("what is it?", wait=False)
    chat.page.get_by_text("broken.png is no picture that can be opened").wait_for()


def test_nothing_that_a_model_says_runs_or_loads(chat: Chat) -> None:
    chat.ask("evil")
    assert "<script>document.title = 'hacked'</script>" in chat.text() and "<b>bold</b>" in chat.text()
    assert chat.page.title() == "Tessella" and chat.page.locator(".answer :is(img, script, b)").count() == 0
    # Even a picture that came into the page by another way is not fetched from elsewhere: the browser itself refuses.
    chat.page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.2:9/x.png' }))")
    wait_for(lambda: chat.refused.pop() if chat.refused else chat.page.wait_for_timeout(50), 5)


def test_the_server_may_be_killed_and_come_back(chat: Chat, stand_in: StandIn, picture: Callable[[str], Path]) -> None:
    chat.show(picture("#ff0000"))
    chat.ask("first")
    chat.ask("slowly", wait=False)
    chat.page.wait_for_function("document.querySelectorAll('.answer .said')[1]?.textContent.includes('word2')")
    stand_in.kill()
    chat.done()
    assert "went away in the middle" in chat.page.inner_text(".answer .trouble") and chat.text(1).startswith("word0 word1")
    chat.ask("anybody?")
    assert "No server answers at" in chat.page.locator(".answer .trouble").last.inner_text()
    chat.page.locator("#status .away").wait_for()
    stand_in.start()
    chat.page.locator("#status .away").wait_for(state="detached")
    chat.press("Answer again", turn=2)
    chat.done()
    assert chat.answer() == "tiny heard “anybody?”, turn 3, pictures #ff0000."


def test_chinese_is_spoken_and_typed(tab: Callable[..., Chat]) -> None:
    chat = tab(locale="zh-CN")
    chat.page.get_by_role("button", name="甜点").click()
    chat.page.get_by_role("button", name="月饼").or_(chat.page.get_by_role("button", name="甜甜圈")).first.click()
    chat.shown(1)
    chat.page.locator("#box textarea").focus()
    keys = chat.context.new_cdp_session(chat.page)  # an input method: the Enter that ends a composition sends nothing
    keys.send("Input.imeSetComposition", {"text": "zhe shi shen me", "selectionStart": 15, "selectionEnd": 15})
    chat.page.dispatch_event("#box textarea", "keydown", {"key": "Enter", "code": "Enter", "isComposing": True, "keyCode": 229})
    chat.page.wait_for_timeout(300)
    assert chat.page.locator(".turn").count() == 0
    keys.send("Input.insertText", {"text": "这是什么？"})
    chat.page.keyboard.press("Enter")
    chat.done()
    assert "heard “这是什么？”" in chat.answer() and "提问 263 token" in chat.facts()
    assert chat.page.evaluate("document.documentElement.lang") == "zh-CN"
    chat.page.get_by_label("English").check()
    chat.page.get_by_role("button", name="New conversation").wait_for()
    assert "263 tokens asked" in chat.facts() and chat.page.evaluate("document.documentElement.lang") == "en"


def test_everything_is_done_with_the_keyboard_alone(tab: Callable[..., Chat]) -> None:
    chat = tab()
    chat.tab_to("lemon")
    chat.page.keyboard.press("Enter")
    chat.shown(1)
    chat.tab_to("Describe the picture.")
    chat.page.keyboard.press("Enter")
    chat.done()
    chat.tab_to("Answer again")
    chat.page.keyboard.press("Space")
    chat.done()
    chat.tab_to("Edit and ask again")
    chat.page.keyboard.press("Enter")
    chat.page.keyboard.type(" Please.")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_function("document.querySelector('.question .said').textContent.includes('Please.')")
    chat.done()
    chat.tab_to("Compare two side by side")
    chat.page.keyboard.press("Space")
    chat.page.locator("#second input").wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_no_serious_fault_for_those_who_see_less(width: int, tab: Callable[..., Chat], picture: Callable[[str], Path]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    chat = tab(viewport={"width": width, "height": 844}, color_scheme="light")
    chat.show(picture("#ff0000"))
    chat.ask("where is it?")
    chat.ask("refuse")
    for dark in (False, True):
        assert chat.page.evaluate("document.body.classList.contains('dark')") == dark
        faults = [fault for fault in axe.run(chat.page).response["violations"] if fault["impact"] in ("serious", "critical")]
        assert not faults, [(fault["id"], [node["html"][:200] for node in fault["nodes"][:5]]) for fault in faults]
        chat.page.get_by_role("button", name="Dark or light").click()
        chat.page.wait_for_timeout(400)  # colours change slowly
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.weights
def test_the_built_in_model_is_served_with_its_web_chat_by_one_command(browser: Any, tmp_path: Path) -> None:
    for extra in ("fastapi", "prometheus_client", "llguidance"):
        pytest.importorskip(extra, reason="the serve extra is not installed")
    try:
        language_base(cache_folder())  # fetched on first use
    except DownloadError as error:
        pytest.skip(f"the language model of tessella-nano is not here and cannot be fetched: {error}")
    port, ui_port = free_port(), free_port()
    command = [sys.executable, "-m", "tessella.cli", "serve", "--port", str(port), "--ui", "--ui-port", str(ui_port)]
    with subprocess.Popen([*command, "--api-key", "a-key-of-16-signs-or-more"]) as process:
        try:
            wait_for(lambda: fetch(f"http://127.0.0.1:{ui_port}/config"), 120)
            chat = Chat(browser.new_context(locale="zh-CN"), f"http://127.0.0.1:{ui_port}")
            chat.page.set_default_timeout(120_000)
            chat.page.get_by_role("button", name="亚洲美食").click()
            chat.page.get_by_role("button", name="饺子").click()
            chat.shown(1)
            chat.page.get_by_role("button", name="图中是什么食物？").click()
            chat.page.wait_for_function("document.querySelector('.answer .facts')?.textContent.includes('token/秒')")
            assert chat.answer() and re.search(r"提问 \d+ token · 图块 1 · 回答 \d+ token", chat.facts())
            chat.context.close()
        finally:
            process.terminate()
        assert process.wait(60) == 0
    with pytest.raises(OSError, match="refused"):  # the page ends with the server
        fetch(f"http://127.0.0.1:{ui_port}/config")
