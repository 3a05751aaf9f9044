"""A conversation with a model: its turns, system prompt, settings and commands.

Reads no keyboard and prints nothing; what follows from a line comes back as an `Outcome`. MLX is imported only when a
reply is generated."""

from __future__ import annotations

import difflib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import MixtralError, exists, read_json
from .prompt import Message
from .writing import write_whole

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .engine.reply import Reply
    from .engine.request import Done
    from .generate import Sampling, Usage
    from .weights import Loaded


class ChatError(MixtralError):
    """A command that does not exist or cannot be done, or a conversation that no longer fits."""


# Settings: what --options and /set have in common.


@dataclass(frozen=True)
class Setting:
    """A number from `low` to `high`, or text, that says how to generate."""

    kind: type[int | float | str]
    help: str
    low: float = 0
    high: float = 1


SETTINGS = {
    "temperature": Setting(float, "0 takes the likeliest token, more is bolder", 0, 100),
    "top_p": Setting(float, "choose among the likeliest that make up this share"),
    "top_k": Setting(int, "choose among this many of the likeliest, 0 for all", 0, 1 << 20),
    "min_p": Setting(float, "leave out what is below this × the likeliest"),
    "repetition_penalty": Setting(float, "above 1 makes recent tokens less likely", 0, 100),
    "presence_penalty": Setting(float, "taken from the score of every recent token", -100, 100),
    "frequency_penalty": Setting(float, "the same for each time a token came", -100, 100),
    "seed": Setting(int, "same seed, same text", 0, (1 << 64) - 1),
    "max_tokens": Setting(int, "stop after this many tokens", 1, 1 << 31),
    "min_tokens": Setting(int, "do not end by itself before so many", 0, 1 << 31),
    "stop": Setting(str, r"end at this text (\n, \t, \\, \xNN, \uNNNN work)"),
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting written as `text`; raises `ValueError` that says what is wrong with it."""
    setting = SETTINGS[name]
    if setting.kind is str:
        return _unescaped(text)
    try:
        value: Any = setting.kind(text)
    except ValueError:
        value = math.nan
    if not setting.low <= value <= setting.high:
        kind = "a whole number" if setting.kind is int else "a number"
        raise ValueError(f"is {text!r}, expected {kind} from {setting.low} to {setting.high}")
    return value


def _unescaped(text: str) -> str:
    if not text:
        raise ValueError("is empty, expected text of at least one character")

    def character(found: re.Match[str]) -> str:
        code = found[1] or found[2]
        if code:
            return chr(int(code, 16))
        if found[3] not in _ESCAPES:
            raise ValueError(rf"holds {found[0]!r}, expected \n, \t, \r, \\, \xNN or \uNNNN")
        return _ESCAPES[found[3]]

    return re.sub(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.?))", character, text, flags=re.DOTALL)


@dataclass(frozen=True)
class Ready:
    """A model that answers, and what people call it."""

    name: str
    engine: Engine
    is_demo: bool = False

    @property
    def loaded(self) -> Loaded:
        """What is in memory; loaded again where another model was to take its place, and neither could be."""
        if not self.engine.loaded:
            self.engine.load()
        assert self.engine.loaded, "a chat does not let go of its model"
        return self.engine.loaded

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that hold where a chat chose no others."""
        # The demo knows one right answer to most questions; a real model speaks better with some freedom.
        return {} if self.is_demo else {"temperature": 0.7, "top_p": 0.95}

    def __str__(self) -> str:
        plan = self.loaded.plan
        memory = f"resident, {shown_bytes(self.loaded.weights_bytes)}"
        if self.loaded.streaming:
            budget = shown_bytes(plan.budget_bytes)
            memory = f"{plan.slots_per_layer} of {self.loaded.config.num_local_experts} experts in memory, {budget}"
        return f"{self.name} · {self.loaded.dtype} · {memory} · context {self.engine.context:,}"


def shown_bytes(count: int) -> str:
    """Bytes as people read them: `10.9 MB`, `26.3 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def peak_bytes() -> int:
    """The most memory the process has used so far."""
    import mlx.core as mx

    from .memory import peak_rss_bytes

    # A Mac does not count the GPU's memory as the process's resident memory.
    return max(peak_rss_bytes(), int(mx.get_peak_memory()))


@contextmanager
def mlx_failures() -> Iterator[None]:
    """Say it in words when MLX cannot go on, as when memory has run out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise ChatError(
            f"MLX could not go on: {error}",
            code="mlx_failed",
            hint="If memory ran out, a smaller --context or --kv-bits 4 takes less.",
        ) from error


# The conversation.


@dataclass(frozen=True)
class Turn:
    """What the person said, and what the model answered."""

    user: str
    reply: str


@dataclass(frozen=True)
class Outcome:
    """What follows from a line: show `text`; then answer with `Session.reply`, have `edit` edited, or leave."""

    text: str = ""
    answer: bool = False
    edit: str | None = None
    leave: bool = False


class Session:
    """A conversation with one model: its turns, system prompt, settings and commands.

    A line goes to `handle`. When that asks for an answer, `reply` generates it; the turn is complete once its iterator
    ends or is closed, and a partial reply is kept. `waiting` is a message that has no reply yet. Where
    /regen or /edit bring no other reply, the turn is put back.
    `open_model` is given a name, and the engine whose place in memory the new model takes."""

    def __init__(
        self,
        ready: Ready,
        open_model: Callable[[str, Engine], Ready],
        *,
        system: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.ready = ready
        self.open_model = open_model
        self.system = system
        self.settings: dict[str, Any] = {}
        self._adopt(dict(settings or {}))
        self.turns: list[Turn] = []
        self.waiting = ""
        self.stats = False
        self.ended: Done | None = None
        self._replaced: Turn | None = None
        self._is_put_back = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.ready.engine.close()

    def handle(self, line: str) -> Outcome:
        """Take a line the person entered: a message, or a command; raises `MixtralError` and changes nothing."""
        if not line.startswith("/"):
            return self.say(line)
        if line.startswith("//"):
            return self.say(line[1:])
        name, *rest = line[1:].split(maxsplit=1) or [""]
        if name not in COMMANDS:
            raise ChatError(f"There is no command /{name}.", code="unknown_command", hint=_suggestion(name))
        argument = "".join(rest).strip()
        if argument and not COMMANDS[name].usage:
            raise ChatError(
                f"/{name} stands alone, got {_shortened(argument)!r} after it.",
                code="unexpected_argument",
                hint="// sends a message with a slash.",
            )
        return COMMANDS[name].run(self, argument)

    def say(self, text: str) -> Outcome:
        """Take a message as it is."""
        self.waiting = text
        return Outcome(answer=True)

    def reply(
        self,
        *,
        on_prompt: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[str]:
        """Answer the waiting message, text as it comes; raises `MixtralError` with the message left waiting, or with
        the turn that it was to replace put back.

        `on_prompt(done, total)` tells how much of the prompt is read; `cancelled` is asked whenever something comes."""
        from .engine.request import Request

        self._is_put_back = False
        try:
            reply = self.ready.engine.submit(Request(tuple(self._prompt()), self.sampling()))
        except MixtralError:
            self._put_back()
            raise
        return self._listen(reply, on_prompt or (lambda done, total: None), cancelled or (lambda: False))

    def _listen(
        self, reply: Reply, on_prompt: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> Iterator[str]:
        from .engine.request import Done, PromptProgress, Text, Token

        text, is_stopped, self.ended = "", False, None
        try:
            with reply:
                for event in reply:
                    if not is_stopped and cancelled():
                        is_stopped = True
                        reply.cancel()
                    if isinstance(event, Done):
                        self.ended = replace(event, finish_reason="cancelled") if is_stopped else event
                    elif isinstance(event, PromptProgress):
                        on_prompt(event.done, event.total)
                    elif isinstance(event, Token | Text) and not is_stopped:
                        text += event.text
                        yield event.text
        finally:
            # A reply without a word cannot stand in a conversation; the message waits for another try.
            if text.strip():
                self.turns.append(Turn(self.waiting, text))
                self.waiting, self._replaced = "", None
            else:
                self._put_back()

    def _put_back(self) -> None:
        if self._replaced:
            self.turns.append(self._replaced)
            self.waiting, self._replaced, self._is_put_back = "", None, True

    def sampling(self) -> Sampling:
        """The settings in force."""
        from .generate import Sampling

        return Sampling(**{**self.ready.defaults, **self.settings})

    def remark(self) -> str:
        """What there is to say about how the last reply ended, if anything."""
        if self._is_put_back:
            return "[no reply; the earlier one stays]"
        if self.waiting:
            return "[no reply; /regen asks again, /edit changes the message]"
        if self.ended is None:
            return ""
        if self.ended.finish_reason == "cancelled":
            return "[stopped]"
        if self.ended.finish_reason == "length":
            usage, room = self.ended.usage, self.ready.engine.context
            used = usage.prompt_tokens + usage.completion_tokens
            if used >= room:
                return f"[the context is full, {used:,} of {room:,} tokens: /drop N forgets the N oldest turns]"
            return f"[cut off after {usage.completion_tokens:,} tokens, see /set max_tokens]"
        return ""

    def statistics(self) -> str:
        """Speed, first-token time and memory of the last reply, in a line."""
        if self.ended is None:
            return "No reply yet."
        use: Usage = self.ended.usage
        return (
            f"[{use.completion_tokens:,} tokens, {use.generation_tps:.1f} tok/s · "
            f"first token {use.prompt_seconds:.2f} s · "
            f"prompt {use.prompt_tokens:,} ({use.cached_tokens:,} cached) · "
            f"memory peak {shown_bytes(peak_bytes())}{self._streamed()}]"
        )

    def _streamed(self) -> str:
        """What streaming experts has taken since the model was loaded."""
        streaming = self.ready.loaded.streaming
        if streaming is None:
            return ""
        done = streaming.statistics
        return (
            f" · experts {done.hits / max(done.hits + done.misses, 1):.0%} in memory when asked for, "
            f"{shown_bytes(done.bytes_read)} read in {done.io_s:.1f} s, waited {done.stall_s:.1f} s, "
            f"{done.ahead_used:,} of {done.ahead_reads:,} guesses right"
        )

    def _prompt(self) -> list[int]:
        prompt = self._encoded(self.turns)
        room = self.ready.engine.context
        if len(prompt) >= room:
            raise ChatError(
                f"The conversation with this message is {len(prompt):,} tokens long, the context holds {room:,}.",
                code="context_full",
                hint=self._what_to_drop(),
            )
        return prompt

    def _encoded(self, turns: Sequence[Turn]) -> list[int]:
        messages = [Message("system", self.system)] if self.system else []
        for turn in turns:
            messages += [Message("user", turn.user), Message("assistant", turn.reply)]
        return self.ready.engine.tokenizer.encode_chat([*messages, Message("user", self.waiting)])

    def _what_to_drop(self) -> str:
        """The fewest oldest turns to forget so that an eighth of the context is free for the answer."""
        target = self.ready.engine.context * 7 // 8
        sizes = range(1, len(self.turns) + 1)
        index = bisect_left(sizes, True, key=lambda n: len(self._encoded(self.turns[n:])) <= target)
        if index == len(sizes):
            return f"The message alone is {len(self._encoded([])):,} tokens long: /edit makes it shorter."
        count = sizes[index]
        left = len(self._encoded(self.turns[count:]))
        return (
            f"/drop {count} forgets the oldest {_turns(count)} and leaves {left:,} tokens, /clear forgets everything; "
            f"then {'ask again' if self._replaced else '/regen answers this message. /undo takes it back'}."
        )

    # Commands. Each takes the rest of its line.

    def help(self, argument: str) -> Outcome:
        width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items())
        lines = [f"{f'/{name} {command.usage}':<{width}}  {command.help}" for name, command in COMMANDS.items()]
        return Outcome("\n".join([*lines, "A message that begins with a slash is written with two."]))

    def set_system(self, argument: str) -> Outcome:
        if argument:
            self.system = "" if argument == "off" else argument
        return Outcome(f"System prompt: {self.system}" if self.system else "No system prompt.")

    def set(self, argument: str) -> Outcome:
        name, _, text = argument.partition(" ")
        name = name.replace("-", "_")
        if not name:
            return Outcome(self._listed_settings())
        if name not in SETTINGS:
            raise ChatError(f"There is no setting {name!r}.", code="unknown_setting", hint=_settings_hint(name))
        text = text.strip()
        settings = {key: value for key, value in self.settings.items() if key != name}
        if not text:
            return Outcome(f"{name} = {_shown_setting(getattr(self.sampling(), name))}   ({SETTINGS[name].help})")
        if text != "default":
            settings[name] = _parsed(name, text)
        self._adopt(settings)
        return Outcome(f"{name} = {_shown_setting(getattr(self.sampling(), name))}")

    def clear(self, argument: str) -> Outcome:
        self._go_on_from([], "")
        self.ready.engine.forget()
        return Outcome("The conversation is empty. System prompt and settings stay.")

    def regen(self, argument: str) -> Outcome:
        self._replace()
        return Outcome(answer=True)

    def edit(self, argument: str) -> Outcome:
        """Bare: have the last message edited. With text: put it in the last message's place."""
        if not argument:
            return Outcome(edit=self.waiting or self._last().user)
        self._replace()
        return self.say(argument)

    def undo(self, argument: str) -> Outcome:
        self._take_back()
        gone, self.waiting, self._replaced = self.waiting, "", None
        return Outcome(f"Taken back: {_shortened(gone)}")

    def drop(self, argument: str) -> Outcome:
        count = int(argument) if argument.isascii() and argument.isdigit() else 0
        if not 1 <= count <= len(self.turns):
            raise ChatError(
                f"/drop needs the number of oldest turns to forget, got {argument!r}; there are {len(self.turns)}.",
                code="bad_number",
            )
        del self.turns[:count]
        return Outcome(f"Forgot the oldest {_turns(count)}, {len(self.turns)} left.")

    def save(self, argument: str) -> Outcome:
        path = _path(argument)
        if exists(path):
            _check_replaceable(path)
        _write(path, json.dumps(self._saved(), ensure_ascii=False, indent=1) + "\n")
        return Outcome(f"Saved {_turns(len(self.turns))} to {path}")

    def load(self, argument: str) -> Outcome:
        chat = _read_chat(_path(argument))
        self._adopt(chat.settings)
        self.system = chat.system
        self._go_on_from(chat.turns, chat.waiting)
        return Outcome(
            f"Loaded {_turns(len(self.turns))}." + (" /regen answers the last message." * bool(self.waiting))
        )

    def show_stats(self, argument: str) -> Outcome:
        if argument not in ("", "on", "off"):
            raise ChatError(f"/stats is {argument!r}, expected on or off.", code="bad_value")
        if not argument:
            return Outcome(self.statistics())
        self.stats = argument == "on"
        return Outcome(f"Statistics after each reply are {argument}.")

    def model(self, argument: str) -> Outcome:
        if argument:
            self.ready = self.open_model(argument, self.ready.engine)
        return Outcome(str(self.ready))

    def exit(self, argument: str) -> Outcome:
        return Outcome(leave=True)

    # What the commands are made of.

    def _last(self) -> Turn:
        if not self.turns:
            raise ChatError("Nothing has been said yet.", code="no_turns")
        return self.turns[-1]

    def _go_on_from(self, turns: Sequence[Turn], waiting: str) -> None:
        """Have another conversation, of which nothing was answered here."""
        self.turns, self.waiting, self.ended, self._replaced = list(turns), waiting, None, None

    def _replace(self) -> None:
        """Take the last turn back for one that is yet to be answered."""
        if not self.waiting:
            self._replaced = self._last()
        self._take_back()

    def _take_back(self) -> None:
        """Make the last message the waiting one, and forget its reply."""
        if not self.waiting:
            self.waiting = self._last().user
            self.turns.pop()

    def _adopt(self, settings: dict[str, Any]) -> None:
        before, self.settings = self.settings, settings
        try:
            self.sampling()
        except MixtralError:
            self.settings = before
            raise

    def _listed_settings(self) -> str:
        now = {name: _shown_setting(getattr(self.sampling(), name)) for name in SETTINGS}
        width = max(map(len, now.values()))
        lines = [f"{name:<18}  {value:<{width}}  {SETTINGS[name].help}" for name, value in now.items()]
        return "\n".join([*lines, "/set NAME VALUE changes one, /set NAME default takes it back."])

    def _saved(self) -> dict[str, Any]:
        messages = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in (("user", turn.user), ("assistant", turn.reply))
        ]
        if self.waiting:
            messages.append({"role": "user", "content": self.waiting})
        return {
            "mixtral_mlx_chat": 1,
            "model": self.ready.name,
            "system": self.system,
            "settings": self.settings,
            "messages": messages,
        }


@dataclass(frozen=True)
class _Command:
    run: Callable[[Session, str], Outcome]
    usage: str
    help: str


COMMANDS = {
    "help": _Command(Session.help, "", "this list"),
    "system": _Command(Session.set_system, "[TEXT]", "show or set the system prompt; `off` removes it"),
    "set": _Command(Session.set, "[NAME [VALUE]]", "list, show or change the settings"),
    "regen": _Command(Session.regen, "", "answer the last message again"),
    "edit": _Command(Session.edit, "[TEXT]", "change the last message and answer it again"),
    "undo": _Command(Session.undo, "", "take back the last message and its reply"),
    "drop": _Command(Session.drop, "N", "forget the N oldest turns, to make room"),
    "clear": _Command(Session.clear, "", "forget the whole conversation"),
    "save": _Command(Session.save, "FILE", "write the conversation to a file"),
    "load": _Command(Session.load, "FILE", "go on with a saved conversation"),
    "stats": _Command(Session.show_stats, "[on|off]", "speed and memory, now or after every reply"),
    "model": _Command(Session.model, "[NAME]", "show the model, or change to another"),
    "exit": _Command(Session.exit, "", "leave, as Ctrl-D does"),
}


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    return f"{f'Did you mean /{near[0]}? ' if near else ''}/help lists them; // sends a message with a slash."


def _settings_hint(name: str) -> str:
    near = difflib.get_close_matches(name, SETTINGS, 1)
    return f"{f'Did you mean {near[0]}? ' if near else ''}They are: {', '.join(SETTINGS)}."


def _parsed(name: str, text: str) -> Any:
    try:
        value = parse_setting(name, text)
    except ValueError as error:
        raise ChatError(f"{name} {error}.", code="bad_value") from None
    return (value,) if name == "stop" else value


def _shown_setting(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


# Saved chats.


@dataclass(frozen=True)
class _Chat:
    system: str
    settings: dict[str, Any]
    turns: tuple[Turn, ...]
    waiting: str


def _path(argument: str) -> Path:
    if not argument:
        raise ChatError("A file name is missing.", code="no_file", hint="For example: /save talk.json")
    try:
        return Path(argument).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ChatError(f"{argument!r} cannot be a file name: {_reason(error)}.", code="bad_path") from None


def _reason(error: Exception) -> str:
    """What the system says, without its number and without names that are ours."""
    return getattr(error, "strerror", None) or str(error)


def _check_replaceable(path: Path) -> None:
    """Raise `MixtralError` for what is no saved chat: only such a file is replaced by another."""
    try:
        _read_chat(path)
    except MixtralError as error:
        if error.code == "unreadable":
            raise
        raise ChatError(f"{path} exists and is no saved chat.", code="exists", hint="Choose another name.") from None


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text, mode=0o600)  # As the history is: what people write to a model is theirs.
    except (OSError, UnicodeError) as error:
        raise ChatError(f"{path} cannot be written: {_reason(error)}.", code="write_failed") from None


_CHAT_HINT = "Choose a file /save has written."


def _read_chat(path: Path) -> _Chat:
    """A saved chat, checked whole; raises `MixtralError`."""
    raw = read_json(path, hint=_CHAT_HINT)
    try:
        if raw["mixtral_mlx_chat"] != 1:
            raise ValueError(f"is of version {raw['mixtral_mlx_chat']!r}, this program knows version 1")
        turns, waiting = _read_turns(raw["messages"])
        settings = {name: _read_setting(name, value) for name, value in raw["settings"].items()}
        return _Chat(_text(raw["system"]), settings, turns, waiting)
    except (KeyError, TypeError, AttributeError):
        raise ChatError(f"{path} is no saved chat.", code="bad_chat", hint=_CHAT_HINT) from None
    except ValueError as error:
        raise ChatError(f"{path} {error}.", code="bad_chat") from None


def _read_turns(messages: Any) -> tuple[tuple[Turn, ...], str]:
    if not isinstance(messages, list):
        raise TypeError
    texts = []
    for number, message in enumerate(messages):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise ValueError(f"has {message['role']!r} as the role of message {number + 1}, expected {expected!r}")
        texts.append(_text(message["content"]))
        if not texts[-1].strip():
            raise ValueError(f"has no text in message {number + 1}")
    pairs = zip(texts[::2], texts[1::2], strict=False)
    return tuple(Turn(user, reply) for user, reply in pairs), texts[-1] if len(texts) % 2 else ""


def _read_setting(name: str, value: Any) -> Any:
    if name not in SETTINGS:
        raise ValueError(f"has the unknown setting {name!r}")
    if name == "stop":
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise ValueError(f"has {value!r} for stop, expected a list of texts")
        return tuple(map(_text, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"has {value!r} for {name}, expected a number")
    return _parsed(name, str(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is no text") from None
    return value
