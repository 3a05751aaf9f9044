"""More than a hundred descriptions of a text that are wrong, endless, or far larger than they look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixtral_mlx.engine.grammar import Format


def _nested(key: str, depth: int, wrap: Callable[[Any], Any] = lambda inner: inner) -> Any:
    inner: Any = {"type": "string"}
    for _ in range(depth):
        inner = {key: wrap(inner)}
    return inner


def _text_nest(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def _doubling(rule: str, joint: str, last: str, levels: int) -> str:
    """Rules of which each is twice the next."""
    lines = [f"{rule}{n}: {rule}{n + 1}{joint}{rule}{n + 1}" for n in range(levels)]
    return "\n".join([*lines, f"{rule}{levels}: {last}"])


def _definitions(levels: int, each: Callable[[dict[str, str]], Any], last: Any) -> dict[str, Any]:
    """A schema whose definitions each speak of the next, as `each` says."""
    names = {f"d{n}": each({"$ref": f"#/$defs/d{n + 1}"}) for n in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{levels}": last}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_SCHEMAS: dict[str, Callable[[], Any]] = {
    "objects 5,000 deep": lambda: _nested("properties", 5000, lambda inner: {"a": inner}),
    "arrays 5,000 deep": lambda: _nested("items", 5000),
    "objects 200 deep": lambda: _nested("properties", 200, lambda inner: {"a": inner}),
    "anyOf 5,000 deep": lambda: _nested("anyOf", 5000, lambda inner: [inner, {"type": "null"}]),
    "allOf 5,000 deep": lambda: _nested("allOf", 5000, lambda inner: [inner]),
    "anyOf a million wide": lambda: {"anyOf": [{"const": n} for n in range(10**6)]},
    "anyOf 20,000 patterns wide": lambda: {"anyOf": [{"type": "string", "pattern": f"^{n}+x$"} for n in range(20_000)]},
    "an enum of a million": lambda: {"enum": [f"value {n}" for n in range(10**6)]},
    "an enum of 30,000": lambda: {"enum": [f"value {n}" for n in range(30_000)]},
    "a million properties": lambda: _object(**{f"p{n}": {} for n in range(10**6)}),
    "5,000 optional properties": lambda: {
        "type": "object",
        "properties": {f"p{n}": {"type": "integer"} for n in range(5000)},
        "additionalProperties": False,
    },
    "a million required names": lambda: {"type": "object", "required": [f"p{n}" for n in range(10**6)]},
    "a reference to itself": lambda: {"$ref": "#"},
    "two references to each other": lambda: {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "allOf of itself": lambda: {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    "anyOf of itself": lambda: {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}]}}},
    "an object that must hold itself": lambda: {"$ref": "#/$defs/a", "$defs": {"a": _object(a={"$ref": "#/$defs/a"})}},
    "an array that must hold itself": lambda: {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}},
    },
    "a reference to nothing": lambda: {"$ref": "#/$defs/missing"},
    "a reference up and out": lambda: {"$ref": "#/../../etc/passwd"},
    "a reference to the network": lambda: {"$ref": "https://example.com/schema.json"},
    "a reference to a file": lambda: {"$ref": "file:///etc/passwd"},
    "a reference that is a number": lambda: {"$ref": 5},
    "a chain of 5,000 references": lambda: _definitions(5000, lambda following: following, {"type": "string"}),
    "allOf doubling 40 times": lambda: _definitions(
        40, lambda following: {"allOf": [following, following]}, {"type": "string"}
    ),
    "anyOf doubling 40 times": lambda: _definitions(
        40, lambda following: {"anyOf": [following, following]}, {"type": "string"}
    ),
    "properties doubling 40 times": lambda: _definitions(
        40, lambda following: _object(a=following, b=following), {"type": "string"}
    ),
    "allOf crossed with anyOf": lambda: {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"{n}{k}": {"const": k}}} for k in range(8)]} for n in range(8)
        ]
    },
    "oneOf of overlapping objects": lambda: {
        "oneOf": [{"type": "object", "properties": {f"p{n}": {}}} for n in range(200)]
    },
    "a pattern of nested counts": lambda: {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "a pattern that needs 2^30 states": lambda: {"type": "string", "pattern": "^[ab]*a[ab]{30}$"},
    "a pattern with a look-ahead": lambda: {"type": "string", "pattern": "^(?=.*a)(?!b).*$"},
    "a pattern with a back-reference": lambda: {"type": "string", "pattern": r"^(a+)\1$"},
    "a pattern never closed": lambda: {"type": "string", "pattern": "^(a"},
    "a pattern of a million letters": lambda: {"type": "string", "pattern": "a" * 10**6},
    "letters of all scripts, 10,000 of them": lambda: {"type": "string", "pattern": r"^\p{L}{1,10000}$"},
    "patterns crossed by allOf": lambda: {
        "allOf": [{"type": "string", "pattern": f"[ab]*a[ab]{{{n}}}"} for n in range(5, 25)]
    },
    "a thousand patternProperties": lambda: {
        "type": "object",
        "patternProperties": {f"^{'ab' * (n % 7)}.*{n}$": {"type": "integer"} for n in range(1000)},
    },
    "a string of at least 10^9": lambda: {"type": "string", "minLength": 10**9},
    "a string of at most 10^9": lambda: {"type": "string", "maxLength": 10**9},
    "a string of 10^5 to 10^6": lambda: {"type": "string", "minLength": 10**5, "maxLength": 10**6},
    "an array of at least 10^6": lambda: {"type": "array", "minItems": 10**6},
    "an array of at most 10^9": lambda: {"type": "array", "maxItems": 10**9},
    "arrays of thousands of arrays of thousands": lambda: {
        "type": "array",
        "maxItems": 3000,
        "items": {"type": "array", "maxItems": 3000, "items": {"type": "array", "maxItems": 3000}},
    },
    "arrays with a count, 30 deep": lambda: _nested_counts(30, 100),
    "an object of at least 10^6": lambda: {"type": "object", "minProperties": 10**6},
    "a count below zero": lambda: {"type": "array", "minItems": -1},
    "more than at most": lambda: {"type": "array", "minItems": 3, "maxItems": 2},
    "a range of 10^300": lambda: {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "a range of 3,000 digits": lambda: {"type": "integer", "minimum": 10**3000, "maximum": 10**3001},
    "multiples of 10^-300": lambda: {"type": "number", "multipleOf": 1e-300},
    "multiples of zero": lambda: {"type": "integer", "multipleOf": 0},
    "multiples of a large prime": lambda: {"type": "integer", "multipleOf": 1_000_003},
    "the smallest number of 64 bits": lambda: {"const": -(2**63)},
    "a number that would be another": lambda: {"enum": [[2**53 + 1]]},
    "a number of text and number": lambda: {"allOf": [{"type": "string"}, {"type": "number"}]},
    "nothing at all": lambda: False,
    "a list": lambda: [],
    "a number": lambda: 5,
    "a type nobody has": lambda: {"type": "strng"},
    "a type that is a number": lambda: {"type": 5},
    "properties that are a list": lambda: {"type": "object", "properties": ["a"]},
    "a property that is a number": lambda: {"type": "object", "properties": {"a": 3}},
    "required that is a text": lambda: {"type": "object", "required": "a"},
    "an enum of nothing": lambda: {"enum": []},
    "not a number": lambda: {"const": float("nan")},
    "half a surrogate pair": lambda: {"const": "\ud800"},
    "a set": lambda: {"enum": {1, 2}},
    "keys that are no text": lambda: {"type": "object", "properties": {3: {}, None: {}}},
    "unlike something": lambda: {"not": {"type": "string"}},
    "a condition": lambda: {"if": {"type": "string"}, "then": {"minLength": 3}},
    "items all different": lambda: {"type": "array", "uniqueItems": True},
    "an array that contains": lambda: {"type": "array", "contains": {"const": 1}},
    "names with a schema": lambda: {"type": "object", "propertyNames": {"pattern": "^a"}},
    "what depends on another": lambda: {"type": "object", "dependentRequired": {"a": ["b"]}},
    "what nothing has looked at": lambda: {"type": "object", "unevaluatedProperties": False},
    "a dynamic reference": lambda: {"$dynamicRef": "#node"},
    "a format nobody has": lambda: {"type": "string", "format": "postcode"},
    "the compiler's own switches": lambda: {"not": {}, "x-guidance": {"lenient": True}},
}


def _nested_counts(depth: int, count: int) -> Any:
    inner: Any = {"type": "boolean"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner, "minItems": 1, "maxItems": count}
    return inner


_REGEXES: dict[str, Callable[[], Any]] = {
    "5,000 brackets": lambda: _text_nest("(", "a", ")", 5000),
    "a million letters": lambda: "a" * 10**6,
    "a million alternatives": lambda: "|".join(map(str, range(10**6))),
    "20,000 alternatives of stars": lambda: "|".join(f"(a{n}b*)+" for n in range(20_000)),
    "counts within counts": lambda: "(((a{1,1000}){1,1000}){1,1000}){1,1000}",
    "two counts within counts": lambda: "([a-z]{1,1000}x){1,1000}",
    "a count of a million": lambda: "x{1000000}",
    "counts one after another": lambda: "[a-f]{0,900}" * 300,
    "stars within stars": lambda: _text_nest("(", "a", ")*", 100),
    "2^25 states": lambda: "(a|b)*a(a|b){25}(a|b|c)*b(b|c){25}",
    "many any": lambda: ".*=".join([""] * 60),
    "classes of all scripts": lambda: r"(\p{L}|\p{N}|\w|\W|\S){1,500}" * 20,
    "letters of any case": lambda: "(?i)" + "ſkKß" * 5000,
    "never closed": lambda: "[a-",
    "a look-behind": lambda: "(?<=a)b",
    "a number, no text": lambda: 5,
}

_LARKS: dict[str, Callable[[], Any]] = {
    "empty": lambda: "",
    "no grammar": lambda: "}}{{ %%",
    "a rule that is not there": lambda: "start: other",
    "a rule that is only itself": lambda: "start: start",
    "a rule that never ends": lambda: 'start: "a" start',
    "rules that are each other": lambda: "start: b\nb: c\nc: b",
    "as ambiguous as can be": lambda: 'start: start start start | start start | "a" |',
    "a million alternatives": lambda: "start: " + " | ".join(f'"{n}"' for n in range(10**6)),
    "20,000 alternatives of terminals": lambda: "start: " + " | ".join(f"/{n}[ab]*/" for n in range(20_000)),
    "20,000 rules": lambda: "start: r0\n" + "\n".join(f'r{n}: "a" r{n + 1}' for n in range(20_000)) + '\nr20000: "b"',
    "5,000 brackets": lambda: "start: " + _text_nest("(", '"a"', ")", 5000),
    "5,000 optional brackets": lambda: "start: " + _text_nest("[", '"a"', "]", 5000),
    "rules doubling 40 times": lambda: "start: r0\n" + _doubling("r", " ", '"a"', 40),
    "alternatives doubling 40 times": lambda: "start: r0\n" + _doubling("r", " | ", '"a" "b"', 40),
    "terminals doubling 40 times": lambda: "start: T0\n" + _doubling("T", " ", "/[ab]/", 40),
    "counts within counts": lambda: 'start: ((("a" | "b"){1,1000} "c"){1,1000} "d"){1,1000}',
    "nested json": lambda: "start: %json " + _text_nest('{"items":', "{}", "}", 5000),
    "a schema it cannot keep, leniently": lambda: 'start: %json {"not": {}, "x-guidance": {"lenient": false}}',
    "an import": lambda: "%import common.NOTHING\nstart: NOTHING",
    "a token that is not there": lambda: "start: <[99999999]>",
    "a suffix of anything": lambda: r'start: T "end"' + "\n" + r"T[lazy]: /(.|\n)*a(.|\n){25}/",
}

_CHOICES: dict[str, Callable[[], Any]] = {
    "none": tuple,
    "a million": lambda: tuple(f"choice {n}" for n in range(10**6)),
    "one of ten megabytes": lambda: ("x" * 10**7, "y"),
    "each one longer": lambda: tuple("a" * n for n in range(1, 3000)),
    "numbers": lambda: (1, 2),
    "one text, not a list": lambda: "yes",
}


def hostile() -> dict[str, Callable[[], Format]]:
    """What they are about, and how to make each."""
    kinds = {"json_schema": _SCHEMAS, "regex": _REGEXES, "lark": _LARKS, "choice": _CHOICES}
    return {
        f"{kind}: {name}": lambda kind=kind, make=make: Format(kind, make())  # type: ignore[misc]
        for kind, cases in kinds.items()
        for name, make in cases.items()
    }
