"""What the text of an answer must be, as `response_format` says it, and as the engine is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..engine.grammar import Format
from .bodies import Body


class AnyText(Body):
    type: Literal["text"]

    def format(self) -> Format | None:
        return None


class AnyObject(Body):
    """Any JSON object."""

    type: Literal["json_object"]

    def format(self) -> Format | None:
        return Format("json_object")


class Schema(Body):
    """A JSON schema, which is always kept to: `strict` changes nothing."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: Schema

    def format(self) -> Format | None:
        return schema_format(self.json_schema.schema_)


class RegexFormat(Body):
    """Ours: a regular expression of the whole text."""

    type: Literal["regex"]
    regex: str

    def format(self) -> Format | None:
        return Format("regex", self.regex)


class LarkFormat(Body):
    """Ours: a grammar as Lark writes it."""

    type: Literal["lark"]
    lark: str

    def format(self) -> Format | None:
        return Format("lark", self.lark)


class ChoiceFormat(Body):
    """Ours: one of some texts."""

    type: Literal["choice"]
    choice: Annotated[list[str], Field(min_length=1)]

    def format(self) -> Format | None:
        return Format("choice", tuple(self.choice))


ResponseFormat = Annotated[
    AnyText | AnyObject | SchemaFormat | RegexFormat | LarkFormat | ChoiceFormat, Field(discriminator="type")
]


def schema_format(schema: dict[str, Any] | None) -> Format:
    """The format for a schema; without one any object will do."""
    return Format("json_object") if schema is None else Format("json_schema", schema)
