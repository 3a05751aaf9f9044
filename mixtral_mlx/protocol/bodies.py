"""A decoded JSON body → a pydantic model, or a refusal that names the field.

First everything is walked over once, without recursion, for what is no JSON, no Unicode or too deep; so nothing
behind this has to look out for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from .call import Refused
from .fields import known, shown

_DEEPEST = 80
_MOST_STOPS = 64
_B = TypeVar("_B", bound="Body")


class Body(BaseModel):
    """An object in a request: no field but those it names, and no value turned into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def read(path: str, model: type[_B], body: object) -> _B:
    """`body` as the `model` of the API at `path`. Raises `Refused`."""
    check_json(body)
    if not isinstance(body, dict):
        raise Refused(f"The body is {_kind(body)}, expected an object.", code="bad_body")
    fields = known(path, body)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refused(error, fields) from None


def check_json(body: object) -> None:
    """Raise `Refused` for what no JSON text can say, for text that is no Unicode, and for what is nested too deep."""
    waiting: list[tuple[object, tuple[str | int, ...]]] = [(body, ())]
    while waiting:
        value, where = waiting.pop()
        if len(where) > _DEEPEST:
            raise Refused(f"The body is nested more than {_DEEPEST} deep.", code="too_deep", param=dotted(where[:1]))
        if isinstance(value, dict):
            for key in value:
                _check_text(key, where)
            waiting += [(one, (*where, key)) for key, one in value.items()]
        elif isinstance(value, list):
            waiting += [(one, (*where, place)) for place, one in enumerate(value)]
        elif isinstance(value, str):
            _check_text(value, where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{dotted(where)} is {value}, which is no JSON.", code="bad_number", param=dotted(where))
        elif not isinstance(value, int | float | None):
            raise Refused(f"{dotted(where)} is {type(value).__name__}, which is no JSON.", param=dotted(where))


def dotted(where: Sequence[str | int]) -> str:
    """A place in a body as `messages.0.content`."""
    return ".".join(str(part)[:80].encode(errors="replace").decode() for part in where) or "The body"


def _check_text(text: object, where: Sequence[str | int]) -> None:
    if not isinstance(text, str):
        raise Refused(f"A key in {dotted(where)} is {type(text).__name__}, expected text.", code="bad_body")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{dotted(where)} holds half of a surrogate pair at character {error.start}, which is no Unicode text.",
            code="not_unicode",
            hint="It was probably cut in the middle of a character.",
            param=dotted(where),
        ) from None


def _kind(value: object) -> str:
    for kind, name in ((bool, "true or false"), (str, "text"), (list, "a list"), (int | float, "a number")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else type(value).__name__


# What pydantic found, in our words.

_MEDIA = ("image", "audio", "file", "document", "video")


def _refused(error: ValidationError, body: object) -> Refused:
    """The first thing that is wrong."""
    found = error.errors(include_url=False, include_context=True)[0]
    kind, where = found["type"], _place(found["loc"], body, missing=found["type"] in ("missing", "extra_forbidden"))
    name, context = dotted(where), found.get("ctx", {})
    if kind == "missing":
        return Refused(f"{name} is missing.", code="missing_field", hint="Add it.", param=name)
    if kind == "extra_forbidden":
        return Refused(f"There is no field {name}.", code="unknown_field", hint="Leave it out.", param=name)
    if kind == "union_tag_invalid":
        key = str(context.get("discriminator")).strip("'")
        key = "type" if key.endswith("()") else key  # A function of ours, which looked at the type.
        expected = str(context.get("expected_tags"))
        return _unexpected(str(context.get("tag")), f"{name}.{key}", expected)
    if kind == "union_tag_not_found":
        name = f"{name}.{str(context.get('discriminator')).strip(chr(39))}"
        return Refused(f"{name} is missing.", code="missing_field", hint="Add it.", param=name)
    if kind == "literal_error" and isinstance(found.get("input"), str):
        return _unexpected(found["input"], name, str(context.get("expected")))
    said = found["msg"].removeprefix("Value error, ")
    given = found.get("input")
    return Refused(f"{name} is {shown_kind(given)}: {said}.", code="bad_value", param=name)


def _unexpected(tag: str, name: str, expected: str) -> Refused:
    if name.startswith("tools"):
        return Refused(
            f"{name} is {shown(tag)}, expected {expected}.",
            code="unsupported_tool",
            hint="Nothing but the model runs here: offer a function that the client runs.",
            param=name,
        )
    if any(medium in tag for medium in _MEDIA):
        return Refused(
            f"{name} is {shown(tag)}, and Mixtral reads text only.",
            code="unsupported_content",
            hint="Put what it says into words.",
            param=name,
        )
    return Refused(f"{name} is {shown(tag)}, expected {expected}.", code="unsupported_type", param=name)


def shown_kind(value: object) -> str:
    """A value for a message, whatever it is."""
    return shown(value) if isinstance(value, dict | list | str | int | float | None) else type(value).__name__


def _place(loc: Sequence[str | int], body: object, *, missing: bool) -> list[str | int]:
    """Where in the body an error is: pydantic's place also names the branches of unions it took."""
    place: list[str | int] = []
    for part in loc:
        if (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body)
        ):
            body = body[part]  # type: ignore[index]
            place.append(part)
    if missing and (not place or place[-1] != loc[-1]):
        place.append(loc[-1])
    return place


# Shapes that several APIs share.


def _text_or_list(value: object) -> str:
    return "list" if isinstance(value, list) else "text"


_T = TypeVar("_T")
TextOr = Annotated[Annotated[str, Tag("text")] | Annotated[_T, Tag("list")], Discriminator(_text_or_list)]
"""Text, or a list of something."""


def joined(texts: Iterable[str]) -> str:
    """Parts of a message as one text, apart as mistral-common puts them."""
    return "\n\n".join(texts)


Stop = TextOr[Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MOST_STOPS)]]


def stops(given: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings as the engine takes them."""
    return (given,) if isinstance(given, str) else tuple(given or ())
