"""The document that describes the routes (OpenAPI 3.1)."""

from __future__ import annotations

from typing import Any


def document() -> dict[str, Any]:
    """The document."""
    return {"openapi": "3.1.0", "info": {"title": "mixtral-mlx", "version": "0"}, "paths": {}}
