"""`tessella serve` with the real engine: what goes over the wire is what generate.py says; and SIGTERM ends it well."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
from stand_in import NAME, folder
from test_server_answers import picture
from test_server_life import soon

from taught import ALPHA, RANK, random_pairs
from tessella.chat import Message, place_marks
from tessella.checkpoint.adapters import AdapterSettings, save_adapter
from tessella.checkpoint.read import Loaded, load
from tessella.generate import stream_text
from tessella.inputs import Picture
from tessella.sampling import SamplingParams
from tiny import tiny_config, tiny_model

KEY = "k" * 20
QUESTIONS = ("What is it?", "Please describe the image shortly.", "图中是什么食物？", "There are 3 bowls of rice.")
DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Served:
    url: str
    process: subprocess.Popen[str]
    adapters: Path

    def chat(self, question: str, model: str = NAME, pictures: tuple[str, ...] = (), **more: Any) -> httpx2.Response:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures] + [{"type": "text", "text": question}]
        body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 12, **more}
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=300)


def make_adapters(root: Path) -> Path:
    for number, name in enumerate(("food", "cars")):
        state = random_pairs(tiny_model(tiny_config("InternLM2ForCausalLM")), seed=number)
        save_adapter(root / name, state, AdapterSettings(str(folder()), RANK, ALPHA))
    return root


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = make_adapters(tmp_path_factory.mktemp("adapters"))
    words = ["serve", str(folder()), "--adapter", f"food={root / 'food'}", "--adapter-root", str(root), "--port", "0"]
    words += ["--dtype", "float32", "--device", "cpu", "--cache-tokens", "16384"]
    environment = os.environ | {"TESSELLA_API_KEY": KEY, "TESSELLA_ADMIN_KEY": KEY[::-1] + "x", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "tessella.cli", *words], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    greeting = process.stderr.readline()
    assert "is served at" in greeting, greeting + process.stderr.read()
    url = greeting.partition("is served at ")[2].partition("/v1")[0]
    yield Served(url, process, root)
    if process.poll() is None:
        process.kill()


@cache
def loaded(adapter: Path | None = None) -> Loaded:
    return load(folder(), device="cpu", dtype="float32", adapter=adapter)


def plainly(question: str, adapter: Path | None = None, pictures: tuple[str, ...] = (), **params: Any) -> str:
    """What generate.py says."""
    model = loaded(adapter)
    turns = [Message("user", place_marks(question, len(pictures)))]
    prompt = model.inputs.build(turns, [Picture(one) for one in pictures])
    wanted = SamplingParams(**{"max_tokens": 12, **params})
    return "".join(stream_text(model.model, prompt, wanted, model.tokenizer, model.stop_ids))


def said(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_many_at_once_get_what_generate_says_with_adapters_and_pictures(served: Served) -> None:
    food = served.adapters / "food"
    shown = (picture(120, 60), picture(60, 60))
    asked = [(question, model, pictures) for question in QUESTIONS for model in (NAME, "food") for pictures in ((), shown)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: said(served.chat(one[0], one[1], one[2])), asked))
    for (question, model, pictures), answer in zip(asked, answers, strict=True):
        assert answer == plainly(question, food if model == "food" else None, pictures)
    assert len(set(answers)) > len(QUESTIONS)


def test_a_seed_and_a_stop_mean_what_they_mean_to_generate(served: Served) -> None:
    params = {"temperature": 0.8, "seed": 7, "top_p": 0.9}
    whole = plainly(QUESTIONS[0], **params)
    assert said(served.chat(QUESTIONS[0], **params)) == whole
    stop = whole[3:5]
    assert said(served.chat(QUESTIONS[0], stop=stop, **params)) == whole[: whole.index(stop)]
    both = served.chat(QUESTIONS[0], n=2, **params).json()["choices"]
    assert [one["message"]["content"] for one in both] == [whole, plainly(QUESTIONS[0], **params | {"seed": 8})]


def test_an_answer_of_random_weights_obeys_its_schema(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"food": {"enum": ["rice", "apple"]}, "fresh": {"type": "boolean"}},
        "required": ["food", "fresh"],
        "additionalProperties": False,
    }
    wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = json.loads(said(served.chat(QUESTIONS[0], response_format=wish, max_tokens=60)))
    assert found["food"] in ("rice", "apple")
    assert isinstance(found["fresh"], bool)


def test_an_adapter_joins_and_leaves_while_it_runs(served: Served) -> None:
    admin = {"authorization": f"Bearer {KEY[::-1]}x"}
    assert served.chat("hi", "cars").status_code == 404
    made = httpx2.post(f"{served.url}/v1/adapters", json={"name": "cars", "folder": "cars"}, headers=admin)
    assert made.status_code == 201
    assert said(served.chat(QUESTIONS[0], "cars")) == plainly(QUESTIONS[0], served.adapters / "cars")
    assert httpx2.delete(f"{served.url}/v1/adapters/cars", headers=admin).status_code == 200
    assert served.chat("hi", "cars").status_code == 404


def test_the_same_picture_is_known_again_and_the_usage_says_so(served: Served) -> None:
    shown = (picture(100, 100),)
    served.chat("Please describe the image shortly.", pictures=shown)
    again = served.chat("Please describe the image shortly.", pictures=shown).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] > 0.8 * again["prompt_tokens"]


def test_sigterm_lets_answers_end_takes_nothing_new_and_stops(served: Served) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000, "stream": True}
    address = f"{served.url}/v1/chat/completions"
    body |= {"stop_token_ids": [], "temperature": 2.0, "seed": 1}
    with httpx2.Client(base_url=served.url) as other, httpx2.stream("POST", address, json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        assert soon(lambda: other.get("/ready").status_code == 503)
        refused = other.post("/v1/chat/completions", json=body, headers=headers)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert other.get("/health").status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert served.process.wait(120) == 0
