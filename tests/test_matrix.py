"""`make matrix` measures what it says: on a tiny native folder and the transformers that is here, and it notices a fault."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from matrix import run
from tessella.checkpoint.weights import entries_of
from tessella.checkpoint.write import write_native

ENDING = 3


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("matrix")
    config = tiny.family("InternLM2")
    base = tiny.tiny_folder(place / "official", "InternLM2ForCausalLM")
    parameters = entries_of(dict(tiny.tiny_model(config).named_parameters()), torch.float32)
    return write_native(parameters, place / "native", config, end_ids=[ENDING], base_folder=base)


@pytest.fixture(scope="module")
def truth(native: Path) -> Path:
    folder = native.parent / "truth"
    run.write_truth(native, folder, answer_tokens=4)
    return folder


def test_a_native_folder_gives_the_same_ids_and_logits_in_the_transformers_that_is_here(native: Path, truth: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is what is compared with; PEFT brings it")
    from matrix.probe import compare  # needs transformers

    found = compare(native, truth)
    assert found["opened"] == "InternVLForConditionalGeneration" and found["whole"]
    assert found["differences"].keys() == run.QUESTIONS.keys()
    assert run.is_good(found), found


def test_the_text_half_alone_gives_the_same_logits(native: Path, truth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is what is compared with; PEFT brings it")
    from matrix import probe  # needs transformers

    monkeypatch.setattr(probe, "NATIVE", "NotInThisVersion")
    found = probe.compare(native, truth)
    assert not found["whole"] and run.is_good(found), found
    assert [name for name, difference in found["differences"].items() if difference is not None] == ["text"]


def test_a_fault_in_the_export_is_noticed(native: Path, truth: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is what is compared with; PEFT brings it")
    from matrix.probe import compare  # needs transformers

    for file in native.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(native / "model.safetensors")
    k, v = (next(name for name in state if f"layers.0.self_attn.{part}_proj.weight" in name) for part in "kv")
    state[k], state[v] = state[v], state[k]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert not run.is_good(compare(tmp_path, truth))


GOOD = {"differences": {"text": 1e-5, "one tile": None}, "same_ids": True, "same_answers": True}


@pytest.mark.parametrize(
    "fault",
    [{"error": "ImportError"}, {"differences": {"text": 1.0}}, {"differences": {}}, {"same_ids": False}, {"same_answers": False}],
)
def test_what_counts_as_good(fault: dict[str, object]) -> None:
    assert run.is_good(GOOD)
    assert not run.is_good({**GOOD, **fault})


def test_a_version_that_does_not_start_is_a_row_with_its_last_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'ImportError: no such thing' >&2\nexit 1\n")
    python.chmod(0o755)
    found = run.probe(python, tmp_path, tmp_path)
    assert found == {"error": "ImportError: no such thing"}
    assert run.row(run.Version("4.57", "2.13.0"), found).count("|") == 7 + len(run.QUESTIONS)


def test_the_versions_that_the_issue_names_are_there_and_pinned() -> None:
    names = [version.name for version in run.versions()]
    assert names == ["4.49", "4.57", "5.17", "newest"]
    assert "transformers==4.57.*" in run.versions()[1].requirements
    assert "transformers" in run.versions()[3].requirements


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    calls: list[list[str]] = []

    def create(folder: Path, **_: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        made.append(folder)

    monkeypatch.setattr(run.venv, "create", create)
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.setenv("PIP_ARGS", "--extra-index-url https://cpu.example")
    make = partial(run.environment, place=tmp_path)
    assert make(run.Version("4.57", "2.13.0")) == make(run.Version("4.57", "2.13.0")) == tmp_path / "4.57" / "bin" / "python"
    assert len(made) == 1 and calls[0][-7:-5] == ["--extra-index-url", "https://cpu.example"]
    make(run.Version("4.57", "2.14.0"))
    assert len(made) == 2


def test_texts_are_the_prompts_whole(truth: Path) -> None:
    texts = json.loads((truth / "texts.json").read_text(encoding="utf-8"))
    assert texts["one tile"].count("<IMG_CONTEXT>") == 4 and texts["text"].endswith("assistant\n")
