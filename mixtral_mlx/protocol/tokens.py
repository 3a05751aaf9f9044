"""The ids of a text or a conversation, as the model would read them; the shape is vLLM's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from .answers import check_model
from .bodies import Body, read
from .call import Asks, Call, Ready, Refused
from .errors import refusing
from .openai_chat import AnyMessage, FunctionTool, as_tool, as_turns

PATH = "/tokenize"


class TokenizeBody(Body):
    """The body of `/tokenize`: a `prompt`, or `messages` and the `tools` that go with them."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1)] | None = None
    tools: list[FunctionTool] | None = None
    return_token_strs: bool | None = None


def parse(body: object, asks: Asks, *, aliases: Collection[str] = ()) -> Call:
    """The call a body makes. Raises `Refused`."""
    asked = read(PATH, TokenizeBody, body)
    check_model(asked.model, asks, aliases)
    ids = _ids(asked, asks)
    written = [asks.tokenizer.piece(token) for token in ids] if asked.return_token_strs else None
    return Ready({"count": len(ids), "max_model_len": asks.context, "tokens": ids, "token_strs": written})


def _ids(asked: TokenizeBody, asks: Asks) -> list[int]:
    if (asked.prompt is None) == (asked.messages is None):
        raise Refused(
            f"There is {'neither a prompt nor' if asked.prompt is None else 'both a prompt and'} messages.",
            code="bad_value",
            hint="Give one of them.",
            param="prompt",
        )
    if asked.messages is None:
        if asked.tools:
            raise Refused("tools go with messages, not with a prompt.", code="bad_value", param="tools")
        with refusing("prompt"):
            return asks.tokenizer.encode(asked.prompt or "", bos=asked.add_special_tokens is not False)
    if asked.add_special_tokens is not None:
        raise Refused(
            "add_special_tokens is for a prompt: a conversation has its own.",
            code="bad_value",
            param="add_special_tokens",
        )
    with refusing("messages"):
        request = asks.chat_request(as_turns(asked.messages), tools=[as_tool(tool) for tool in asked.tools or ()])
    return list(request.prompt)
