"""The OpenAPI 3.1 document of these operations, of the models and the table of fields that requests are held to."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from . import anthropic, completions, embeddings, openai_chat, responses, shapes, tokens
from .bodies import Body
from .errors import is_anthropic
from .fields import FIELDS, Field

BODIES: dict[str, type[Body]] = {
    openai_chat.PATH: openai_chat.ChatBody,
    completions.PATH: completions.CompletionBody,
    responses.PATH: responses.ResponsesBody,
    anthropic.PATH: anthropic.MessagesBody,
    anthropic.COUNT_PATH: anthropic.CountBody,
    embeddings.PATH: embeddings.EmbeddingBody,
    tokens.PATH: tokens.TokenizeBody,
}
ANSWERS: dict[str, type[shapes.Shape]] = {
    openai_chat.PATH: shapes.ChatCompletion,
    completions.PATH: shapes.Completion,
    responses.PATH: shapes.Response,
    anthropic.PATH: shapes.Message,
    anthropic.COUNT_PATH: shapes.MessageTokens,
    embeddings.PATH: shapes.Embeddings,
    tokens.PATH: shapes.Tokens,
    "/v1/models": shapes.Models,
    "/v1/models/{model}": shapes.Model,
}
_ERRORS = (400, 401, 403, 404, 405, 408, 411, 413, 415, 421, 429, 431, 500, 503, 504)


def openapi(version: str, *, errors: Sequence[int] = _ERRORS, with_key: bool = False) -> dict[str, Any]:
    """The document, for a server that may answer with these `errors`; `with_key` if it asks for a key."""
    refs, schemas = _schemas()
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "mixtral_mlx",
            "version": version,
            "summary": "Mixtral on Apple silicon, by the APIs of OpenAI and of Anthropic",
        },
        "paths": {path: _operation(path, refs, errors) for path in ANSWERS},
        "components": {"schemas": schemas},
    }
    if with_key:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
        }
        document["security"] = [{name: []} for name in document["components"]["securitySchemes"]]
    return document


_Schema = dict[str, Any]
_Refs = dict[type[BaseModel], _Schema]


def _schemas() -> tuple[_Refs, _Schema]:
    """Where the schema of each model is, and all of them."""
    models: list[type[BaseModel]] = [*BODIES.values(), *ANSWERS.values(), shapes.OpenAIError, shapes.AnthropicError]
    refs, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = found["$defs"]
    for path, body in BODIES.items():
        properties = schemas[refs[body, "validation"]["$ref"].rpartition("/")[2]]["properties"]
        for name, field in FIELDS[path].items():
            properties[name] = _described(properties.get(name), field)
    return {model: refs[model, "validation"] for model in models}, schemas


def _described(schema: _Schema | None, field: Field) -> _Schema:
    """The schema of a field with what is done with it; of one that no model has, what is taken of it."""
    if schema is None:
        schema = {"enum": [*field.values, None]} if field.treatment == "fixed" else {"type": "null"}
    return {**schema, "description": f"{field.treatment.capitalize()}. {field.note}".strip()}


_PAGE: _Schema = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    "after_id": {"type": "string"},
    "before_id": {"type": "string"},
}
"""Which part of a list is asked for, as Anthropic's API has it."""


def _operation(path: str, refs: _Refs, errors: Sequence[int]) -> _Schema:
    body, answer = BODIES.get(path), ANSWERS[path]
    content: _Schema = {"application/json": {"schema": refs[answer]}}
    if body and "stream" in body.model_fields:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = refs[shapes.AnthropicError if is_anthropic(path) else shapes.OpenAIError]
    operation: _Schema = {
        "operationId": path.strip("/").translate(str.maketrans("/", "_", "{}")),
        "responses": {
            "200": {"description": answer.__doc__, "content": content},
            **{str(status): _refusal(status, error) for status in errors},
        },
    }
    if body is None:
        if "{model}" in path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        if path == "/v1/models":
            operation["parameters"] = [{"name": name, "in": "query", "schema": one} for name, one in _PAGE.items()]
        return {"get": operation}
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[body]}}}
    return {"post": operation}


def _refusal(status: int, error: _Schema) -> _Schema:
    return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": error}}}
