"""What a routed model shows: in the terminal, after conversion, with decoders missing; and pictures by diffusion."""

import io
import json
import queue
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tessella import cli
from tessella.chat import Message
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.read import Loaded, load
from tessella.checkpoint.routing import write_routing
from tessella.decode import Shown, decode_routed
from tessella.engine.engine import Engine
from tessella.engine.request import Piece, Request
from tessella.errors import CheckpointError, ConfigError, EngineError
from tessella.inputs import Picture
from tessella.model.decoders.boxes import BoxConfig, BoxDecoder, Found
from tessella.model.routing import Routed, Routing
from tessella.routes import routes_for
from tessella.sampling import SamplingParams
from tessella.server.plain import PlainEngine
from tessella.showing import Files, show
from tessella.terminal import Talk, answer_once
from tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a routing/ folder; it says "[DET]" first whatever it is asked."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny") / "model", "LlamaForCausalLM", 0)
    plain = load(folder, device="cpu", dtype="float32")
    width = plain.config.language.hidden_size
    routing = Routing(routes_for(plain.config.language.vocab_size), width)
    table = plain.model.language_model.model.embed_tokens.weight
    routing.begin(table, table, torch.Generator().manual_seed(0))
    routing.boxes = BoxDecoder(BoxConfig(width, plain.config.vision.hidden_size, (1, 2), width=24, heads=2, layers=1, objects=4))
    talk = Talk(plain, SamplingParams(max_tokens=1))
    list(talk.ask("what is it?", []))
    with torch.no_grad():  # every hidden state says it: the head points where the states' mean does
        one = plain.inputs.build([*talk.messages[:1]])
        hidden = plain.model(plain.model.embed_text(one.ids), torch.arange(len(one)), _causal(len(one)), len(one))
        routing.head[0] = 3 * hidden[-1]
    write_routing(folder, routing)
    return folder


def _causal(length: int):  # type: ignore[no-untyped-def]
    from tessella.model.attend import Causal

    return Causal([length])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dish.png"
    Image.new("RGB", (120, 60), "orange").save(path)
    return path


def asked(loaded: Loaded, picture: Path | None) -> tuple[str, Talk]:
    talk, out = Talk(loaded, SamplingParams(max_tokens=12)), io.StringIO()
    answer_once(talk, "what is it?", [] if picture is None else [picture], out)
    return out.getvalue(), talk


def test_chat_tells_what_was_found_and_writes_it_beside_the_picture(folder: Path, picture: Path, tmp_path: Path) -> None:
    printed, _ = asked(load(folder, device="cpu", dtype="float32"), None)
    assert "[DET]" in printed and "there is no picture to look for it in" in printed
    mask = torch.zeros((60, 120), dtype=torch.bool)
    mask[10:50, 20:90] = True
    shown = [Shown("[DET]", "apple", (Found((0.1, 0.1, 0.8, 0.9), 0.93, mask),)), Shown("[DET]", "pear")]
    files = Files(picture, 2)
    lines = show("apple[DET], pear[DET]", shown, files)
    assert lines[0] == "1  apple  [100, 100, 800, 900]  93%" and lines[1] == "[DET] pear: nothing found"
    assert sorted(path.name for path in tmp_path.glob("*answer2*")) == ["dish-answer2-boxes.png", "dish-answer2-mask1.png"]
    written = Image.open(tmp_path / "dish-answer2-mask1.png")
    assert written.size == (120, 60) and written.getpixel((50, 30)) == 255 and written.getpixel((0, 0)) == 0


def test_boxes_in_words_are_drawn_too(picture: Path) -> None:
    lines = show("<ref>dish</ref><box>[[10, 10, 500, 900]]</box>", [], Files(picture, 1))
    assert lines == [f"written: {picture.parent / 'dish-answer1-boxes.png'}"]


def test_what_an_earlier_sitting_wrote_stays(picture: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    first = Files(picture, 1)
    first.save(image, "boxes")
    first.save(image, "mask1")
    assert Path(Files(picture, 1).save(image, "boxes")).name == "dish-answer2-boxes.png"
    assert sorted(path.name for path in picture.parent.glob("*-answer1-*")) == [
        "dish-answer1-boxes.png",
        "dish-answer1-mask1.png",
    ]


def test_a_folder_that_takes_no_file_is_told_and_the_words_stand(tmp_path: Path) -> None:
    lines = show("", [Shown("[GEN]", "apple", picture=Image.new("RGB", (8, 8)))], Files(tmp_path / "gone" / "dish.png", 1))
    assert "apple: a picture of 8 x 8 px" in lines[0] and "cannot be written" in lines[1]


def test_a_missing_decoder_is_a_sentence_and_the_words_still_come(folder: Path, picture: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "routing" / "boxes.safetensors").unlink()
    printed, talk = asked(load(copy, device="cpu", dtype="float32"), None)
    assert "[DET]" in printed and "boxes.safetensors is missing" in printed
    assert talk.turns[0].routed[0]["trouble"]


def test_a_token_whose_queries_found_no_room_is_told(folder: Path) -> None:
    loaded = load(folder, device="cpu", dtype="float32")
    talk, out = Talk(loaded, SamplingParams(max_tokens=3)), io.StringIO()
    answer_once(talk, "what is it?", [], out)
    assert "no room was left for its 4 queries" in out.getvalue() and "--max-tokens" in out.getvalue()


def test_conversion_carries_routing_along_and_proves_it(folder: Path, tmp_path: Path) -> None:
    there = convert(folder, tmp_path / "native", Wish(to="native"))
    assert there.proof.routing is not None and there.proof.routing.tensors > 3 and not there.proof.routing.differing
    convert(tmp_path / "native", tmp_path / "back")
    for name in ("tokens", "boxes"):
        file = Path("routing") / f"{name}.safetensors"
        assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes()
    shutil.rmtree(tmp_path / "back" / "routing")
    assert cli.main(["verify", str(folder), str(tmp_path / "back"), "--device", "cpu"]) == 1


def test_a_routing_folder_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "routing" / "routing.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "first_id": 77}))
    with pytest.raises(CheckpointError, match="77 rows"):
        load(copy, device="cpu")


def test_the_engine_refuses_a_routed_model_by_name(folder: Path) -> None:
    loaded = load(folder, device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="super-link queries"):
        Engine(loaded.model, loaded.tokenizer)


def pieces_of(engine: PlainEngine, loaded: Loaded, text: str = "what is it?", **more: object) -> list[Piece]:
    """All pieces of one answer."""
    come: queue.Queue[Piece] = queue.Queue()
    prompt = loaded.inputs.build([Message("user", text)])
    params = SamplingParams(max_tokens=12)
    engine.submit(Request(prompt, params, loaded.stop_ids, **more), come.put)  # type: ignore[arg-type]
    pieces = [come.get(timeout=200)]
    while pieces[-1].finish is None:
        pieces.append(come.get(timeout=200))
    return pieces


def test_a_routed_model_is_served_the_plain_way_and_says_what_it_cannot(folder: Path) -> None:
    loaded = load(folder, device="cpu", dtype="float32")
    engine = PlainEngine(loaded, max_waiting=4)
    engine.start()
    try:
        last = pieces_of(engine, loaded)[-1]
        assert last.finish == "length" and last.usage is not None and last.shown
        assert last.shown[0]["route"] == "[DET]" and "no picture" in last.shown[0]["trouble"]
        with pytest.raises(EngineError, match="without adapters"):
            pieces_of(engine, loaded, adapter="food")
        assert engine.state().length == 1 and engine.state().alive
    finally:
        engine.stop()
    with pytest.raises(EngineError, match="stopped"):
        pieces_of(engine, loaded)


def test_the_page_takes_boxes_masks_and_pictures_and_leaves_what_is_odd() -> None:
    pytest.importorskip("gradio")
    from tessella.ui.boxes import routed_in
    from tessella.ui.conversation import Answer, Settings
    from tessella.ui.transcript import _drawing

    mask = {"size": [2, 2], "counts": [1, 2, 1]}
    sound = {"label": "apple", "objects": [{"box": [0, 0, 500, 500], "score": 0.9, "mask": mask}]}
    odd = {
        "label": "pear",
        "objects": [{"box": [1, 2], "mask": mask}, {"box": [1, 2, 3, 4], "mask": {"size": [9, 9], "counts": [1]}}],
    }
    found = routed_in([sound, odd, {"picture": "data:image/png;base64,AAAA"}, {"picture": "http://elsewhere/x.png"}])
    assert [box.label for box in found.boxes] == ["apple"] and found.masks[0].tolist() == [[False, True], [True, False]]
    assert found.pictures == ["data:image/png;base64,AAAA"]
    why = [{"objects": [], "trouble": "the decoder is <not> there"}] * 2
    answer = Answer("a", Settings(), "apple[DET]", "stop", routed=[*why, {"picture": "data:image/png;base64,AAAA"}])
    html = _drawing([], answer, "en", Path())
    assert html.count("the decoder is &lt;not&gt; there") == 1 and 'alt="A picture that the model drew"' in html


def test_the_decoder_looks_at_the_last_picture_and_gives_masks_of_its_size(folder: Path, picture: Path) -> None:
    loaded = load(folder, device="cpu", dtype="float32")
    prompt = loaded.inputs.build([Message("user", "<image>\nDetect it.")], [Picture(picture)])
    det, grd = (loaded.tokenizer.routes.named(name) for name in ("[DET]", "[GRD]"))
    width = loaded.config.language.hidden_size
    routed = [Routed(0, route, said, torch.randn(4, width)) for said, route in ((1, det), (2, grd))]
    shown = decode_routed(loaded.model, loaded.tokenizer, prompt, [det.token_id, grd.token_id], routed, (120, 60), sure=0.0)
    assert not shown[0].trouble and shown[0].objects and len(shown[1].objects) <= 1
    assert all(one.mask.shape == (60, 120) and min(one.box) >= 0 and max(one.box) <= 1 for one in shown[0].objects)
    rows = shown[0].as_json()["objects"]
    assert sum(rows[0]["mask"]["counts"]) == 60 * 120 and len(rows[0]["box"]) == 4
