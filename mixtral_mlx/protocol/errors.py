"""Errors as the APIs write them: HTTP status and body, and which of the engine's are whose fault."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from ..config import MixtralError
from ..engine.request import EngineError
from ..engine.schemas import GrammarError
from ..engine.tools import ToolError
from ..generate import GenerateError
from ..prompt import PromptError
from .call import Refused

_ASKED_WRONG = (PromptError, GenerateError, GrammarError, ToolError)
_STATUS = {"queue_full": 429, "closed": 503, "busy": 503, "out_of_memory": 503, "step_failed": 500, "timeout": 504}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_PARAMS = {
    **dict.fromkeys(("bad_tool_choice", "no_tools", "unknown_function"), "tool_choice"),
    **dict.fromkeys(("bad_tool_name", "duplicate_tool", "bad_tool_parameters"), "tools"),
}
_OPENAI_CODES = {"context_full": "context_length_exceeded"}  # Clients look for it to shorten the conversation.


def status_of(error: MixtralError) -> int:
    """The HTTP status an error has: 4xx where another request would have been answered."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, EngineError):
        return _STATUS.get(error.code, 503 if error.retryable else 400)
    return 400 if isinstance(error, _ASKED_WRONG) else 500


def error_body(path: str, error: MixtralError) -> tuple[int, dict[str, Any]]:
    """The HTTP status, and the body in the form of the API at `path`."""
    status = status_of(error)
    return status, anthropic_error(error) if is_anthropic(path) else openai_error(error)


def is_anthropic(path: str) -> bool:
    """Whether the API at `path` is Anthropic's."""
    return path.startswith("/v1/messages")


def openai_error(error: MixtralError) -> dict[str, Any]:
    """The body, or the data of an event, as OpenAI writes it."""
    status = status_of(error)
    return {
        "error": {
            "message": said(error),
            "type": _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            "param": error.param if isinstance(error, Refused) else None,
            "code": _OPENAI_CODES.get(error.code, error.code),
        }
    }


def anthropic_error(error: MixtralError) -> dict[str, Any]:
    """The same as Anthropic writes it."""
    status = status_of(error)
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    # Claude Code looks for these words to shorten the conversation.
    before = "prompt is too long: " if error.code == "context_full" else ""
    return {"type": "error", "error": {"type": kind, "message": before + said(error)}}


@contextmanager
def refusing(param: str | None = None) -> Generator[None]:
    """Raise what the engine refuses as `Refused`, with the field it is about: `param` if it is about a prompt."""
    try:
        yield
    except Refused:
        raise
    except MixtralError as error:
        about = _PARAMS.get(error.code, param if isinstance(error, PromptError) else None)
        raise Refused(str(error), code=error.code, hint=error.hint, status=status_of(error), param=about) from error


def said(error: MixtralError) -> str:
    """What is wrong and what to do, in one text."""
    return " ".join(part for part in (str(error), error.hint) if part)
