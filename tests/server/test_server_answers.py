"""The openai package, as people use it, gets what it expects; what is not served is refused by name."""

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image
from stand_in import NAME, WORDS, Live, ScriptedEngine, live

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def picture(width: int = 60, height: int = 40, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def shown(*urls: str, detail: str = "auto") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}


def chat(server: Live, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/chat/completions", json={"model": NAME, "messages": HI, "max_tokens": 4, **body})


def error(response: httpx2.Response) -> dict[str, Any]:
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_an_answer_is_whole_and_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HI, max_tokens=12)
    assert answer.choices[0].message.content == WORDS
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 12 + answer.usage.prompt_tokens


def test_a_stream_says_the_same_and_its_last_chunk_holds_the_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=NAME, messages=HI, max_tokens=12, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == WORDS
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_the_wish_no_chunk_holds_a_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=HI, max_tokens=3, stream=True))
    assert all(chunk.usage is None for chunk in chunks)


def test_n_answers_come_with_their_numbers_and_seeds(server: Live, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HI, max_tokens=3, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert sorted(request.params.seed for request in server.engine.seen[-3:]) == [5, 6, 7]
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == len(server.engine.seen[-1].prompt)


def test_n_streams_are_told_apart(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(model=NAME, messages=HI, max_tokens=12, n=2, seed=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts[0] == WORDS
    assert texts[1] != WORDS


def test_log_probabilities_are_told_for_each_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HI, max_tokens=5, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    assert bytes(byte for one in content for byte in one.bytes).decode() == answer.choices[0].message.content
    assert all(len(one.top_logprobs) == 2 for one in content)


def test_completions_take_several_texts_and_no_template(server: Live, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=["a red apple", "rice"], max_tokens=2, n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].logprobs.text_offset == [0, 1]
    assert answer.usage.prompt_tokens < 20
    streamed = client.completions.create(model=NAME, prompt="a red apple", max_tokens=2, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_what_is_wished_reaches_the_engine(server: Live, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=NAME,
        messages=[{"role": "developer", "content": "Be brief."}, *HI],
        max_completion_tokens=3,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        stop=["\n", "end"],
        seed=3,
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [7]},
    )
    request = server.engine.seen[-1]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (0.5, 0.9, 4, 0.1, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.seed, params.max_tokens) == (0.1, 0.2, 3, 3)
    assert params.stop == ("\n", "end")
    assert 7 in request.stop_ids


def test_without_a_length_an_answer_is_greedy_and_as_long_as_the_server_says() -> None:
    with live(default_max_tokens=6) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert client.chat.completions.create(model=NAME, messages=HI).usage.completion_tokens == 6
        assert server.engine.seen[-1].params.temperature == 0


def test_without_a_length_an_answer_fills_what_the_context_holds_and_no_more() -> None:
    with live(ScriptedEngine(longest_row=160)) as server:
        assert chat(server, max_tokens=None).json()["usage"]["total_tokens"] == 160


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures_of_each_kind_are_seen(server: Live, kind: str) -> None:
    answer = chat(server, messages=[shown(picture(kind=kind))])
    assert answer.json()["usage"]["tiles"] == len(server.engine.seen[-1].prompt.tiles) > 0


def test_tiles_are_limited_by_max_tiles_and_by_detail(server: Live) -> None:
    wide = picture(400, 100)
    tiles = [
        chat(server, messages=[shown(wide)], **how).json()["usage"]["tiles"] for how in ({}, {"max_tiles": 2}, {"max_tiles": 1})
    ]
    assert tiles == [5, 3, 1]
    assert chat(server, messages=[shown(wide, detail="low")]).json()["usage"]["tiles"] == 1


def test_several_pictures_over_several_turns(server: Live) -> None:
    messages = [shown(picture(), picture()), {"role": "assistant", "content": "Two."}, shown(picture())]
    assert chat(server, messages=messages).json()["usage"]["tiles"] == sum(server.engine.seen[-1].prompt.tiles_per_picture)
    assert len(server.engine.seen[-1].prompt.tiles_per_picture) == 3


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["apple", "rice"]}, "count": {"type": "integer"}, "fresh": {"type": "boolean"}},
    "required": ["name", "count", "fresh"],
    "additionalProperties": False,
}


def test_an_answer_obeys_its_schema_whatever_the_model_likes(client: openai.OpenAI) -> None:
    wish = {"type": "json_schema", "json_schema": {"name": "food", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        answer = client.chat.completions.create(model=NAME, messages=HI, max_tokens=80, seed=seed, response_format=wish)
        found = json.loads(answer.choices[0].message.content)
        assert list(found) == ["name", "count", "fresh"]
        assert found["name"] in ("apple", "rice")
        assert isinstance(found["count"], int)
        assert answer.choices[0].finish_reason == "stop"


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    wish = {"type": "json_object"}
    answer = client.chat.completions.create(model=NAME, messages=HI, max_tokens=200, seed=1, response_format=wish)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="there are tiny"):
        client.chat.completions.create(model="gpt-4o", messages=HI)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"user": "me"}, "user"),
        ({"store": True}, "store"),
        ({"best_of": 2}, "best_of"),
        ({"messages": [{"role": "user", "content": "hi", "name": "me"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages.0.content.0"),
        ({"messages": [shown(picture())], "extra": {"a": 1}}, "extra"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"n": 0}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"stop": [""]}, "stop.0"),
    ],
)
def test_a_field_that_is_not_served_is_refused_by_its_name(server: Live, body: dict[str, Any], param: str) -> None:
    answer = chat(server, **body)
    assert answer.status_code == 400
    assert error(answer)["param"] == param
    assert f'"{param}"' in error(answer)["message"]


@pytest.mark.parametrize("param", ["stream_options", "top_logprobs", "max_completion_tokens"])
def test_a_field_that_does_not_go_with_another_is_named_too(server: Live, param: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "stream_options": {"stream_options": {"include_usage": True}},
        "top_logprobs": {"top_logprobs": 2},
        "max_completion_tokens": {"max_completion_tokens": 3, "max_tokens": 3},
    }
    answer = chat(server, **bodies[param])
    assert (answer.status_code, error(answer)["param"]) == (400, param)


def test_more_answers_than_may_wait_are_not_told_to_come_again() -> None:
    with live(queue=2) as server:
        answer = chat(server, n=3)
    assert (answer.status_code, error(answer)["code"]) == (400, "too_many_answers")


def test_null_asks_for_nothing(server: Live) -> None:
    message = {"role": "user", "content": "hi", "name": None, "tool_calls": None}
    assert chat(server, messages=[message], tools=None, user=None, stop=None).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "must be by the user"),
        ({"messages": [{"role": "user", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "user", "content": "<image> hi"}]}, "mark of a picture"),
        ({"messages": [{"role": "user", "content": "rice " * 9000}]}, "at most 4,096"),
        ({"max_tokens": 5000}, r"ask for an answer of at most .* \(max_tokens\)"),
        ({"n": 17}, "at most 16"),
        ({"stop": [str(i) for i in range(17)]}, "must have at most 16 items, not 17"),
        ({"store": True}, '"store" is not served; take it out, or send false'),
        ({"stream_options": {"include_usage": True}}, "go with stream"),
        ({"top_logprobs": 2}, "goes with logprobs"),
        ({"max_completion_tokens": 3}, "say the same"),
    ],
)
def test_a_wish_that_cannot_be_met_is_a_400_with_a_way_out(server: Live, body: dict[str, Any], words: str) -> None:
    answer = chat(server, **body)
    assert answer.status_code == 400
    assert re.search(words, error(answer)["message"])


def test_a_full_queue_is_a_429_that_says_when_to_come_again() -> None:
    with live(ScriptedEngine(max_waiting=0)) as server:
        answer = chat(server)
    assert (answer.status_code, answer.headers["retry-after"], error(answer)["code"]) == (429, "2", "queue_full")


def test_an_answer_that_fails_says_so_in_a_stream_and_out_of_one() -> None:
    with live(ScriptedEngine(fail_after=2, step_s=0.01)) as server:
        answer = chat(server)
        assert (answer.status_code, error(answer)["code"]) == (500, "answer_failed")
        lines = [line for line in chat(server, stream=True).text.splitlines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "answer_failed"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="a test says so"):
            list(client.chat.completions.create(model=NAME, messages=HI, stream=True))


def test_metrics_tell_what_was_answered(server: Live) -> None:
    chat(server)
    text = httpx2.get(f"{server.url}/metrics").text
    for name in ("time_to_first_token_seconds_count", "inter_token_seconds_bucket", "engine_waiting", "engine_blocks_used"):
        assert f"tessella_{name}" in text
    assert 'tessella_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "process_resident_memory_bytes" in text


def test_the_page_needs_nothing_from_elsewhere(server: Live) -> None:
    page = httpx2.get(f"{server.url}/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text
    assert "http" not in page.text.replace("https addresses only", "")
    assert "max_tiles" in page.text
