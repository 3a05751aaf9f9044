"""Writes ../schemas.json: 500 JSON schemas such as people ask answers for, from a boolean to nested definitions.

Run it again after a change here; the file is kept so that a test does not depend on how random numbers are drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

COUNT = 500
WORDS = [
    *("name", "title", "city", "price", "count", "tags", "size", "color", "author"),
    *("status", "kind", "value", "notes", "parent", "items", "email", "phone"),
]
ODD_NAMES = ["first name", "größe", "価格", "a/b", 'quo"te', "back\\slash", "$ref", "", "emoji 🙂", "tab\there"]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
PATTERNS = [
    r"^[A-Z]{2}-\d{4}$",
    r"^(\([0-9]{3}\))?[0-9]{3}-[0-9]{4}$",
    r"^#[0-9a-f]{6}$",
    r"^[a-z]+(_[a-z]+)*$",
    r"^\d+\.\d{2}$",
    r"^(yes|no|maybe)$",
    r"^.{1,12}$",
    r"^[^\s]+$",
    r"^[äöüß]{1,5}$",
    r"b",
    r"^a|z$",
    r"\d$",
]


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), **more}


PERSON = _object({"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}})
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": _object(
            {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            additionalProperties=False,
        )
    },
}
LINKED = {
    "$defs": {
        "link": _object(
            {"text": {"type": "string"}, "next": {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]}},
            additionalProperties=False,
        )
    },
    "$ref": "#/$defs/link",
}
EXPRESSION = {
    "$ref": "#/definitions/sum",
    "definitions": {
        "sum": {
            "anyOf": [
                {"type": "number"},
                _object(
                    {
                        "operator": {"enum": ["+", "-", "×"]},
                        "left": {"$ref": "#/definitions/sum"},
                        "right": {"$ref": "#/definitions/sum"},
                    },
                    additionalProperties=False,
                ),
            ]
        }
    },
}
INVOICE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Invoice",
    "$defs": {
        "money": _object({"amount": {"type": "number", "minimum": 0}, "currency": {"enum": ["EUR", "USD", "JPY"]}}),
        "line": _object({"text": {"type": "string", "maxLength": 40}, "price": {"$ref": "#/$defs/money"}}),
    },
    **_object(
        {
            "number": {"type": "string", "pattern": r"^INV-\d{6}$"},
            "date": {"type": "string", "format": "date"},
            "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1, "maxItems": 4},
            "paid": {"type": "boolean"},
        },
        additionalProperties=False,
    ),
}

BY_HAND: list[Any] = [
    True,
    {},
    {"type": "null"},
    {"type": "boolean"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "string"},
    {"type": "array"},
    {"type": "object"},
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean", "null"]},
    {"type": ["object", "array"]},
    {"const": None},
    {"const": {"a": [1, 2.5, {"b": "ä"}]}},
    {"const": ""},
    {"enum": [1, "a", None, [1], {"b": 2}]},
    {"enum": ['quo"te', "back\\slash", "new\nline", "🙂", "漢字", "a/b", "\u2028"]},
    {"type": "string", "enum": ["a", "ab", "abc", "b"]},
    {"type": "string", "minLength": 3},
    {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "minLength": 0, "maxLength": 0},
    {"type": "string", "pattern": "^a+$", "minLength": 3, "maxLength": 5},
    {"minLength": 3},
    {"minimum": 3},
    {"required": ["a"]},
    {"type": "integer", "minimum": 0},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    {"type": "integer", "minimum": 100, "maximum": 12345},
    {"type": "integer", "multipleOf": 7, "minimum": 100},
    {"type": "integer", "minimum": 0.5, "maximum": 7.5},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "minimum": -1.25, "maximum": 3.75},
    {"type": "number", "multipleOf": 0.5},
    {"type": "array", "items": {"type": "integer"}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": {"type": "string"}, "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": {"type": "boolean"}},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "minItems": 2, "items": False},
    {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "maxItems": 3}, "maxItems": 3},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a", "z"]},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^n_": {"type": "integer"}, "^s_": {"type": "string"}}},
    {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": 0}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {
        "allOf": [
            _object({"a": {"type": "string", "maxLength": 5}}),
            _object({"b": {"type": "integer"}}),
        ]
    },
    {"$ref": "#/$defs/text", "minLength": 3, "$defs": {"text": {"type": "string", "maxLength": 9}}},
    {"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"type": "boolean"}}},
    {"$ref": "#/properties/a", "properties": {"a": {"type": "null"}}},
    PERSON,
    {"type": "array", "items": PERSON, "maxItems": 3},
    TREE,
    LINKED,
    EXPRESSION,
    INVOICE,
    _object({name: {"type": "integer"} for name in ODD_NAMES}),
    _object({f"property_{n}": {"type": "boolean"} for n in range(40)}, additionalProperties=False),
    {"type": "object", "properties": {f"p{n}": {"type": "boolean"} for n in range(60)}, "additionalProperties": False},
    {"enum": [f"choice number {n}" for n in range(300)]},
    *({"type": "string", "format": name} for name in FORMATS),
    *({"type": "string", "pattern": pattern} for pattern in PATTERNS),
    _object({name: {"type": "string", "format": name} for name in FORMATS}),
]


class Author:
    """Writes schemas no deeper than it is asked to, from a seed."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.definitions: dict[str, Any] = {}

    def document(self, depth: int) -> Any:
        """A whole schema, some with definitions of their own."""
        self.definitions = {}
        if depth and self.pick.random() < 0.4:
            for name in self.pick.sample(WORDS, self.pick.randint(1, 3)):
                self.definitions[name] = self.schema(depth - 1)
        schema = self.schema(depth)
        if self.definitions:
            schema = {**schema, "$defs": self.definitions}
        return schema

    def schema(self, depth: int) -> Any:
        kinds = [self.string, self.number, self.constant, self.flag]
        if depth:
            kinds += [self.object] * 4 + [self.array] * 2 + [self.tuple, self.either]
        if self.definitions:
            kinds += [self.reference] * 2
        return self.pick.choice(kinds)(depth)

    def string(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "string"}
        kind = self.pick.random()
        if kind < 0.2:
            schema["format"] = self.pick.choice(FORMATS)
        elif kind < 0.4:
            schema["pattern"] = self.pick.choice(PATTERNS)
        elif kind < 0.7:
            schema["maxLength"] = self.pick.randint(3, 30)
            if self.pick.random() < 0.5:
                schema["minLength"] = self.pick.randint(0, 3)
        return schema

    def number(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": self.pick.choice(["integer", "number"])}
        low = self.pick.randint(-1000, 1000)
        if self.pick.random() < 0.5:
            schema[self.pick.choice(["minimum", "exclusiveMinimum"])] = low
        if self.pick.random() < 0.5:
            schema[self.pick.choice(["maximum", "exclusiveMaximum"])] = low + self.pick.choice([2, 9, 10_000])
        if self.pick.random() < 0.1:
            schema = {"type": "integer", "multipleOf": self.pick.choice([2, 5, 10, 12])}
        return schema

    def constant(self, depth: int) -> Any:
        values = self.pick.sample([*WORDS, 0, 1, -2.5, True, False, None, "é", "🙂", 'quo"te'], self.pick.randint(1, 6))
        return {"const": values[0]} if len(values) == 1 else {"enum": values}

    def flag(self, depth: int) -> Any:
        return {"type": self.pick.choice(["boolean", "null", ["boolean", "null"]])}

    def object(self, depth: int) -> Any:
        names = self.pick.sample([*WORDS, *ODD_NAMES], self.pick.randint(1, 5))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth - 1) for name in names},
        }
        required = [name for name in names if self.pick.random() < 0.7]
        if required:
            schema["required"] = required
        if self.pick.random() < 0.7:
            schema["additionalProperties"] = False
        elif self.pick.random() < 0.5:
            schema["additionalProperties"] = self.schema(0)
        return schema

    def array(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth - 1)}
        if self.pick.random() < 0.7:
            schema["maxItems"] = self.pick.randint(1, 5)
            schema["minItems"] = self.pick.randint(0, schema["maxItems"])
        return schema

    def tuple(self, depth: int) -> Any:
        parts = [self.schema(depth - 1) for _ in range(self.pick.randint(1, 3))]
        return {
            "type": "array",
            "prefixItems": parts,
            "items": self.pick.choice([False, {"type": "integer"}]),
            "minItems": self.pick.randint(0, len(parts)),
        }

    def either(self, depth: int) -> Any:
        return {"anyOf": [self.schema(depth - 1) for _ in range(self.pick.randint(2, 3))]}

    def reference(self, depth: int) -> Any:
        return {"$ref": f"#/$defs/{self.pick.choice(sorted(self.definitions))}"}


def schemas() -> list[Any]:
    author = Author(6)
    return [*BY_HAND, *(author.document(n % 4) for n in range(COUNT - len(BY_HAND)))]


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "schemas.json"
    lines = ",\n".join(json.dumps(schema, ensure_ascii=False, separators=(",", ":")) for schema in schemas())
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
