"""Reading a model folder: strict about names and shapes, cheap in memory, and clear about what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from tessella.checkpoint.read import load, load_model
from tessella.config import LanguageConfig, ModelConfig, VisionConfig, load_config
from tessella.errors import CheckpointError, ConfigError

LLAMA = "LlamaForCausalLM"
HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def edit(folder: Path, **changes: object) -> Path:
    """Change tensors of a single-file folder; None removes one."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            assert isinstance(tensor, torch.Tensor)
            state[name] = tensor.contiguous()
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_gives_back_the_weights_it_was_written_from(tmp_path: Path, architecture: str, sharded: bool) -> None:
    loaded = load(tiny.tiny_folder(tmp_path, architecture, seed=3, sharded=sharded), dtype="float32", device="cpu")
    wanted = tiny.tiny_model(tiny.tiny_config(architecture), seed=3)
    assert loaded.config == tiny.tiny_config(architecture)
    assert not loaded.unused and not loaded.model.training
    for (name, found), (_, weight) in zip(loaded.model.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(found, weight), name
    assert loaded.tokenizer.id_of("<|im_end|>") in loaded.stop_ids


def test_the_type_is_kept_or_cast_as_told(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path, LLAMA, dtype=torch.bfloat16)
    assert {weight.dtype for weight in load_model(folder)[0].parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in load_model(folder, dtype=torch.float32)[0].parameters()} == {torch.float32}


def test_writing_to_loaded_weights_never_writes_to_the_file(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path, LLAMA)
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_model(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_missing_and_unknown_tensors_are_both_named(tmp_path: Path) -> None:
    folder = edit(tiny.tiny_folder(tmp_path, LLAMA), **{"mlp1.3.bias": None, "mlp1.9.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"1 are missing: mlp1\.3\.bias; 1 are not known: mlp1\.9\.bias"):
        load_model(folder)


def test_a_wrong_shape_is_told_with_both_shapes(tmp_path: Path) -> None:
    folder = edit(tiny.tiny_folder(tmp_path, LLAMA), **{"mlp1.3.bias": torch.zeros(63)})
    with pytest.raises(CheckpointError, match=r"mlp1\.3\.bias is \(63,\), must be \(64,\)"):
        load_model(folder)


def test_computed_buffers_are_passed_over_and_listed(tmp_path: Path) -> None:
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    _, unused = load_model(edit(tiny.tiny_folder(tmp_path, LLAMA), **{name: torch.zeros(8)}))
    assert unused == (name,)


def test_an_unmerged_lora_in_the_weights_is_told_as_such(tmp_path: Path) -> None:
    name = "language_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(CheckpointError, match="unmerged LoRA"):
        load_model(edit(tiny.tiny_folder(tmp_path, LLAMA), **{name: torch.zeros(8, 8)}))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"quantised.*up_proj.*int8"):
        load_model(edit(tiny.tiny_folder(tmp_path, LLAMA), **{name: torch.zeros(96, 64, dtype=torch.int8)}))


def tied_folder(path: Path, head_offset: float | None) -> Path:
    """A tied folder; head_offset None stores no head, 0.0 an equal one, else one that differs."""
    folder = tiny.tiny_folder(path, LLAMA, config=tiny.tiny_config(LLAMA, tie_embeddings=True))
    if head_offset is not None:
        edit(folder, **{HEAD: load_file(folder / "model.safetensors")[TABLE] + head_offset})
    return folder


def test_a_tied_head_is_not_stored_passed_over_when_equal_and_believed_when_it_differs(tmp_path: Path) -> None:
    plain, unused = load_model(tied_folder(tmp_path / "a", None))
    assert plain.language_model.lm_head is None and not unused
    equal, unused = load_model(tied_folder(tmp_path / "b", 0.0))
    assert equal.language_model.lm_head is None and unused == (HEAD,)
    other, unused = load_model(tied_folder(tmp_path / "c", 0.5))
    assert other.language_model.lm_head is not None and not unused
    assert not other.config.language.tie_embeddings
    assert torch.equal(other.language_model.lm_head.weight, plain.language_model.model.embed_tokens.weight + 0.5)


def test_an_untied_folder_without_a_head_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: language_model\.lm_head\.weight"):
        load_model(edit(tiny.tiny_folder(tmp_path, LLAMA), **{HEAD: None}))


def test_a_shard_that_is_gone_or_at_odds_with_the_index_is_named(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path / "a", LLAMA, sharded=True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        load_model(folder)
    folder = tiny.tiny_folder(tmp_path / "b", LLAMA, sharded=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["mlp1.0.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"disagree about mlp1\.0\.weight"):
        load_model(folder)
    index["weight_map"]["mlp1.0.weight"] = "../b/model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names the shard"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match="no index"):
        load_model(folder)


def test_a_truncated_file_is_told(tmp_path: Path) -> None:
    folder = tiny.tiny_folder(tmp_path, LLAMA)
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load_model(folder)


def test_what_is_no_model_folder_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tessella-nano"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path)
    folder = tiny.tiny_folder(tmp_path / "m", LLAMA)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["llm_config"]["architectures"] = ["GptOssForCausalLM"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"GptOssForCausalLM.*InternLM2ForCausalLM.*Phi3ForCausalLM"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**raw, "architectures": ["PaliGemmaForConditionalGeneration"]}))
    with pytest.raises(ConfigError, match=r"PaliGemma.*InternVLChatModel.*InternVLForConditionalGeneration"):
        load(folder)


def big_config() -> ModelConfig:
    """About 330 MB in bfloat16, most of it in the decoder."""
    vocabulary = tiny.tiny_tokenizer().get_vocab_size()
    language = LanguageConfig("InternLM2ForCausalLM", vocabulary, 1024, 8192, 5, 8, 4, 128)
    vision = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, image_size_px=56)
    return ModelConfig(vision, language, "internlm2-chat", tile_size_px=56)


MEASURE = """
import sys, torch
from pathlib import Path
from tessella.checkpoint.read import load_model
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before, anonymous = status("VmRSS"), status("RssAnon")
model, _ = load_model(Path(sys.argv[1]), dtype=torch.bfloat16)
total = sum(int(weight.detach().view(torch.int16).flatten()[::1024].sum()) for weight in model.parameters())  # each page
assert "torch._dynamo" not in sys.modules, "laying out the model imported torch._dynamo: a second and 78 MB"
print(status("VmHWM") - before, status("RssAnon") - anonymous)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of resident memory is asked of Linux")
@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "LlamaForCausalLM"])
def test_a_bfloat16_folder_loads_without_a_second_copy_in_memory(tmp_path: Path, architecture: str) -> None:
    config = big_config()
    language = LanguageConfig(**{**vars(config.language), "architecture": architecture})
    config = ModelConfig(config.vision, language, config.template, tile_size_px=56)
    folder = tiny.tiny_folder(tmp_path / "big", architecture, dtype=torch.bfloat16, config=config)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 250e6
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory cannot be reset here")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    peak, anonymous = map(int, done.stdout.split())
    shutil.rmtree(tmp_path / "big")
    print(f"{architecture}: file {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, of that our own {anonymous / 1e6:.0f} MB")
    # One pass over the file; only InternLM2's wqkv (a ninth of it here) is copied, because its rows must be sorted.
    assert peak < 1.25 * size
    assert anonymous < 0.2 * size


def test_the_config_of_a_folder_is_the_one_it_was_written_with(tmp_path: Path) -> None:
    assert load_config(tiny.tiny_folder(tmp_path, "Qwen2ForCausalLM")) == tiny.tiny_config("Qwen2ForCausalLM")


@pytest.mark.parametrize(("section", "field"), [("llm_config", "num_hidden_layers"), ("vision_config", "hidden_size")])
def test_a_size_below_one_is_refused_by_name(tmp_path, section, field):
    folder = tiny.tiny_folder(tmp_path / "m", "LlamaForCausalLM")
    raw = json.loads((folder / "config.json").read_text())
    raw[section][field] = -4
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="is -4, must be at least 1"):
        load_config(folder)
