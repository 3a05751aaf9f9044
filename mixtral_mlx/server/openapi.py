"""The document that describes the routes: `protocol`'s operations, and those that tell how the server is."""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..protocol import openapi

_COUNTS = {"type": "object", "additionalProperties": True}
_HEALTH = {
    "type": "object",
    "properties": {
        "status": {"enum": ["ok", "loading", "no_model", "closed"]},
        "state": {"enum": ["unloaded", "loading", "ready", "failed"]},
        "done_bytes": {"type": "integer", "minimum": 0},
        "total_bytes": {"type": "integer", "minimum": 0},
    },
    "required": ["status"],
    "additionalProperties": False,
}
_STATS = {
    "type": "object",
    "properties": {
        "requests": _COUNTS,
        "prefixes": _COUNTS,
        "prefix_files": {"anyOf": [_COUNTS, {"type": "null"}]},
        "experts": {"anyOf": [_COUNTS, {"type": "null"}]},
        "draft": {"anyOf": [_COUNTS, {"type": "null"}]},
        "memory": _COUNTS,
        "health": _COUNTS,
    },
    "required": ["requests", "prefixes", "prefix_files", "experts", "draft", "memory", "health"],
    "additionalProperties": False,
}

_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_ROUTING = {
    "type": "object",
    "properties": {
        "layers": {"type": "integer", "minimum": 1},
        "experts": {"type": "integer", "minimum": 1},
        "tokens": {"type": "integer", "minimum": 0},
        "counts": {"type": "array", "items": _NUMBERS},
        "last": {"type": "array", "items": _NUMBERS},
    },
    "required": ["layers", "experts", "tokens", "counts", "last"],
    "additionalProperties": False,
}


def document(*, with_key: bool) -> dict[str, Any]:
    """The document, of a server that asks for a key or does not."""
    made = openapi(__version__, with_key=with_key)
    for operations in made["paths"].values():
        content = operations.get("post", {}).get("responses", {}).get("200", {}).get("content", {})
        if "text/event-stream" in content:
            content["text/event-stream"] = {}  # OpenAPI 3.1 has no schema for the events of a stream.
    errors = {
        status: answer for status, answer in made["paths"]["/v1/models"]["get"]["responses"].items() if status != "200"
    }
    health = _get("Whether requests are answered, or how far loading is", "application/json", _HEALTH, {})
    health["responses"]["503"] = {**health["responses"]["200"], "description": "Not now."}
    health["responses"] |= {status: errors[status] for status in ("400", "403") if status in errors}
    health["security"] = []
    made["paths"] |= {
        "/health": {"get": health},
        "/stats": {"get": _get("What was done so far, in numbers", "application/json", _STATS, errors)},
        "/routing": {
            "get": _get(
                "Which experts were chosen, by layer, while somebody asked every few seconds",
                "application/json",
                _ROUTING,
                errors,
            )
        },
        "/metrics": {"get": _get("The same for Prometheus", "text/plain", {"type": "string"}, errors)},
        "/openapi.json": {"get": _get("This document", "application/json", {"type": "object"}, errors)},
    }
    return made


def _get(summary: str, kind: str, schema: dict[str, Any], errors: dict[str, Any]) -> dict[str, Any]:
    answer = {"description": "The answer.", "content": {kind: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": answer, **errors}}
