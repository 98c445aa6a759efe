"""LLaVA-1.5, LLaVA-NeXT, BLIP-2 and InstructBLIP with a Llama, against transformers: pixels, slots, logits, greedy ids, files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from relatives import NAMES, POINTS, SIDE, WORDS, processor_of, relative
from relatives import PATCH as PATCH_PX
from tessella import cli
from tessella.chat import Message, place_marks, render, template_named, text_of
from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.proof import prove
from tessella.checkpoint.read import Loaded, load, load_model
from tessella.checkpoint.source import open_source
from tessella.config import load_config, model_config
from tessella.errors import CheckpointError, ConfigError, ContextError, PromptError
from tessella.generate import all_logits, generate, generate_batch, visual_tokens
from tessella.geometry import Grid, Size, fitted, roomiest_grid, window_of
from tessella.image import TileRule, cut_tiles, normalise
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.sampling import SamplingParams
from tessella.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

QUESTION = "What is in this picture?"
# width, height: square, wide, high, a strip, a column, small, and sides that divide nothing
SIZES = [(100, 100), (300, 140), (90, 201), (400, 31), (23, 500), (20, 17), (113, 57)]


def picture(width: int, height: int) -> Image.Image:
    """Every pixel another colour than its neighbours."""
    values = torch.arange(width * height * 3).reshape(height, width, 3).mul(37).remainder(251).to(torch.uint8)
    return Image.fromarray(values.numpy())


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Loaded, Any]:
    folder, theirs = relative(tmp_path_factory.mktemp("relative") / "model", request.param)
    return request.param, load(folder, device="cpu", dtype="float32"), theirs


def ask(loaded: Loaded, *sizes: tuple[int, int], max_tiles: int | None = None) -> ModelInput:
    pictures = [Picture(picture(*size), max_tiles) for size in sizes]
    return loaded.inputs.build([Message("user", place_marks(QUESTION, len(pictures)))], pictures)


def fed(name: str, one: ModelInput, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """What transformers' model is given, from its own image processor."""
    given = processor_of(name)([picture(*size) for size in sizes], return_tensors="pt")
    if name == "instructblip":
        asked = place_marks(QUESTION, len(sizes)).replace("<image>", "").strip()
        words = tokens_of_questions()([asked] * len(sizes), return_tensors="pt")
        given |= {"qformer_input_ids": words["input_ids"], "qformer_attention_mask": words["attention_mask"]}
    return {"input_ids": one.ids[None], **given}


def tokens_of_questions() -> Any:
    """transformers' tokenizer of the words that the Q-Former reads."""
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


CASES = {
    "one": [(100, 100)],
    "two": [(300, 140), (90, 201)],
    "a strip": [(400, 31)],
    "a column": [(23, 500)],
    "small": [(20, 17)],
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(pair: tuple[str, Loaded, Any], case: str) -> None:
    name, ours, theirs = pair
    one = ask(ours, *CASES[case])
    with torch.inference_mode():
        wanted = theirs(**fed(name, one, CASES[case])).logits[0]
    assert wanted.std() > 0.3 and (all_logits(ours.model, one) - wanted).abs().max() < 1e-4


def test_greedy_ids_equal_transformers_over_64_tokens(pair: tuple[str, Loaded, Any]) -> None:
    name, ours, theirs = pair
    theirs.generation_config.eos_token_id = None
    for sizes in (CASES["one"], CASES["two"]):
        one = ask(ours, *sizes)
        mask = torch.ones_like(one.ids)[None]
        whole = theirs.generate(**fed(name, one, sizes), attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
        answer = list(generate(ours.model, one, SamplingParams(max_tokens=64), stop_ids=()))
        assert answer == whole[0, len(one) :].tolist() and len(set(answer)) > 3


def test_pixels_and_slots_equal_transformers_processor(pair: tuple[str, Loaded, Any]) -> None:
    name, ours, _ = pair
    for size in SIZES:
        one = ask(ours, size)
        given = processor_of(name)([picture(*size)], return_tensors="pt")
        pixels = given["pixel_values"].flatten(0, -4)
        assert (normalise(one.tiles, torch.float32, "clip") - pixels).abs().max() < 1e-5, size
        assert int(one.slots.sum()) == ours.inputs.slots_of(*size)
        if "next" in name:
            from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

            counter = LlavaNextProcessor.__new__(LlavaNextProcessor)  # its arithmetic alone, without a tokenizer
            counter.image_processor, counter.patch_size, counter.num_additional_image_tokens = processor_of(name), 14, 0
            assert ours.inputs.slots_of(*size) == counter._get_number_of_features(size[1], size[0], SIDE, SIDE), size


def test_rows_answer_alike_alone_and_together(pair: tuple[str, Loaded, Any]) -> None:
    _, ours, _ = pair
    rows = [ask(ours, (300, 140)), ours.inputs.build([Message("user", "Hello")]), ask(ours, (20, 17), (23, 500))]
    params = SamplingParams(max_tokens=8)
    assert generate_batch(ours.model, rows, params, ()) == [list(generate(ours.model, row, params, ())) for row in rows]


def test_a_question_changes_what_instructblip_sees(tmp_path: Path) -> None:
    """The same picture with another question: other visual tokens, another digest, and both right side by side."""
    folder, _ = relative(tmp_path / "model", "instructblip")
    ours = load(folder, device="cpu", dtype="float32")
    rows = [ours.inputs.build([Message("user", f"<image>\n{text}")], [Picture(picture(90, 90))]) for text in ("what?", "picture")]
    assert rows[0].digests != rows[1].digests and rows[0].questions != rows[1].questions
    seen = visual_tokens(ours.model, rows)
    assert seen is not None and (seen[0] - seen[1]).abs().max() > 0.01
    alone = [visual_tokens(ours.model, [row]) for row in rows]
    assert all(one is not None and torch.allclose(one[0], both, atol=1e-5) for one, both in zip(alone, seen, strict=True))
    with pytest.raises(PromptError, match="at most 512"):
        ours.inputs.build([Message("user", "<image>\n" + "picture " * 600)], [Picture(picture(90, 90))])
    (folder / "qformer_tokenizer" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)
    (folder / "qformer_tokenizer" / "tokenizer.json").unlink()
    (folder / "qformer_tokenizer" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="qformer_tokenizer"):
        load(folder)


def test_fewer_tiles_are_honoured(pair: tuple[str, Loaded, Any]) -> None:
    name, ours, _ = pair
    for most in (1, 2, 4):
        one = ask(ours, (300, 290), max_tiles=most)
        expected = most + 1 if "next" in name and most > 1 else 1
        assert len(one.tiles) == expected
        assert torch.isfinite(all_logits(ours.model, one)).all()


# ---- both ways


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_a_folder_is_written_back_and_read_by_transformers_alike(pair: tuple[str, Loaded, Any], tmp_path: Path) -> None:
    name, ours, theirs = pair
    done = convert(ours.folder, tmp_path / "back", Wish(to="native"))
    assert done.proof.holds and done.proof.logits is None
    again, found = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    one = convert(tmp_path / "back", tmp_path / "again", Wish(to="native"))
    assert one.proof.holds
    was, now = tensors(tmp_path / "back"), tensors(tmp_path / "again")
    assert was.keys() == now.keys() and all(torch.equal(was[key], now[key]) for key in was)
    if not name.endswith("blip") and name != "blip2":
        assert "vision_tower.vision_model.pre_layrnorm.weight" in was  # the form of the published folders
    for file in ("preprocessor_config.json", "tokenizer.json", "config.json"):
        assert json.loads((tmp_path / "again" / file).read_text()) == json.loads((tmp_path / "back" / file).read_text())


def test_names_in_memory_are_read_too(pair: tuple[str, Loaded, Any], tmp_path: Path) -> None:
    _, ours, theirs = pair
    (tmp_path / "config.json").write_text((ours.folder / "config.json").read_text())
    save_file({key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    model, unused = load_model(tmp_path)
    assert not unused
    state = ours.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_an_adapter_under_transformers_names_finds_its_layers(pair: tuple[str, Loaded, Any], tmp_path: Path) -> None:
    _, ours, theirs = pair
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "down_proj", "linear_2", "fc1"], init_lora_weights=False
    )
    name, fresh = type(theirs), relative(tmp_path / "base", pair[0])[1]
    taught = peft.get_peft_model(fresh, config)
    taught.peft_config["default"].base_model_name_or_path = str(ours.folder)
    taught.save_pretrained(tmp_path / "adapter")
    merged = convert(tmp_path / "adapter", tmp_path / "merged", Wish(to="native"))
    assert merged.proof.holds
    wanted, again = taught.merge_and_unload().state_dict(), name.from_pretrained(tmp_path / "merged").state_dict()
    assert wanted.keys() == again.keys()
    assert all((wanted[key] - again[key]).abs().max() < 1e-5 for key in wanted)
    there = convert(tmp_path / "adapter", tmp_path / "ours", Wish(to="adapter"))
    back = convert(tmp_path / "ours", tmp_path / "theirs", Wish(to="adapter", names="native"))
    assert there.proof.holds and back.proof.holds
    assert prove(open_source(tmp_path / "adapter"), open_source(tmp_path / "theirs"), mode="logits").holds
    was, now = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("adapter", "theirs"))
    assert was.keys() == now.keys() | (was.keys() - now.keys()) and len(now) == len(was)


def test_a_projector_taught_whole_goes_with_its_adapter(pair: tuple[str, Loaded, Any], tmp_path: Path) -> None:
    _, ours, _ = pair
    state = {f"mlp1.{key}": weight.detach() + 0.05 for key, weight in ours.model.mlp1.named_parameters()}
    save_adapter(tmp_path / "adapter", state, AdapterSettings(str(ours.folder), 2, 4, modules_to_save=("mlp1",)))
    done = convert(tmp_path / "adapter", tmp_path / "merged", Wish(to="native"))
    assert done.proof.holds and done.replaced_tensors == len(state)


def test_the_official_layout_is_refused_with_the_reason(pair: tuple[str, Loaded, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can say neither its tower.*--to native"):
        convert(pair[1].folder, tmp_path / "out", Wish(to="official"))
    assert not (tmp_path / "out").exists()


# ---- every command, nothing special typed


def test_each_command_works(pair: tuple[str, Loaded, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(pair[1].folder)
    for kind, size in (("lime", (120, 60)), ("tomato", (60, 130))):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(3):
            picture(size[0] + number, size[1]).save(tmp_path / "photos" / kind / f"{number}.png")
    shown = str(tmp_path / "photos" / "lime" / "0.png")
    assert cli.main(["chat", folder, "--image", shown, QUESTION, "--max-tokens", "4", "--device", "cpu"]) == 0
    assert cli.main(["inspect", folder, "--device", "cpu", "--json", str(tmp_path / "model.json")]) == 0
    looked = ["inspect", shown, "--model", folder, "--output", str(tmp_path / "tiles.png"), "--json", str(tmp_path / "seen.json")]
    assert cli.main(looked) == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["visual_tokens"] == pair[1].inputs.slots_of(120, 60)
    if pair[0] != NAMES[-1]:  # the rest takes its time, and was run once for each of them
        return
    pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")
    run = ["finetune", "--model", folder, "--data", str(tmp_path / "photos"), "--output", str(tmp_path / "run")]
    run += ["--epochs", "1", "--lora-rank", "2", "--samples-per-step", "3", "--no-tensorboard", "--device", "cpu"]
    speed = ["--held-out", "0.34"]
    assert cli.main([*run, *speed, "--json", str(tmp_path / "run.json")]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["finished"]
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "mine"), "--to", "native"]) == 0
    scored = ["evaluate", folder, str(tmp_path / "mine"), "--recipe", str(tmp_path / "run" / "recipe.toml")]
    assert cli.main([*scored, "--output", str(tmp_path / "scores"), "--device", "cpu"]) == 0
    assert "95 % interval" in capsys.readouterr().out


def test_teaching_sees_what_answering_sees(pair: tuple[str, Loaded, Any]) -> None:
    pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")
    from tessella.train.batch import pack
    from tessella.train.passes import Passes
    from tessella.train.recipe import Recipe

    _, ours, _ = pair
    talk, sizes = [Message("user", f"<image>\n{QUESTION}"), Message("assistant", "rice")], ((300, 140), (23, 500))
    rows = [ours.inputs.build(talk, [Picture(picture(*size))], open_turn=False) for size in sizes]
    expected = torch.tensor(0.0)
    for row in rows:
        logits, learned = all_logits(ours.model, row)[:-1], row.learn[1:]
        expected += torch.nn.functional.cross_entropy(logits[learned], row.ids[1:][learned], reduction="sum")
    cached_rows = Recipe(model="", projector="frozen", lora_layers=1)
    for recipe in (Recipe(model="", tower="frozen"), Recipe(model="", tower="lora"), cached_rows):
        passes = Passes(ours.model, recipe)
        assert abs(float(passes.loss(pack(rows)).detach()) - float(expected)) < 1e-3


# ---- prompts


def test_prompts_are_those_that_the_models_were_trained_with() -> None:
    talk = [Message("user", "<image>\nWhat?"), Message("assistant", "Rice."), Message("user", "Why?")]
    system = template_named("vicuna_v1").default_system
    assert text_of(render(talk, template_named("vicuna_v1"), open_turn=True)) == (
        f"{system} USER: <image>\nWhat? ASSISTANT:Rice.</s>USER: Why? ASSISTANT:"
    )
    assert text_of(render(talk, template_named("mistral_instruct"), open_turn=True)) == (
        "[INST] <image>\nWhat? [/INST]Rice.</s>[INST] Why? [/INST]"
    )


def test_prompts_have_the_ids_that_a_llama_tokenizer_gives_the_whole_text(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ours are encoded piece by piece; Vicuna's and Mistral's tokenizers put a space in front of each stretch of text."""
    talk = [Message("user", "<image>\nWhat is it?"), Message("assistant", "Rice, I think."), Message("user", "Why?")]
    whole = {
        "vicuna_v1": "{system} USER: <image>\nWhat is it? ASSISTANT: Rice, I think.</s>USER: Why? ASSISTANT:",
        "mistral_instruct": "[INST] <image>\nWhat is it? [/INST] Rice, I think.</s>[INST] Why? [/INST]",
    }
    made = llama_tokenizer([template_named("vicuna_v1").default_system, *whole.values(), "Rice, I think. What is it? Why?"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
    config = load_config(written(tmp_path_factory))
    for name, text in whole.items():
        inputs = Inputs(replace(config, template=name), Tokenizer.load(tmp_path))
        one = inputs.build(talk, [Picture(picture(60, 60))])
        text = text.format(system=inputs.template.default_system).replace("<image>", "<image>" * int(one.slots.sum()))
        assert one.ids.tolist() == [made.token_to_id("<s>"), *made.encode(text).ids], name


def llama_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """BPE over words that begin with U+2581, set in front of each stretch between special tokens, as Llama's."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", "<image>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    made.pre_tokenizer = None
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


# ---- published models, from configs as sparse as theirs

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"image_size": 336, "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 768, "vocab_size": 32000}
VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
MISTRAL = {"model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8}
MISTRAL |= {"rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064}


@pytest.mark.parametrize(
    ("architecture", "text", "parameters", "template"),
    [
        ("LlavaForConditionalGeneration", VICUNA, 7_063_427_072, "vicuna_v1"),
        ("LlavaNextForConditionalGeneration", VICUNA, 7_063_431_168, "vicuna_v1"),
        ("LlavaNextForConditionalGeneration", MISTRAL, 7_566_747_648, "mistral_instruct"),
    ],
)
def test_published_sizes_are_met(architecture: str, text: dict[str, Any], parameters: int, template: str) -> None:
    config = model_config({"architectures": [architecture], "vision_config": CLIP_L, "text_config": text})
    assert sum(weight.numel() for weight in blank_model(config).parameters()) == parameters
    assert (
        config.template == template and config.slots_per_tile == 576 and config.language.rope_theta == text.get("rope_theta", 1e4)
    )
    if architecture.startswith("LlavaNext"):
        assert config.grids == ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)) and config.max_tiles == 4


def test_instructblip_has_the_published_size_and_its_prompt_begins_with_the_picture() -> None:
    text = {"model_type": "llama", "rms_norm_eps": 1e-06, "vocab_size": 32001}
    raw = {"architectures": ["InstructBlipForConditionalGeneration"], "vision_config": {}, "text_config": text}
    config = model_config({**raw, "qformer_config": {"vocab_size": 30523}})
    assert config.reads_question and config.slots_per_tile == 32
    connector = sum(weight.numel() for weight in blank_model(config).mlp1.parameters())
    assert connector - (768 * 4096 + 4096) == pytest.approx(185.7e6, abs=2e5)  # BERT-base's text half beside BLIP-2's 105.1 M
    talk = [Message("user", "<image>\nWhat?"), Message("assistant", "Rice."), Message("user", "Why?")]
    assert text_of(render(talk, template_named("instructblip"), open_turn=True)) == "<image>What?Rice.</s>Why?"


def test_eva_and_the_whole_of_a_minigpt4_have_the_published_sizes() -> None:
    text = {"model_type": "llama", "rms_norm_eps": 1e-06, "vocab_size": 32001}
    raw = {"architectures": ["Blip2ForConditionalGeneration"], "vision_config": {}, "qformer_config": {}, "text_config": text}
    model = blank_model(model_config(raw))
    tower, connector = (sum(w.numel() for w in part.parameters()) for part in (model.vision_model, model.mlp1))
    assert tower == 985_952_256 and model.config.slots_per_tile == 32
    assert connector - (768 * 4096 + 4096) == pytest.approx(105.1e6, abs=1e5)  # without the linear layer


# ---- the rules by themselves


def test_the_roomiest_grid_equals_transformers_choice() -> None:
    from transformers.image_processing_utils import select_best_resolution

    grids = [Grid(width // SIDE, height // SIDE) for height, width in POINTS]
    for width in (1, 7, 56, 57, 111, 300, 1000):
        for height in (1, 9, 56, 100, 112, 225, 700):
            best = select_best_resolution((height, width), POINTS)
            assert roomiest_grid(Size(width, height), grids, SIDE) == Grid(best[1] // SIDE, best[0] // SIDE), (width, height)


def test_a_window_shows_the_picture_and_no_more_padding_than_half_a_patch() -> None:
    for size in SIZES:
        for grid in (Grid(2, 2), Grid(4, 1), Grid(1, 3)):
            window, room = window_of(Size(*size), grid, 4), Size(grid.columns * SIDE, grid.rows * SIDE)
            shown = fitted(Size(*size), room)
            assert abs(window.rows * PATCH_PX - shown.height_px) <= 2 * PATCH_PX
            assert abs(window.columns * PATCH_PX - shown.width_px) <= 2 * PATCH_PX
            assert 2 * window.top + window.rows == 4 * grid.rows and 2 * window.left + window.columns == 4 * grid.columns


def test_the_whole_picture_is_the_first_tile_and_the_rest_is_padded_with_black() -> None:
    image = Image.new("RGB", (200, 50), "white")
    tiles = cut_tiles(image, TileRule(SIDE, max_tiles=4, kind="anyres", grids=(Grid(2, 2),)))
    assert tiles.whole == 0 and len(tiles.pixels) == 5
    assert (tiles.pixels[0] == 255).all()
    assert (tiles.pixels[1, :, 0] == 0).all() and (tiles.pixels[1, :, -1] == 255).all()


# ---- bad input


def changed(folder: Path, out: Path, **changes: Any) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            raw[part][inner] = value
        else:
            raw[part] = value
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(raw))
    return out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_grid_pinpoints": [[56, 100]]}, r"\[56, 100\].*multiple of the tile's 56 px"),
        ({"image_grid_pinpoints": [[0, 56]]}, r"\[0, 56\]"),
        ({"projector_hidden_act": "relu"}, 'projector_hidden_act is "relu"'),
        ({"vision_feature_select_strategy": "full"}, 'must be "default"'),
        ({"vision_feature_layer": [-2, -1]}, "must be one number"),
        ({"vision_feature_layer": -9}, "select_layer is -9"),
        ({"vision_config__model_type": "siglip_vision_model"}, "siglip"),
        ({"vision_config__hidden_act": "relu"}, 'hidden_act is "relu"'),
        ({"text_config__model_type": "opt"}, '"opt"; we can run llama, mistral'),
        ({"text_config__vocab_size": 64_000, "text_config__model_type": "llama"}, "Yi's vocabulary"),
        ({"text_config__sliding_window": 4096, "text_config__model_type": "mistral"}, "sliding_window is 4096"),
        ({"architectures": ["Blip3"]}, "LlavaNextForConditionalGeneration"),
    ],
    ids=str,
)
def test_a_config_that_we_cannot_run_is_refused_by_name(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], told: str
) -> None:
    folder = written(tmp_path_factory)
    with pytest.raises(ConfigError, match=told):
        load_config(changed(folder, tmp_path, **changes))


WRITTEN: list[Path] = []


def written(factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT folder, made once."""
    if not WRITTEN:
        WRITTEN.append(relative(factory.mktemp("written") / "model", "llava next mistral")[0])
    return WRITTEN[0]


def test_a_projector_that_does_not_fit_is_told(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = written(tmp_path_factory)
    changed(folder, tmp_path)
    state = load_file(folder / "model.safetensors")
    state["multi_modal_projector.linear_1.weight"] = torch.zeros(64, 40)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"multi_modal_projector.linear_1.weight is \(64, 40\), must be \(64, 32\)"):
        load_model(tmp_path)


def test_too_many_windows_are_told_with_a_way_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = written(tmp_path_factory)
    inputs = Inputs(load_config(folder), Tokenizer.load(folder), context_tokens=100)
    with pytest.raises(ContextError, match=r"at most 100: fewer tiles, or --max-tiles 2"):
        inputs.build([Message("user", "<image>\nWhat?")], [Picture(picture(300, 290))])
