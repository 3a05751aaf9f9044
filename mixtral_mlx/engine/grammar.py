"""Structured output: what a text must be, compiled by llguidance, and which tokens may come next in one text.

A text is compiled here only after a process of its own has shown (proof.py) that this takes little time, memory and
stack: the compiler cannot be interrupted, and overflows its stack at, say, a chain of 3,000 `$ref`s. Following a
grammar is held down by llguidance's limits on each step. What a schema may say is schemas.py's; nothing here
knows models, MLX, prompts or chats."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from . import proof
from .schemas import MOST_DEPTH, GrammarError, check_schema, schemas_within
from .vocabulary import Vocabulary

__all__ = ["Compiler", "Format", "Grammar", "GrammarError", "Limits", "Matcher", "Vocabulary", "compiled"]

if TYPE_CHECKING:
    from llguidance import LLMatcher

Kind = Literal["json_schema", "json_object", "regex", "lark", "choice"]
_MOST_KEPT = 16
_KEPT_TEXT = 8 << 10  # Larger ones are rare, and may take much memory.

# As json.dumps writes, and most of what models have read. Free white space would cost a choice at every comma, and
# a model that is unsure can fill a whole answer with it.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


@dataclass(frozen=True)
class Format:
    """What a text must be: `value` is a schema, None, a regex of the whole text, a Lark grammar, or some texts."""

    kind: Kind
    value: Any = None


@dataclass(frozen=True)
class Limits:
    """What a grammar may cost; more ends in `GrammarError`.

    The process that proves it gets `cpu_seconds`, `memory_bytes` and `stack_bytes`; `seconds` of waiting are for a
    machine that is too busy to give it those. `step_seconds` is CPU time for the tokens allowed at one place."""

    text_bytes: int = 256 << 10
    unproved_text_bytes: int = 8 << 10
    seconds: float = 5.0
    cpu_seconds: float = 0.25
    memory_bytes: int = 96 << 20
    stack_bytes: int = 4 << 20
    step_seconds: float = 0.1
    items_in_row: int = 600
    lexer_states: int = 50_000
    symbols: int = 100_000


class Grammar:
    """A compiled `Format`; shared by any number of requests."""

    def __init__(self, root: LLMatcher, vocabulary: Vocabulary, limits: Limits, *, begins: bool) -> None:
        self._root, self._vocabulary, self._limits, self._begins = root, vocabulary, limits, begins

    def matcher(self) -> Matcher:
        """One text's own place in the grammar, at its beginning."""
        return Matcher(self._root.deep_copy(), self._vocabulary, self._limits, begins=self._begins)


class Matcher:
    """Follows one text, token by token. A text too hard to follow raises `GrammarError`, and ends there."""

    def __init__(self, inner: LLMatcher, vocabulary: Vocabulary, limits: Limits, *, begins: bool) -> None:
        self._inner, self._vocabulary, self._limits, self._begins = inner, vocabulary, limits, begins
        self._count = 0
        self._ended = False

    def mask(self) -> np.ndarray:
        """The tokens allowed now, (V,) bools; an end token where the text may end.

        Where the next letters are certain that is only the token the tokenizer itself would write them with."""
        before = time.thread_time()
        bits = self._inner.compute_bitmask()
        self._check(time.thread_time() - before)
        mask = self._vocabulary.bools(bits)
        if self._ended:
            mask[:] = False
        for token in self._vocabulary.end_tokens:
            mask[token] = self.may_end
        if self._begins and not self._count:
            mask[self._vocabulary.kept_spaces] = False
        if not mask.any():
            raise _nothing_fits()
        return mask

    def advance(self, token: int) -> None:
        """The text goes on with `token`, which must be allowed."""
        ends = token in self._vocabulary.end_tokens
        if self._ended or (ends and not self.may_end):
            raise GrammarError(f"The text {'has ended' if self._ended else 'may not end yet'}.", code="bad_grammar")
        if ends:
            self._ended = True
            return
        self._inner.consume_token(token)
        self._check()
        self._count += 1

    @property
    def may_end(self) -> bool:
        """Whether the text is complete as it is."""
        return self._inner.is_accepting()

    @property
    def must_end(self) -> bool:
        """Whether nothing but its end may follow."""
        return self._ended or self._inner.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as the grammar leaves no choice."""
        tokens = self._inner.compute_ff_tokens()
        self._check()
        return tokens

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` `advance` would take, one after the other, before any end."""
        tokens = list(itertools.takewhile(self._vocabulary.is_text, tokens))
        if self._begins and not self._count and tokens and tokens[0] in self._vocabulary.kept_spaces:
            return 0
        return self._inner.validate_tokens(tokens)

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens, an end being one."""
        if count and self._ended:
            self._ended = False
            count -= 1
        assert 0 <= count <= self._count
        self._inner.rollback(count)
        self._check()
        self._count -= count

    def _check(self, seconds: float = 0) -> None:
        if self._inner.is_error():
            raise _refused(self._inner.get_error())
        if seconds > self._limits.step_seconds:
            raise _too_slow(f"took {seconds:.2f} s for one token")


class Compiler:
    """Compiles formats for one vocabulary, on any thread; what was asked for lately is not compiled again."""

    def __init__(self, make_vocabulary: Callable[[], Vocabulary]) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, format: Format, *, begins: bool = True) -> Grammar:
        """As the function of that name does."""
        limits = Limits()
        text = _written(format, limits, begins=begins)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            vocabulary = self._vocabulary
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
        grammar = _compiled(text, vocabulary, limits, begins=begins)
        if len(text) <= _KEPT_TEXT:
            with self._lock:
                self._kept[text] = grammar
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
        return grammar


def compiled(format: Format, vocabulary: Vocabulary, *, begins: bool = True, limits: Limits = Limits()) -> Grammar:
    """Compile `format` on the calling thread, in less than a second. Raises `GrammarError`.

    With `begins` the text comes where a detokenizer drops one first space, as after `[/INST]`: that space comes
    first, and the grammar speaks of what is shown."""
    return _compiled(_written(format, limits, begins=begins), vocabulary, limits, begins=begins)


def _written(format: Format, limits: Limits, *, begins: bool) -> str:
    """`format` as the compiler reads it."""
    body = _body(format, limits)
    grammars: list[dict[str, Any]] = [{"name": "text", **body}]
    if begins:
        grammars.insert(0, {"lark_grammar": 'start: " " @text'})
    return _json({"grammars": grammars})


def _compiled(text: str, vocabulary: Vocabulary, limits: Limits, *, begins: bool) -> Grammar:
    _prove(text, limits)
    from llguidance import LLMatcher, LLParserLimits

    root = LLMatcher(vocabulary.compiler, text, log_level=0, limits=LLParserLimits(**_parser_limits(limits)))
    if root.is_error():
        raise _refused(root.get_error())
    # What the first place costs is paid here, for all texts.
    Matcher(root, vocabulary, limits, begins=begins).mask()
    return Grammar(root, vocabulary, limits, begins=begins)


# A format as the compiler reads it.


def _body(format: Format, limits: Limits) -> dict[str, Any]:
    _check_size(format.value, limits)
    match format.kind:
        case "json_schema":
            check_schema(format.value)
            if format.value is False:
                raise _nothing_fits()
            return {"json_schema": {**({} if format.value is True else format.value), "x-guidance": _LAYOUT}}
        case "json_object":
            return {"json_schema": {"type": "object", "x-guidance": _LAYOUT}}
        case "regex":
            return {"lark_grammar": _regex(_text(format))}
        case "lark":
            for schema in schemas_within(_text(format)):
                check_schema(schema, embedded=True)
            return {"lark_grammar": _text(format)}
        case "choice":
            return {"lark_grammar": _choice(format.value)}
    raise _expected(f"The kind of format is {format.kind!r}", ", ".join(get_args(Kind)))


def _check_size(value: Any, limits: Limits) -> None:
    """Refuse what is too large or too deep before anything walks through all of it."""
    left, waiting = limits.text_bytes, [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        inner = _parts(part)
        left -= len(part) if isinstance(part, str) else 2
        if depth > 2 * MOST_DEPTH or len(inner) > left or left < 0:
            raise _too_large(f"is larger than {limits.text_bytes >> 10} KiB or more than {MOST_DEPTH} levels deep")
        if isinstance(part, dict) and (wrong := [key for key in part if not isinstance(key, str)]):
            raise _expected(f"The format has the key {wrong[0]!r}", "text")
        waiting += [(one, depth + 1) for one in inner]


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list | tuple) else ()


def _text(format: Format) -> str:
    if not isinstance(format.value, str):
        raise _expected(f"A {format.kind} format is {type(format.value).__name__}", "text")
    return format.value


def _regex(pattern: str) -> str:
    from llguidance import LLMatcher

    grammar: str = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
    return grammar


def _choice(texts: Any) -> str:
    if not isinstance(texts, tuple | list) or not texts or not all(isinstance(text, str) for text in texts):
        raise _expected("A choice is not a list of texts, or an empty one", "at least one text")
    return "start: TEXT\nTEXT: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"The format is no JSON: {error}", code="bad_grammar") from error
    return text


# What it costs.


def _parser_limits(limits: Limits) -> dict[str, Any]:
    return {
        "max_items_in_row": limits.items_in_row,
        "max_lexer_states": limits.lexer_states,
        "max_grammar_size": limits.symbols,
        "verbose_errors": False,
    }


def _prove(text: str, limits: Limits) -> None:
    """Raise `GrammarError` unless another process could compile `text` within `limits`."""
    if not _is_python(sys.executable):
        # Within an app that brings its own Python there is nobody to ask; this much no stack is too small for.
        if len(text.encode()) > limits.unproved_text_bytes:
            raise _too_large(f"is larger than {limits.unproved_text_bytes >> 10} KiB, which is what this app can check")
        return
    task = {
        "library": _library_file(),
        "grammar": text,
        "limits": _parser_limits(limits),
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "stack_bytes": limits.stack_bytes,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", proof.__file__],
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=limits.seconds,
            process_group=0,  # Ctrl-C is for us, not for it.
        )
    except subprocess.TimeoutExpired as error:
        raise _too_slow("takes too long to compile") from error
    if done.returncode == proof.TOO_SLOW:
        raise _too_slow("takes too long to compile")
    if done.returncode:
        raise _too_large("takes too much memory or stack to compile")
    if done.stdout:
        raise _refused(done.stdout.decode(errors="replace"))


def _is_python(executable: str | None) -> bool:
    return Path(executable or "").name.lower().startswith("python") and not hasattr(sys, "frozen")


def _library_file() -> str:
    from llguidance import _lib

    return os.fspath(_lib.__file__)


# Errors.

_UNSUPPORTED = ("Unimplemented", "not supported", "only supported", "Unknown format", "not disjoint", "look-around")
_LARGE = ("too big", "schema too large", "too many", "Too many", "too deep", "too complex", "limit", "max is", "fuel")


def _refused(message: str) -> GrammarError:
    """What llguidance said, as one of ours."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("<")]
    said = " ".join(lines)[:300]
    if any(sign in message for sign in _UNSUPPORTED):
        return GrammarError(f"The grammar asks for what cannot be enforced: {said}", code="unsupported_schema")
    if any(sign in message for sign in _LARGE):
        return _too_large(f"is too much: {said}")
    return GrammarError(f"The grammar cannot be followed: {said}", code="bad_grammar")


def _nothing_fits() -> GrammarError:
    return GrammarError("No text at all fits the grammar.", code="bad_grammar")


def _too_large(what: str) -> GrammarError:
    return GrammarError(f"The grammar {what}.", code="grammar_too_large", hint="Make it smaller or simpler.")


def _too_slow(what: str) -> GrammarError:
    return GrammarError(f"The grammar {what}.", code="grammar_too_slow", hint="Make it smaller or simpler.")


def _expected(found: str, expected: str) -> GrammarError:
    return GrammarError(f"{found}, expected {expected}.", code="bad_grammar")
