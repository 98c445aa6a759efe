"""Another engine on what we write: transformers, with its own template, tokenizer, tiles and model, in a process of its own."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from tessella import cli
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.engines import LIMIT, LIMIT_WITH_PICTURES, EngineProof, ask
from tessella.checkpoint.source import open_source
from tessella.checkpoint.verify import conversations, logits_on
from tessella.errors import CheckpointError
from tessella.inputs import Inputs, Picture

TALKS = EngineProof("transformers", "5.23.0", equal_first=4, texts_told=4, talks=4)


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
        replace(TALKS, answers=("answer 1 differs",)),
    ],
)
def test_each_difference_decides_the_exit_code(tmp_path: Path, proof: EngineProof, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TALKS.holds and not proof.holds and any(equal is False for _, _, equal in proof.rows())
    base = str(tiny.tiny_folder(tmp_path / "base", "LlamaForCausalLM"))
    for answer, code in ((TALKS, 0), (proof, 1)):
        monkeypatch.setattr("tessella.verification.ask", lambda *_, answer=answer: answer)
        assert cli.main(["verify", base, base, "--engines", "transformers"]) == code


def test_an_engine_that_is_not_here_or_not_known_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(tiny.tiny_folder(tmp_path / "base", "LlamaForCausalLM"))
    assert cli.main(["verify", base, base, "--engines", "ollama"]) == 2
    assert "known are transformers" in capsys.readouterr().err
    assert cli.main(["verify", base, base, "--engines", "lmdeploy"]) == 0
    assert "not installed here" in capsys.readouterr().out
    for word, told in (
        ("vllm", "must be ENGINE="),
        ("vllm=/nowhere/python", "is no program"),
        ("ollama=python3", "must be ENGINE="),
    ):
        assert cli.main(["verify", base, base, "--engines", "vllm", "--engine-python", word]) == 2
        assert told in capsys.readouterr().err


VLLM = """
import json
from pathlib import Path
from types import SimpleNamespace as Named
__version__ = "0.0"
class SamplingParams:
    def __init__(self, temperature, max_tokens, logprobs):
        assert temperature == 0
class LLM:
    def __init__(self, model, trust_remote_code, **_):
        self.told, self.asked = json.loads((Path(__file__).parent / "told.json").read_text()), []
        files = {path.name: path.read_text() if path.suffix in (".py", ".json") else "" for path in Path(model).iterdir()}
        (Path(__file__).parent / "seen.json").write_text(json.dumps({"files": files, "trust": trust_remote_code}))
    def chat(self, messages, params, use_tqdm):
        one = self.told[len(self.asked)]
        self.asked.append(messages)
        (Path(__file__).parent / "asked.json").write_text(json.dumps(self.asked))
        first = {int(token): Named(logprob=value) for token, value in one["first"].items()}
        return [Named(prompt_token_ids=one["ids"], outputs=[Named(logprobs=[first], token_ids=one["answer"])])]
"""


def ours(folder: Path) -> list[dict[str, Any]]:
    """What an engine that is like us would say."""
    source = open_source(folder)
    inputs, model = Inputs.load(folder, source.config), source.model(torch.device("cpu"))
    told = []
    for messages, pictures in conversations():
        one = inputs.build(messages, [Picture(picture.source) for picture in pictures])
        row = logits_on(model, [one])[0][-1].log_softmax(-1)
        first = {int(token): float(row[token]) for token in row.topk(20).indices}
        told.append({"ids": one.ids.tolist(), "first": first, "answer": [int(row.argmax())]})
    return told


def test_vllm_is_asked_without_running_code_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that says what we would; then one that says something else."""
    base = tiny.tiny_folder(tmp_path / "base", "Qwen2ForCausalLM")
    for name in ("configuration_internvl_chat.py", "modeling_internvl_chat.py"):
        (base / name).write_text("raise SystemExit('a stranger wrote this')")
    package = tmp_path / "environment" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    told = ours(base)
    (package / "told.json").write_text(json.dumps(told))
    source = open_source(base)
    proof = ask("vllm", source, sys.executable)
    assert proof.holds and proof.answer_tokens == 4 and proof.rows()[0][2] is None  # it tells no text
    seen, asked = (json.loads((package / f"{name}.json").read_text()) for name in ("seen", "asked"))
    assert seen["trust"] and "stranger" not in str(seen["files"]) and "modeling_internvl_chat.py" not in seen["files"]
    assert json.loads(seen["files"]["config.json"])["auto_map"].keys() == {"AutoConfig"}
    parts = asked[3][0][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"] and parts[2]["text"] == "What differs?"
    told[1]["ids"] = told[1]["ids"][:-1]
    told[2]["first"] = {token: value - 1 for token, value in told[2]["first"].items()}
    told[3]["answer"] = [told[3]["answer"][0] + 1]
    (package / "told.json").write_text(json.dumps(told))
    faulty = ask("vllm", source, sys.executable)
    assert len(faulty.ids) == len(faulty.answers) == 1 and faulty.largest_with_pictures == pytest.approx(1, abs=1e-3)
    assert not faulty.holds and "answer 4" in faulty.answers[0] and "prompt 2" in faulty.ids[0]
    (package / "__init__.py").write_text("raise ImportError('libcuda.so.1')")
    with pytest.raises(CheckpointError, match=r"vllm could not answer.*libcuda"):
        ask("vllm", source, sys.executable)
