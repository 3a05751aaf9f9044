"""The server against its own OpenAPI document: whatever is sent, no answer is a 5xx, and each is as documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mixtral_mlx.engine.engine import load
from mixtral_mlx.server.app import create_app
from mixtral_mlx.server.openapi import document
from mixtral_mlx.server.settings import ServerSettings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    (path, method, mode)
    for path, operations in document(with_key=False)["paths"].items()
    for method in operations
    for mode in GenerationMode
    if method == "post" or mode is GenerationMode.POSITIVE  # There is nothing to a GET that could be wrong.
]


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    with load(context=128, max_concurrent=4) as engine:
        app = create_app(engine, ServerSettings(timeout_s=20))
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})


def check(schema: Any, path: str, method: str, mode: GenerationMode, examples: int) -> None:
    operation = schema[path][method.upper()]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def answered(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, headers={"Host": "localhost"}, timeout=120)

    answered()


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS, ids=str)
def test_every_answer_is_as_the_document_says(schema: Any, path: str, method: str, mode: GenerationMode) -> None:
    check(schema, path, method, mode, 10)


@pytest.mark.long
@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS, ids=str)
def test_1000_answers_are_as_the_document_says(schema: Any, path: str, method: str, mode: GenerationMode) -> None:
    check(schema, path, method, mode, 1000)
