"""The page: what stands where, in which language, and which deed each button does.

In: servers, rows of the quick bar, a folder for copies of pictures.  Out: Gradio Blocks, ready to be launched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from tessella.ui.client import Server
from tessella.ui.deeds import Deeds
from tessella.ui.shelf import Row
from tessella.ui.talk import Talk
from tessella.ui.transcript import icon_button, turns_as_parts
from tessella.ui.words import LANGUAGES, say

HERE = Path(__file__).parent
POLL_S = 4.0  # between two looks of a tab whether the server is there; Deeds.look asks it less often
TOGGLE_THEME = """() => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('tessella-theme', dark ? 'dark' : 'light');
}"""
OPENED = """() => {
  if (window.innerWidth >= 1000) document.querySelector('#settings:not(.open) .toggle-button')?.click();
  const kept = localStorage.getItem('tessella-theme');
  if (kept) document.body.classList.toggle('dark', kept === 'dark');
}"""
# The browser makes the file: nothing is written on the server's disk, and one click is enough.
DOWNLOAD = """(file) => {
  if (!file) return;
  const { name, text } = JSON.parse(file);
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclass(frozen=True)
class Parts:
    """Everything on the page that a deed reads or changes."""

    talk: gr.State
    kind: gr.State  # the row of the quick bar that is open
    offered: gr.State  # the models that can be chosen
    title: gr.HTML
    language: gr.Radio
    theme: gr.Button
    new: gr.Button
    status: gr.HTML
    transcript: gr.HTML
    quick: gr.HTML
    box: gr.MultimodalTextbox
    camera: gr.HTML
    heading: gr.HTML
    model: gr.Dropdown
    compare: gr.Checkbox
    second: gr.Dropdown
    temperature: gr.Slider
    top_p: gr.Slider
    max_tokens: gr.Number
    tiles: gr.Slider
    seed: gr.Textbox
    system: gr.Textbox
    export_heading: gr.HTML
    export_json: gr.Button
    export_row: gr.Button
    export_row_second: gr.Button
    file: gr.Textbox  # a file on its way into the browser's downloads; never seen

    @property
    def settings(self) -> list[gr.components.Component]:
        """What Deeds.wish reads, in its order."""
        how = [self.temperature, self.top_p, self.max_tokens, self.tiles, self.seed, self.system]
        return [self.model, self.compare, self.second, *how]

    def words(self, language: str) -> dict[gr.components.Component, dict[str, Any]]:
        """What each part says in a language."""
        labels = {
            self.language: "language",
            self.model: "model",
            self.compare: "compare",
            self.second: "second_model",
            self.temperature: "temperature",
            self.top_p: "top_p",
            self.max_tokens: "max_tokens",
            self.tiles: "tiles",
            self.seed: "seed",
            self.system: "system",
            self.box: "box",
        }
        infos = {
            self.temperature: "temperature_info",
            self.tiles: "tiles_info",
            self.seed: "seed_info",
            self.system: "system_info",
        }
        values = {
            self.new: "new",
            self.export_json: "export_json",
            self.export_row: "export_row",
            self.export_row_second: "export_row_second",
        }
        said: dict[gr.components.Component, dict[str, Any]] = {}
        for part, key in labels.items():
            said[part] = {"label": say(language, key)}
        for part, key in infos.items():
            said[part]["info"] = say(language, key)
        for part, key in values.items():
            said[part] = {"value": say(language, key)}
        said[self.box]["placeholder"] = say(language, "placeholder")
        said[self.heading] = {"value": f"<h2>{say(language, 'settings')}</h2>"}
        said[self.export_heading] = {"value": f"<h2>{say(language, 'export')}</h2>"}
        said[self.camera] = {"value": camera_html(language)}
        said[self.title] = {"value": f"<h1>Tessella<span> · {say(language, 'chat')}</span></h1>"}
        return said


def build(servers: tuple[Server, ...], rows: Sequence[Row], folder: Path, compare: tuple[str, ...] | None = None) -> gr.Blocks:
    """The whole page. folder holds copies and drawings of pictures for as long as the page is served.

    compare: as in launch.Options.
    """
    with gr.Blocks(title="Tessella", analytics_enabled=False, fill_height=True, delete_cache=(3600, 86400)) as blocks:
        parts = _lay_out(folder, compare is not None)
        _name(parts.words("en"))
        _wire(blocks, parts, Deeds(servers, rows, folder, parts.words, compare or ()))
    return blocks


def _lay_out(folder: Path, two: bool) -> Parts:
    """two: two models are compared from the beginning."""
    language = "en"  # until the page is loaded and says which it wants
    state = {"talk": gr.State(Talk()), "kind": gr.State(0), "offered": gr.State([])}
    with gr.Sidebar(position="left", open=False, width=300, elem_id="settings"):
        side = _settings(two)
    with gr.Row(elem_id="head"):
        head = {
            "title": gr.HTML(elem_id="title"),
            "status": gr.HTML(elem_id="status"),
            "language": gr.Radio(
                [(name, key) for key, name in LANGUAGES.items()],
                value=language,
                elem_id="language",
                container=False,
                min_width=120,
            ),
            "theme": gr.Button("◐", size="sm", min_width=40, elem_id="theme"),
            "new": gr.Button(size="sm", min_width=60, elem_id="new"),
        }
    transcript = gr.HTML(
        turns_as_parts([], language, folder, busy=False),
        html_template='<p class="empty"></p><div class="turns" role="log" tabindex="0"></div>',
        js_on_load=_script("transcript"),
        apply_default_css=False,
        elem_id="transcript",
    )
    quick = gr.HTML(js_on_load=_script("quickbar"), apply_default_css=False, elem_id="quick")
    with gr.Row(elem_id="ask"):
        box = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=["image"],
            max_plain_text_length=1_000_000,  # longer text would become a file, and files are pictures here
            max_lines=8,
            show_label=False,
            autofocus=True,
            elem_id="box",
            scale=1,
        )
        camera = gr.HTML(camera_html(language), js_on_load=_script("camera"), apply_default_css=False, elem_id="camera")
    return Parts(**state, **side, **head, transcript=transcript, quick=quick, box=box, camera=camera)


def _name(words: dict[gr.components.Component, dict[str, Any]]) -> None:
    """Before the page has told which language it wants: else it would say Dropdown, Slider and Run until the first answer."""
    for part, said in words.items():
        for name, text in said.items():
            setattr(part, name, text)  # what Gradio's own constructors set; the page's config is read from there


def _script(name: str) -> str:
    return (HERE / f"{name}.js").read_text(encoding="utf-8")


def camera_html(language: str) -> str:
    """A button and the dialog that it opens; camera.js does the rest."""
    take, cancel = say(language, "take_picture"), say(language, "cancel")
    opener = icon_button("camera", say(language, "camera"), 'data-do="open"')
    return (
        f'{opener}<dialog aria-label="{take}">'
        "<video autoplay playsinline muted></video>"
        f'<p class="trouble" role="alert" hidden>{say(language, "no_camera")} <span></span></p>'
        f'<button type="button" data-do="shoot">{take}</button> <button type="button" data-do="close">{cancel}</button></dialog>'
    )


def _settings(two: bool) -> dict[str, Any]:
    return {
        "heading": gr.HTML(),
        "model": gr.Dropdown([], elem_id="model"),
        "compare": gr.Checkbox(two, elem_id="compare"),
        "second": gr.Dropdown([], visible=two, elem_id="second"),
        "temperature": gr.Slider(0, 2, 0, step=0.05, elem_id="temperature"),
        "top_p": gr.Slider(0.05, 1, 1, step=0.05, elem_id="top-p"),
        "max_tokens": gr.Number(512, minimum=1, precision=0, elem_id="max-tokens"),
        "tiles": gr.Slider(0, 40, 0, step=1, elem_id="tiles"),
        "seed": gr.Textbox(max_lines=1, elem_id="seed"),  # a Number cannot be empty
        "system": gr.Textbox(lines=2, max_lines=8, elem_id="system"),
        "export_heading": gr.HTML(),
        "export_json": gr.Button(size="sm", elem_id="export-json"),
        "export_row": gr.Button(size="sm", elem_id="export-row"),
        "export_row_second": gr.Button(size="sm", visible=two, elem_id="export-row-second"),
        "file": gr.Textbox(visible=False),
    }


def _wire(blocks: gr.Blocks, parts: Parts, deeds: Deeds) -> None:
    """Each event and its deed. Answers run side by side, without a limit of ours: the server has its own."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    answering: dict[str, Any] = {**quiet, "concurrency_limit": None, "outputs": [parts.transcript, parts.box]}
    asking = [parts.talk, parts.language, *parts.settings]
    parts.box.submit(deeds.ask, [parts.box, *asking], **answering)
    parts.transcript.retry(deeds.retry, asking, **answering)
    parts.transcript.edit(deeds.edit, asking, **answering)
    parts.quick.select(
        deeds.quick,
        [parts.kind, parts.box, *asking],
        **{**answering, "outputs": [parts.transcript, parts.box, parts.quick, parts.kind]},
    )
    # Past the queue: a stop must not wait behind what it stops.
    at_once: dict[str, Any] = {**quiet, "queue": False}
    parts.box.stop(deeds.stop, [parts.talk], None, **at_once)
    parts.transcript.undo(deeds.undo, [parts.talk, parts.language], [parts.transcript, parts.box], **at_once)
    parts.transcript.input(deeds.correct, [parts.talk, parts.language], parts.transcript, **at_once)
    parts.new.click(deeds.new, [parts.talk, parts.language], [parts.transcript, parts.box], **quiet)
    columns = [parts.second, parts.export_row_second]
    parts.compare.change(deeds.compare, parts.compare, columns, **at_once)
    saved = [parts.talk, parts.language]
    for button, deed in (
        (parts.export_json, deeds.save_record),
        (parts.export_row, deeds.save_row),
        (parts.export_row_second, deeds.save_second_row),
    ):
        button.click(deed, saved, parts.file, **quiet).then(None, parts.file, None, js=DOWNLOAD, **quiet)
    spoken = list(parts.words("en"))
    views = [parts.transcript, parts.quick]
    parts.language.input(deeds.speak, [parts.language, parts.talk, parts.kind], [*spoken, *views], **quiet)
    parts.theme.click(None, None, None, js=TOGGLE_THEME, **quiet)
    blocks.load(None, None, None, js=OPENED, **quiet)
    blocks.load(deeds.greet, [parts.talk, parts.kind], [parts.language, *spoken, *views], **quiet)
    chosen = [parts.model, parts.second, parts.offered]
    look: dict[str, Any] = {"inputs": [parts.language, *chosen], "outputs": [parts.status, *chosen]}
    blocks.load(deeds.look, **look, **quiet)
    gr.Timer(POLL_S).tick(deeds.look, **look, **quiet)
