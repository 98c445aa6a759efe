"""A small server with OpenAI's interface that answers by a fixed rule: what the web chat is tested against.

Run as a program: python chat_stand_in.py PORT. What it was asked is told at /seen; whether a client left, too.
Its answer counts pictures and turns, so that a test sees what the model would have seen. Words in the question steer it:
"slowly" answers for minutes, until it is stopped, "where" marks a place, "refuse" refuses, "break" ends in the middle.
"""

import asyncio
import base64
import io
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODELS = ("tiny", "tiny-foods")
seen: list[dict[str, Any]] = []
left: list[str] = []


def last_question(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def colours(messages: list[dict[str, Any]]) -> list[str]:
    """The colour in the middle of each picture, as #rrggbb: proof that the picture itself arrived."""
    found = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image_url":
                raw = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                with Image.open(io.BytesIO(raw)) as image:
                    pixel = image.convert("RGB").getpixel((image.width // 2, image.height // 2))
                found.append("#{:02x}{:02x}{:02x}".format(*pixel))
    return found


def answer_to(body: dict[str, Any]) -> str:
    question = last_question(body["messages"])
    if "where" in question:
        return "It is <ref>red square</ref><box>[[250, 250, 750, 750]]</box>, look."
    if "evil" in question:
        return "<script>document.title = 'hacked'</script> ![x](http://elsewhere.example/x.png) <b>bold</b>\n\n    code"
    turns = sum(message["role"] == "user" for message in body["messages"])
    return f"{body['model']} heard “{question}”, turn {turns}, pictures {' '.join(colours(body['messages'])) or 'none'}."


def chunk(model: str, **fields: Any) -> bytes:
    piece = {"object": "chat.completion.chunk", "model": model, "choices": [], **fields}
    return f"data: {json.dumps(piece, ensure_ascii=False)}\n\n".encode()


async def pieces(body: dict[str, Any]) -> AsyncIterator[bytes]:
    model, question, text = body["model"], last_question(body["messages"]), answer_to(body)
    words = (
        [f"word{number} " for number in range(100)]
        if "slowly" in question
        else [text[at : at + 6] for at in range(0, len(text), 6)]
    )
    try:
        for number, word in enumerate(words):
            await asyncio.sleep(0.1 if "slowly" in question else 0.01)
            if "break" in question and number == 3:
                return
            yield chunk(model, choices=[{"index": 0, "delta": {"content": word}}])
    except asyncio.CancelledError:
        left.append(question)
        raise
    yield chunk(model, choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    pictures = len(colours(body["messages"]))
    usage = {
        "prompt_tokens": 7 + 256 * pictures,
        "completion_tokens": len(words),
        "total_tokens": 7 + len(words),
        "tiles": pictures,
    }
    yield chunk(model, usage=usage)
    yield b"data: [DONE]\n\n"


async def complete(request: Request) -> Response:
    body = await request.json()
    seen.append(body)
    if "refuse" in last_question(body["messages"]):
        return JSONResponse(
            {"error": {"message": "4,812 tokens; at most 4,096: fewer tiles", "type": "invalid_request_error"}}, 400
        )
    return StreamingResponse(pieces(body), media_type="text/event-stream")


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})


async def tell(request: Request) -> Response:
    return JSONResponse({"seen": seen, "left": left})


APP = Starlette(
    routes=[
        Route("/v1/models", models),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/seen", tell),
    ]
)

if __name__ == "__main__":
    uvicorn.run(APP, port=int(sys.argv[1]), log_level="warning")
