"""The routes: OpenAI's, and ours for health, metrics and adapters.

In: a Service.  Out: an ASGI application, the door around it.
"""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tessella.engine.request import Request
from tessella.errors import EngineError, TessellaError
from tessella.server.answers import Answers, ChatForm, Form, TextForm, collected, events
from tessella.server.body import read_whole
from tessella.server.door import Door
from tessella.server.limits import Lease
from tessella.server.page import REFERENCE, page, schema
from tessella.server.refusal import ErrorBody, Refusal, answers
from tessella.server.replies import ChatChunk, ChatCompletion, Completion, ModelCard, ModelList, Status
from tessella.server.service import Service
from tessella.server.settings import Settings
from tessella.server.stream import ClientGone, EventStream, while_client_waits
from tessella.server.wire import AdapterRequest, ChatRequest, CompletionRequest, Drawing, Wire, read_body

Wish = TypeVar("Wish", bound=Drawing)
Kind = TypeVar("Kind", bound=Wire)
NO_ANSWER = answers(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
CLIENT_GONE = 499  # nginx's; nobody reads it but the log and the metrics


def create_app(service: Service) -> Door:
    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="Tessella", version="1", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=life
    )
    _add_questions(app, service)
    _add_models(app, service)
    _add_state(app, service)
    _add_page(app)
    _add_errors(app, service)
    return Door(app, service.settings, lambda: service.draining, service.metrics)


def _add_questions(app: FastAPI, service: Service) -> None:
    asked, told = takes(ChatRequest), {**NO_ANSWER, 200: streamed(ChatChunk)}

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=told, openapi_extra=asked)
    async def chat(http: HttpRequest) -> Response:
        """An answer to a conversation with pictures. With stream: true, chunks as server-sent events."""
        return await ask(service, http, ChatRequest, service.prepare_chat, ChatForm)

    asked, told = takes(CompletionRequest), {**NO_ANSWER, 200: streamed(Completion)}

    @app.post("/v1/completions", response_model=Completion, responses=told, openapi_extra=asked)
    async def complete(http: HttpRequest) -> Response:
        """The text that follows a text; no template, no pictures."""
        return await ask(service, http, CompletionRequest, service.prepare_completion, TextForm)


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str, parent: str | None) -> ModelCard:
        return ModelCard(id=name, created=service.started, parent=parent)

    def cards() -> list[ModelCard]:
        base = service.settings.name
        return [card(base, None), *(card(name, base) for name in service.engine.state().adapters)]

    @app.get("/v1/models", responses=answers(401, 403, 429))
    async def models() -> ModelList:
        """The model, and its adapters under the names by which they are asked."""
        return ModelList(data=cards())

    @app.get("/v1/models/{name:path}", responses=answers(401, 403, 404, 429))
    async def model(name: str) -> ModelCard:
        found = next((one for one in cards() if one.id == name), None)
        if found is None:
            raise Refusal(404, "that model is not served; /v1/models lists what is", param="model", code="model_not_found")
        return found

    admin = answers(400, 401, 403, 404, 408, 409, 413, 415, 429, 503)

    @app.post("/v1/adapters", status_code=201, response_model=ModelCard, responses=admin, openapi_extra=takes(AdapterRequest))
    async def load(http: HttpRequest) -> Response:
        """Load a LoRA adapter from a folder in --adapter-root; needs the admin key."""
        wish = await whole_body(service, http, AdapterRequest)
        folder = adapter_folder(service.settings, wish.folder)
        if wish.name == service.settings.name or wish.name in service.engine.state().adapters:
            raise Refusal(409, "a model of that name is served; take another", param="name", code="name_taken")
        try:
            await service.in_pool(partial(service.load_adapter, wish.name, folder))
        except EngineError as error:
            raise Refusal(409, str(error), code="adapter_refused") from error
        except TessellaError as error:
            raise Refusal(400, str(error), param="folder", code="adapter_unreadable") from error
        return JSONResponse(card(wish.name, service.settings.name).model_dump(), 201)

    @app.delete("/v1/adapters/{name}", responses=answers(401, 403, 404, 429))
    async def unload(name: str) -> Status:
        """Answers under way with it end in peace; needs the admin key."""
        try:
            await service.in_pool(partial(service.engine.unload_adapter, name))
        except EngineError as error:
            raise Refusal(404, str(error), code="model_not_found") from error
        return Status(status="unloaded")


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=answers(403, 503))
    async def health() -> Status:
        """Whether the process is well: a load balancer or a supervisor restarts it otherwise."""
        if not service.engine.state().alive and not service.draining:
            raise Refusal(503, "the engine does not run; restart the server", code="engine_dead")
        return Status(status="ok")

    @app.get("/ready", responses=answers(403, 503))
    async def ready() -> Status:
        """Whether new questions are taken: not while draining."""
        if not service.ready():
            raise Refusal(503, "nothing new is taken", code="draining", retry_s=5)
        return Status(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **answers(401, 403, 429)})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return schema(app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(
            page(schema(app)), headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        )


def _add_errors(app: FastAPI, service: Service) -> None:
    def tell(refusal: Refusal) -> Response:
        service.metrics.refused(refusal)
        return refusal.response()

    @app.exception_handler(Refusal)
    async def refused(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return tell(error)

    @app.exception_handler(HTTPException)
    async def no_such_route(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = error.status_code != 404
        what = "the address does not take that method" if known else "there is no such address"
        refusal = Refusal(error.status_code, f"{what}; /docs lists them", code="method_not_allowed" if known else "not_found")
        refusal.headers |= error.headers or {}
        return tell(refusal)

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def gone(_: HttpRequest, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def fault(_: HttpRequest, __: Exception) -> Response:  # it is raised again behind us, and logged with its trace
        return tell(Refusal(500, "a fault of the server's own; its log tells more", code="internal_error"))


async def ask(
    service: Service,
    http: HttpRequest,
    kind: type[Wish],
    prepare: Callable[[Wish, Lease], Coroutine[Any, Any, list[Request]]],
    form_of: Callable[[str], Form],
) -> Response:
    """One question, from its body to its answer."""
    limit_s = service.settings.answer_s
    wish = await whole_body(service, http, kind)
    tiles = Lease(service.memory)
    try:
        requests = await while_client_waits(http.receive, prepare(wish, tiles), limit_s)
        running = Answers(service, requests, wish, tiles)
    except BaseException:
        tiles.end()
        raise
    form = form_of(wish.model)
    if wish.stream:

        def ended(how: Exception | None) -> None:
            running.end()
            if isinstance(how, Refusal):
                service.metrics.refused(how)

        return EventStream(events(form, running), limit_s, ended)
    try:
        answer: BaseModel = await while_client_waits(http.receive, collected(form, running), limit_s)
    finally:
        running.end()
    return Response(answer.model_dump_json(), media_type="application/json")


async def whole_body(service: Service, http: HttpRequest, kind: type[Kind]) -> Kind:
    """Raises Refusal, ClientDisconnect. Parsed in the pool: a body of pictures takes longer than the loop may stand still."""
    lease = Lease(service.memory)
    try:
        body = await read_whole(http, service.settings, lease)
        return await service.in_pool(partial(read_body, kind, body))
    finally:
        lease.end()


def adapter_folder(settings: Settings, name: str) -> Path:
    """A folder that lies in --adapter-root itself. Raises Refusal 400, 403."""
    root = settings.adapter_root
    if root is None:
        raise Refusal(403, "adapters are loaded from --adapter-root, and this server has none", code="no_adapter_root")
    there = root.resolve()
    folder = (there / name).resolve() if name.isprintable() and "/" not in name and "\\" not in name else there
    if folder.parent != there or not folder.is_dir():
        raise Refusal(400, "that is no folder in --adapter-root; give its name alone", param="folder", code="no_such_folder")
    return folder


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The body of a route, which it reads itself, as the OpenAPI page shall tell it."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": named(kind)}}}}


def streamed(chunk: type[BaseModel]) -> dict[str, Any]:
    """What stream: true gives, as the page shall tell it: events that hold chunks, perhaps an error, and [DONE] at the end."""
    inside = {"contentMediaType": "application/json", "contentSchema": {"anyOf": [named(chunk), named(ErrorBody)]}}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, inside]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        "description": "Whole, or with stream: true as events",
        "content": {"text/event-stream": {"itemSchema": event}},  # a word of OpenAPI 3.2 that FastAPI writes into 3.1 too
    }


def named(kind: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(model=kind.__name__)}
