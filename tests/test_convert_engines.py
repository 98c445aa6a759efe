"""Another engine on what we write: transformers, with its own template, tokenizer, tiles and model, in a process of its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from tessella import cli
from tessella.checkpoint import engines
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.engines import LIMIT, LIMIT_WITH_PICTURES, EngineProof, ask
from tessella.checkpoint.source import open_source

TALKS = EngineProof("transformers", "5.23.0", equal_first=4, talks=4)


def test_transformers_answers_like_us_until_its_pixels_are_others(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is the engine of this test; it is in the test extra")
    base = tiny.tiny_folder(tmp_path / "base", "InternLM2ForCausalLM")
    proof = ask("transformers", open_source(base))
    assert proof.holds and proof.talks == proof.equal_first == 4 and proof.largest_with_pictures < 1e-3
    native = convert(base, tmp_path / "native", Wish(to="native", proof="tensors")).folder
    raw = json.loads((native / "preprocessor_config.json").read_text())
    (native / "preprocessor_config.json").write_text(json.dumps({**raw, "image_mean": [0.3, 0.3, 0.3]}))
    template = (native / "chat_template.jinja").read_text()
    (native / "chat_template.jinja").write_text(template.replace("heads['assistant']", "heads['user']"))
    faulty = ask("transformers", open_source(native))
    assert len(faulty.prompts) == len(faulty.ids) == 4 and not faulty.holds
    assert faulty.largest_with_pictures > LIMIT_WITH_PICTURES


@pytest.mark.parametrize(
    "proof",
    [
        replace(TALKS, prompts=("prompt 1 differs",)),
        replace(TALKS, ids=("prompt 1 differs",)),
        replace(TALKS, largest=2 * LIMIT),
        replace(TALKS, largest_with_pictures=2 * LIMIT_WITH_PICTURES),
        replace(TALKS, equal_first=3),
    ],
)
def test_each_difference_decides_the_exit_code(tmp_path: Path, proof: EngineProof, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TALKS.holds and not proof.holds and any(equal is False for _, _, equal in proof.rows())
    base = str(tiny.tiny_folder(tmp_path / "base", "LlamaForCausalLM"))
    for answer, code in ((TALKS, 0), (proof, 1)):
        monkeypatch.setattr("tessella.verification.ask", lambda *_, answer=answer: answer)
        assert cli.main(["verify", base, base, "--engines", "transformers"]) == code


def test_an_engine_that_is_not_here_or_not_known_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(tiny.tiny_folder(tmp_path / "base", "LlamaForCausalLM"))
    assert cli.main(["verify", base, base, "--engines", "ollama"]) == 2
    assert "known are transformers" in capsys.readouterr().err
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    assert cli.main(["verify", base, base, "--engines", "transformers"]) == 0
    assert "not installed here" in capsys.readouterr().out
