"""The native layout: there and back bit by bit, opened by transformers' own class, and folders that others wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from tessella.chat import Message, place_marks
from tessella.checkpoint.layout import native_config
from tessella.checkpoint.names import as_in_files, as_in_memory
from tessella.checkpoint.read import Loaded, load, load_model
from tessella.checkpoint.weights import entries_of
from tessella.checkpoint.write import KEPT, write_native, write_official
from tessella.config import (
    NATIVE_ROPE_THETA,
    NATIVE_TEXT_DEFAULTS,
    NATIVE_VISION_DEFAULTS,
    ModelConfig,
    load_config,
    model_config,
)
from tessella.errors import CheckpointError, ConfigError
from tessella.generate import all_logits, generate
from tessella.image import normalise
from tessella.inputs import ModelInput, Picture
from tessella.sampling import SamplingParams

DRAWING = torch.arange(140 * 300 * 3).reshape(140, 300, 3).remainder(251).to(torch.uint8)
QUESTION = "What is in this picture?"


def picture(max_tiles: int | None = None) -> Picture:
    return Picture(Image.fromarray(DRAWING.numpy()), max_tiles=max_tiles)


def write(base: Path, out: Path, layout: str, **options: Any) -> Path:
    model, _ = load_model(base)
    entries = entries_of({name: weight.detach() for name, weight in model.named_parameters()})
    end = tiny.tiny_tokenizer().token_to_id(tiny.TEMPLATES_BY_NAME[model.config.template].end)
    writer = write_native if layout == "native" else write_official
    return writer(entries, out, model.config, end_ids=[end], base_folder=base, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    one, two = tensors(a), tensors(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def base_of(path: Path, name: str, **options: Any) -> Path:
    return tiny.tiny_folder(path, tiny.FAMILIES[name], config=tiny.family(name), **options)


def prompts(loaded: Loaded) -> dict[str, ModelInput]:
    build = loaded.inputs.build
    two = [Message("user", place_marks(QUESTION, 2)), Message("assistant", "It is rice."), Message("user", "图中是什么？" * 8)]
    return {
        "text": build([Message("user", "What is the capital of France?")]),
        "one tile": build([Message("user", place_marks(QUESTION, 1))], [picture(1)]),
        "two pictures": build(two, [picture(1), picture(6)]),
    }


# ---- there and back


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_official_to_native_to_official_gives_the_same_tensors_and_files(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path / "base", name, sharded=name in ("Yi", "Phi-3"), dtype=torch.bfloat16)
    (base / "modeling_internvl_chat.py").write_text("raise SystemExit  # never run")
    edit_config(base, inherited=[1], llm_config__transformers_version="4.37.2")
    native = write(base, tmp_path / "native", "native")
    assert load_config(native) == load_config(base) and not same(base, native)
    back = write(native, tmp_path / "back", "official")
    assert same(base, back)
    for file in base.iterdir():
        if file.suffix == ".py" or (file.suffix == ".json" and "index" not in file.name):
            assert (back / file.name).read_text() == file.read_text() or json.loads((back / file.name).read_text()) == json.loads(
                file.read_text()
            ), file.name
    again = write(back, tmp_path / "again", "native", shard_bytes=100_000)
    assert same(native, again) and len(list(again.glob("*.safetensors"))) > 1


def test_the_way_back_works_without_the_kept_files_too(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "InternLM2")
    native = write(base, tmp_path / "native", "native")
    for file in (native / KEPT).iterdir():
        file.unlink()
    (native / KEPT).rmdir()
    back = write(native, tmp_path / "back", "official")
    assert same(base, back) and load_config(back) == load_config(base)
    assert load(back, device="cpu").inputs.stop_ids == load(base, device="cpu").inputs.stop_ids


def test_kept_files_of_another_model_are_not_believed(tmp_path: Path) -> None:
    native = write(base_of(tmp_path / "base", "Qwen2"), tmp_path / "native", "native")
    kept = json.loads((native / KEPT / "config.json").read_text())
    kept["llm_config"]["rope_theta"] = 5e6
    (native / KEPT / "config.json").write_text(json.dumps(kept))
    assert load_config(write(native, tmp_path / "back", "official")) == load_config(native)


# ---- transformers opens it


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_transformers_own_class_gives_our_logits_and_our_answer(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    folder = write(base_of(tmp_path / "base", name), tmp_path / "native", "native")
    ours = load(folder, device="cpu", dtype="float32")
    theirs, found = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    for one in prompts(ours).values():
        pixels = {"pixel_values": normalise(one.tiles, torch.float32)} if len(one.tiles) else {}
        with torch.inference_mode():
            wanted = theirs.eval()(input_ids=one.ids[None], **pixels).logits[0]
        assert wanted.std() > 0.5 and (all_logits(ours.model, one) - wanted).abs().max() < 1e-4
    theirs.generation_config.eos_token_id = None
    # Phi-3 turns by other angles beyond its original length: one answer within it, one beyond
    for which in ("text", "two pictures") if name == "Phi-3" else ("one tile",):
        one = prompts(ours)[which]
        pixels = {"pixel_values": normalise(one.tiles, torch.float32)} if len(one.tiles) else {}
        whole = theirs.generate(
            input_ids=one.ids[None], attention_mask=torch.ones_like(one.ids)[None], max_new_tokens=64,
            do_sample=False, pad_token_id=0, **pixels,
        )  # fmt: skip
        answer = list(generate(ours.model, one, SamplingParams(max_tokens=64), stop_ids=()))
        assert answer == whole[0, len(one) :].tolist() and len(set(answer)) > 3


def test_phi3_is_asked_within_its_original_length_and_beyond(tmp_path: Path) -> None:
    ours = load(base_of(tmp_path / "base", "Phi-3"), device="cpu", dtype="float32")
    asked = prompts(ours)
    assert len(asked["text"]) + 64 < tiny.LONG_ROPE.original_positions < len(asked["two pictures"])


@pytest.mark.parametrize("name", ["InternLM2", "Phi-3"])
def test_transformers_tokenizer_and_chat_template_give_our_prompt(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    folder = write(base_of(tmp_path / "base", name), tmp_path / "native", "native")
    ours = load(folder, device="cpu", dtype="float32")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Image-1: <image>\nWhat is it?"}, {"role": "assistant", "content": "It is rice."}]
    messages.append({"role": "user", "content": "图中是什么？"})
    one = ours.inputs.build([Message(**{"role": m["role"], "text": m["content"]}) for m in messages], [picture(1)])
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    named = (theirs.start_image_token, theirs.context_image_token, theirs.end_image_token)
    assert named == ("<img>", "<IMG_CONTEXT>", "</img>") and theirs.video_token == "<video>"
    slots = named[0] + named[1] * ours.config.slots_per_tile + named[2]
    found = theirs(text.replace(named[1], slots), add_special_tokens=False).input_ids
    assert found == one.ids.tolist()
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [
        theirs.convert_tokens_to_ids(ours.inputs.template.end)
    ]


# ---- folders that others wrote


@pytest.mark.parametrize("name", ["InternLM2", "Llama 3.1", "Qwen3", "Phi-3"])
def test_what_transformers_saves_again_is_read_alike(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    folder = write(base_of(tmp_path / "base", name), tmp_path / "native", "native")
    saved = tmp_path / "saved"
    transformers.InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).save_pretrained(saved)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert tensors(saved).keys() == tensors(folder).keys()  # the names that transformers itself writes
    ours, again = (load(path, device="cpu", dtype="float32") for path in (folder, saved))
    assert again.config == ours.config and again.stop_ids == ours.stop_ids
    for name, one in prompts(ours).items():
        assert torch.equal(prompts(again)[name].ids, one.ids)
        assert torch.equal(all_logits(again.model, one), all_logits(ours.model, one))


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = raw
        for part in sections:
            section = section[part]
        if value is None:
            section.pop(key, None)
        else:
            section[key] = value
    (folder / "config.json").write_text(json.dumps(raw))


def test_names_in_memory_are_read_too_but_not_both_at_once(tmp_path: Path) -> None:
    folder = write(base_of(tmp_path / "base", "Qwen2"), tmp_path / "native", "native")
    wanted, state = load_model(folder)[0], tensors(folder)
    in_memory = {as_in_memory(name): tensor for name, tensor in state.items()}
    assert "model.vision_tower.encoder.layer.1.lambda_1" in in_memory and "lm_head.weight" in in_memory
    assert {as_in_files(name) for name in in_memory} == state.keys()
    save_file(in_memory, folder / "model.safetensors")
    for (name, found), (_, weight) in zip(load_model(folder)[0].named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(found, weight), name
    twice = {**in_memory, "language_model.lm_head.weight": state["language_model.lm_head.weight"].clone()}
    save_file(twice, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="under two names"):
        load_model(folder)


def test_a_strangers_folder_gets_the_familys_prompt_and_its_own_architecture(tmp_path: Path) -> None:
    folder = write(base_of(tmp_path / "base", "InternLM2"), tmp_path / "native", "native")
    edit_config(folder, tessella=None)
    config = load_config(folder)
    assert (config.language.architecture, config.template) == ("LlamaForCausalLM", "internvl2_5")
    assert (config.min_tiles, config.max_tiles, config.use_thumbnail) == (1, 12, True)
    assert load_config(write(folder, tmp_path / "back", "official")) == config


@pytest.mark.parametrize("keys", ["rope_parameters", "rope_theta"], ids=["5.x alone", "4.x alone"])
@pytest.mark.parametrize("name", ["InternLM2", "Llama 3.1", "Qwen2", "Phi-3"])
def test_either_of_the_two_rope_key_sets_says_all(tmp_path: Path, name: str, keys: str) -> None:
    config = tiny.family(name)
    raw = native_config(config, "float32", image_token_id=7, end_id=8)
    text = raw["text_config"]
    left_out = ("rope_theta", "rope_scaling") if keys == "rope_parameters" else ("rope_parameters",)
    raw["text_config"] = {key: value for key, value in text.items() if key not in left_out}
    assert raw["text_config"].keys() < text.keys() and model_config(raw) == config


def test_a_rope_base_that_stands_there_twice_must_be_the_same(tmp_path: Path) -> None:
    raw = native_config(tiny.family("Qwen2"), "float32", image_token_id=7, end_id=8)
    raw["text_config"]["rope_theta"] = NATIVE_ROPE_THETA
    with pytest.raises(ConfigError, match=r"rope_theta is 10000\.0, but 1000000\.0 in rope_parameters"):
        model_config(raw)


def test_what_transformers_leaves_out_is_what_it_would_fill_in() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    vision = transformers.InternVLVisionConfig()
    assert {key: getattr(vision, key) for key in NATIVE_VISION_DEFAULTS} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in NATIVE_VISION_DEFAULTS.items()
    }
    for kind, values in NATIVE_TEXT_DEFAULTS.items():
        text = transformers.AutoConfig.for_model(kind)
        assert {key: getattr(text, key) for key in values} == values
        assert text.rope_parameters["rope_theta"] == NATIVE_ROPE_THETA


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["PaliGemmaForConditionalGeneration"]},
            r"PaliGemma.*InternVLChatModel.*InternVLForConditionalGeneration",
        ),
        ({"tessella": None, "text_config__model_type": "gpt_oss"}, r"gpt_oss \(text_config\.model_type\).*Qwen3ForCausalLM"),
        ({"tessella__architecture": "MambaForCausalLM"}, "MambaForCausalLM.*we can run InternLM2ForCausalLM"),
        ({"tessella__architecture": "InternLM2ForCausalLM"}, 'InternLM2ForCausalLM", but text_config.model_type is "qwen2"'),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        ({"vision_feature_select_strategy": "full"}, 'must be "default"'),
        ({"vision_config__use_mean_pooling": False}, "use_mean_pooling is False, must be True"),
        ({"vision_config__image_size": [56, 112]}, r"\[56, 112\], must be square"),
        ({"text_config__use_sliding_window": True, "text_config__sliding_window": 512}, "sliding_window is 512"),
        ({"text_config__partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ({"text_config__rope_scaling": {"type": "yarn", "factor": 4.0}}, 'type "yarn"'),
        ({"text_config__hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ],
    ids=str,
)
def test_a_native_config_that_we_cannot_run_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(native_config(tiny.family("Qwen2"), "float32", image_token_id=7, end_id=8)), encoding="utf-8"
    )
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"pixel_shuffle_version": "v1"}, "column by column"), ({"use_thumbnail": False}, "always adds the thumbnail")],
    ids=str,
)
def test_what_the_native_layout_cannot_say_is_refused(fields: dict[str, Any], message: str) -> None:
    config = ModelConfig(**{**vars(tiny.family("InternLM2")), **fields})
    with pytest.raises(ConfigError, match=message):
        native_config(config, "float32", image_token_id=7, end_id=8)


def test_a_model_of_one_tile_keeps_what_it_says_of_the_thumbnail() -> None:
    config = ModelConfig(**{**vars(tiny.family("InternLM2")), "use_thumbnail": False, "max_tiles": 1})
    assert model_config(native_config(config, "float32", image_token_id=7, end_id=8)) == config


def test_weights_of_the_other_layout_are_told(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "Qwen2")
    native = write(base, tmp_path / "native", "native")
    (native / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"native layout.*missing: vision_tower.*not known: mlp1\."):
        load_model(native)
