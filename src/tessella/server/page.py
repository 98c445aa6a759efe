"""The OpenAPI description, and a page of it that needs no script and nothing from elsewhere.

In: the FastAPI application.  Out: the dict of /openapi.json; HTML.
"""

from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from tessella.server.replies import ChatChunk
from tessella.server.wire import AdapterRequest, ChatRequest, CompletionRequest

BODIES = (ChatRequest, CompletionRequest, AdapterRequest)
REFERENCE = "#/components/schemas/{model}"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
code { font-size: .95em } table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #ccc; padding: .3rem .6rem }
td { vertical-align: top } h2 { margin-top: 2.5rem } .method { font-weight: bold }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } td { border-color: #444 } a { color: #8ab4f8 } }
"""


def schema(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.1; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes, description="OpenAI's API, on Tessella.")
        parts = made.setdefault("components", {})
        for kinds, mode in ((BODIES, "validation"), ((ChatChunk,), "serialization")):
            _, bodies = models_json_schema([(kind, mode) for kind in kinds], ref_template=REFERENCE)  # type: ignore[misc]
            parts.setdefault("schemas", {}).update(bodies["$defs"])
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema


def page(described: dict[str, Any]) -> str:
    """All routes, and the fields of all bodies."""
    rows = [
        f'<tr><td class="method">{method.upper()}</td><td><code>{escape(path)}</code></td>'
        f"<td>{escape(about.get('description', about.get('summary', '')))}</td></tr>"
        for path, methods in described["paths"].items()
        for method, about in methods.items()
    ]
    kinds = described["components"]["schemas"]
    bodies = [
        _fields(name, kinds[name]) for name in ("ChatRequest", "ChatMessage", "ImageUrl", "CompletionRequest", "AdapterRequest")
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tessella</title><style>{STYLE}</style><h1>Tessella</h1>'
        f'<p>OpenAI\'s API; point its clients at <code>/v1</code>. <a href="/openapi.json">openapi.json</a> has it all.</p>'
        f"<table>{''.join(rows)}</table>{''.join(bodies)}</html>"
    )


def _fields(name: str, kind: dict[str, Any]) -> str:
    served = {field: about for field, about in kind["properties"].items() if about.get("type") != "null"}
    unserved = [field for field in kind["properties"] if field not in served]
    rows = [
        f"<tr><td><code>{escape(field)}</code>{' *' if field in kind.get('required', ()) else ''}</td>"
        f"<td>{escape(_type(about))}</td><td>{escape(about.get('description', ''))}</td></tr>"
        for field, about in served.items()
    ]
    rest = f"<p>Known and not served: <code>{escape(', '.join(unserved))}</code></p>" if unserved else ""
    return f"<h2>{escape(name)}</h2><table>{''.join(rows)}</table>{rest}"


def _type(about: dict[str, Any]) -> str:
    if "$ref" in about:
        return str(about["$ref"]).rpartition("/")[2]
    if "enum" in about or "const" in about:
        return " | ".join(map(str, about.get("enum", [about.get("const")])))
    choices = about.get("anyOf") or about.get("oneOf")
    if choices:
        return " | ".join(_type(choice) for choice in choices if choice.get("type") != "null")
    kind = str(about.get("type", "any"))
    return f"list of {_type(about['items'])}" if kind == "array" and "items" in about else kind
