"""Messages and tools → token ids; generated ids → text, and where in it tool calls begin.

Chats are laid out by mistral-common, the reference, so their ids equal it by construction. Here are the
choice of the tokenizer, the checks that a person's mistakes meet first, and decoding while tokens arrive.
Control tokens come from ids, never from text; no template of a checkpoint is rendered. Knows no models."""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import os
import re
import secrets
import stat
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from .config import MixtralError

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

Version = Literal["v1", "v3"]

_MAX_BYTES = 16 << 20
_ROLES = ("system", "user", "assistant", "tool")
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_SPACE = "▁"  # how pieces write a space
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_GET_TOKENIZER = "Copy tokenizer.model from the folder the weights came from, or download it again."


class PromptError(MixtralError):
    """The tokenizer cannot be used, or a conversation makes no sense to the model."""


@dataclass(frozen=True)
class ToolCall:
    """The model asks for a function; `arguments` is JSON text, `id` is 9 letters or digits."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant or tool (a result, for the call `tool_call_id`)."""

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Tool:
    """A function the model may ask for; `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class Tokenizer:
    """A Mixtral's tokenizer: text and conversations to ids, ids to text. Make one with `Tokenizer.read`."""

    def __init__(self, pieces: Any, file: Path, version: Version) -> None:
        self.version = version
        self.vocab_size: int = pieces.vocab_size()
        self.bos_id: int = pieces.bos_id()
        self.eos_id: int = pieces.eos_id()
        self.tool_calls_id: int | None = pieces.piece_to_id("[TOOL_CALLS]") if version == "v3" else None
        self.name = f"{version}, {self.vocab_size:,} pieces"
        self._pieces = pieces
        self.file = file
        self._surfaces: dict[int, str | bytes] = {}

    @classmethod
    def read(cls, folder: Path, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer in `folder`, for a model with `vocab_size` embeddings. Raises PromptError."""
        file = _tokenizer_file(Path(folder))
        pieces, version = _load(file)
        found = pieces.vocab_size()
        if vocab_size is not None and found > vocab_size:
            raise PromptError(
                f"{file} has {found} pieces but the model only {vocab_size} embeddings.",
                code="tokenizer_too_large",
                hint=f"It belongs to another model. {_GET_TOKENIZER}",
            )
        return cls(pieces, file, version)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of raw text, after one BOS unless told otherwise; text never gives a control token."""
        _check_text(text, "The text")
        ids: list[int] = self._pieces.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids that ask for the next assistant message, equal to mistral-common's. Raises PromptError."""
        _check_chat(messages, tools, self.version)
        from mistral_common.exceptions import MistralCommonException

        try:
            ids: list[int] = self._reference.encode_chat_completion(_request(_paired(messages), tools)).tokens
        except (MistralCommonException, ValueError, TypeError, AssertionError, RuntimeError) as error:
            # RuntimeError: JSON nested too deep, or that spells half a surrogate pair.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise PromptError(
                f"The conversation cannot be written as a prompt: {reason}",
                code="bad_conversation",
                hint="Check the order of the messages, and the JSON of tools, tool calls and tool results.",
            ) from error
        return ids

    def fewest_tokens(self, told: str | Sequence[Message]) -> int:
        """No fewer tokens than this has a text, or a conversation as a prompt: told from its length, not encoded."""
        characters = len(told) if isinstance(told, str) else _characters(told)
        return -(-characters // self._longest_piece)

    @cached_property
    def _longest_piece(self) -> int:
        return max(len(self.piece(token)) for token in range(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` taken as a text of its own, as sentencepiece decodes it."""
        stream = self.detokenizer()
        return "".join([*map(stream.add, ids), stream.finish()])

    def detokenizer(self, after: Sequence[int] = ()) -> Detokenizer:
        """Decode what follows the prompt `after`, token by token.

        SentencePiece writes a text's first word with a space before it. That space is dropped where a text
        begins: after nothing, a control token, or v1's written `[/INST]`. Elsewhere it is real."""
        return Detokenizer(self, begins=self.begins(after))

    def begins(self, after: Sequence[int]) -> bool:
        """Whether a text begins after the ids `after`, so that its first space is dropped."""
        if not after or self._is_control(after[-1]):
            return True
        return self.version == "v1" and self.decode(after[-8:]).endswith("[/INST]")

    def token_bytes(self, token: int) -> bytes | None:
        """What a token adds to a text; None for those that are no text: control tokens and the unknown one."""
        if self._is_control(token) or self._pieces.is_unknown(token):
            return None
        surface = self._surface(token)
        return surface if isinstance(surface, bytes) else surface.replace(_SPACE, " ").encode()

    def difference(self, other: Tokenizer) -> str:
        """The first way in which ids mean something else to `other`, in words; "" if they all mean the same."""
        if self.name != other.name:
            return f"it is {other.name}, expected {self.name}"
        ours, theirs = self._pieces, other._pieces
        for token in range(self.vocab_size):
            if _traits(ours, token) != _traits(theirs, token):
                return f"piece {token} is {theirs.id_to_piece(token)!r}, expected {ours.id_to_piece(token)!r}"
        return ""

    def piece(self, token: int) -> str:
        """A token as its vocabulary writes it: `▁the`, `[INST]`, `<0x0A>` for a byte; its number if it has no name."""
        return str(self._pieces.id_to_piece(token)) if 0 <= token < self.vocab_size else f"<{token}>"

    def _is_control(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and bool(self._pieces.is_control(token))

    def _surface(self, token: int) -> str | bytes:
        """What a token writes: text, with its spaces as pieces write them, or one byte of a character."""
        if token not in self._surfaces:
            self._surfaces[token] = self._look_up(token)
        return self._surfaces[token]

    def _look_up(self, token: int) -> str | bytes:
        # A model may have more embeddings than the tokenizer has pieces, and may pick one of those.
        if not 0 <= token < self.vocab_size or self._pieces.is_unknown(token):
            unknown: str = self._pieces.decode([self._pieces.unk_id()])
            return unknown
        if self._pieces.is_control(token):
            return ""
        piece: str = self._pieces.id_to_piece(token)
        return bytes([int(piece[1:-1], 16)]) if self._pieces.is_byte(token) else piece

    @cached_property
    def _reference(self) -> MistralTokenizer[Any, Any, Any, Any, Any]:
        # Importing mistral-common takes most of a second, and only chats need it.
        from mistral_common.protocol.instruct.normalize import get_normalizer
        from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
        from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV3
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

        version = TokenizerVersion(self.version)
        instruct = InstructTokenizerV1 if self.version == "v1" else InstructTokenizerV3
        return MistralTokenizer(
            instruct(SentencePieceTokenizer(self.file, version)),
            validator=get_validator(version, ValidationMode.test),
            request_normalizer=get_normalizer(version, None),
        )


class Detokenizer:
    """Ids in, text out, at constant cost per id; a character is held back until all its bytes are there.

    `tool_calls_at` is where in the text (characters so far) the first `[TOOL_CALLS]` token came, or None. The
    token itself writes nothing, so no text a model writes can pass for it."""

    def __init__(self, tokenizer: Tokenizer, *, begins: bool) -> None:
        self.tool_calls_at: int | None = None
        self._tokenizer = tokenizer
        self._drop_space = begins
        # One escape per impossible byte, as SentencePiece has one U+FFFD for each; "replace" would join some.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._length = 0

    def add(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        surface = self._tokenizer._surface(token)
        if isinstance(surface, bytes):
            return self._give(self._characters(surface))
        text = self.finish()
        if self._drop_space and surface[:1] == _SPACE:
            self._drop_space = False
            surface = surface[1:]
        text += self._give(surface.replace(_SPACE, " "))
        if token == self._tokenizer.tool_calls_id and self.tool_calls_at is None:
            self.tool_calls_at = self._length
        return text

    def finish(self) -> str:
        """What is still held back: bytes that never became a character, each as U+FFFD."""
        return self._give(self._characters(b"", final=True))

    def _give(self, text: str) -> str:
        self._length += len(text)
        self._drop_space = self._drop_space and not text
        return text

    def _characters(self, data: bytes, *, final: bool = False) -> str:
        return _ESCAPED_BYTE.sub("\ufffd", self._utf8.decode(data, final))


def new_call_id() -> str:
    """An id for a call that came without one."""
    # Random, because a client may tell apart by id two calls that ask for the same thing.
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


# Conversations: what people get wrong, said in our words before mistral-common sees it.


def _check_chat(messages: Sequence[Message], tools: Sequence[Tool], version: Version) -> None:
    if not messages:
        raise PromptError("The conversation is empty.", code="no_messages", hint="Give at least one user message.")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"Message {number}", version)
    for tool in tools:
        _check_text(tool.name, "A tool's name")
        _check_text(tool.description, f"The description of the tool {tool.name}")
    if tools and version == "v1":
        refuse_tools("Tools were given")
    if messages[-1].role == "assistant":
        raise PromptError(
            "The conversation ends with an assistant message, so there is nothing to answer.",
            code="ends_with_assistant",
            hint="End with a user message or a tool result. To continue a text, use raw completion.",
        )


def _check_message(message: Message, where: str, version: Version) -> None:
    if message.role not in _ROLES:
        raise PromptError(
            f"{where} has the role {message.role!r}; the roles are {', '.join(_ROLES)}.", code="unknown_role"
        )
    where = f"{where} ({message.role})"
    for text in (message.content, message.tool_call_id, message.name):
        _check_text(text, where)
    if version == "v1" and (message.role == "tool" or message.tool_calls):
        refuse_tools(f"{where} is about a tool")
    if message.tool_calls and message.role != "assistant":
        raise PromptError(f"{where} calls tools; only an assistant message may.", code="misplaced_tool_calls")
    if message.role == "assistant":
        _check_assistant(message, where)


def _check_assistant(message: Message, where: str) -> None:
    for call in message.tool_calls:
        for text in (call.name, call.arguments, call.id):
            _check_text(text, f"A tool call in {where}")
    if not message.content and not message.tool_calls:
        raise PromptError(
            f"{where} has neither text nor tool calls.",
            code="empty_assistant",
            hint="Leave that message out.",
        )
    if message.content and message.tool_calls:
        raise PromptError(
            f"{where} has both text and tool calls; this model knows only one of them in a reply.",
            code="text_and_tool_calls",
            hint="Keep the tool calls and leave the text out.",
        )


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise PromptError(
            f"{where} holds {type(text).__name__}, expected text.",
            code="not_text",
            hint="Mixtral reads text only: pass a str.",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where} holds half of a surrogate pair at character {error.start}, which is no Unicode text.",
            code="not_unicode",
            hint="It was probably cut in the middle of a character, or read with errors='surrogateescape'.",
        ) from error


def refuse_tools(what: str) -> NoReturn:
    """Raise the `PromptError` for tools and a tokenizer that has no tokens for them."""
    raise PromptError(
        f"{what}, but this model's tokenizer (v1, as in Mixtral 8x7B) has no tool tokens.",
        code="tools_not_supported",
        hint="Use Mixtral 8x22B Instruct for tools, or describe them in the system message.",
    )


def _paired(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages with every call id made valid, and every result carrying the id of its call."""
    waiting: list[tuple[str, str]] = []  # calls without a result: the id they came with, the id they get
    previous = ""
    for number, message in enumerate(messages, 1):
        if message.role == "assistant":
            _check_answered(waiting, previous, message, f"Message {number}")
            calls = _numbered(message.tool_calls, number)
            waiting = [(old.id, new.id) for old, new in zip(message.tool_calls, calls, strict=True)]
            message = replace(message, tool_calls=calls)
        elif message.role == "tool":
            call_id = _answer(waiting, message.tool_call_id, f"Message {number}")
            message = replace(message, tool_call_id=call_id)
        previous = "tool_calls" if message.tool_calls else message.role
        yield message


def _check_answered(waiting: Sequence[object], previous: str, message: Message, where: str) -> None:
    if waiting:
        raise PromptError(
            f"{where} (assistant) comes while {len(waiting)} tool call(s) before it have no result.",
            code="tool_result_missing",
            hint="Give one tool message for every call, directly after the calls.",
        )
    if previous == "assistant" and message.tool_calls:
        raise PromptError(
            f"{where} calls tools right after another assistant message; the two would be one reply.",
            code="text_and_tool_calls",
            hint="Keep the tool calls and leave the text out.",
        )


def _answer(waiting: list[tuple[str, str]], given: str, where: str) -> str:
    """Take from `waiting` the call a result belongs to: the one of that id, or the first if it gives none."""
    for place, (old, new) in enumerate(waiting):
        if given in ("", old, new):
            del waiting[place]
            return new
    raise PromptError(
        f"{where} is a tool result{f' for {given!r}' if given else ''}, but no call before it waits for one.",
        code="tool_result_without_call",
        hint="Put the assistant message with the tool call before it, with the same id.",
    )


def _numbered(calls: Sequence[ToolCall], message: int) -> tuple[ToolCall, ...]:
    """The calls with ids the model can read: their own, or ones made from these or from their place."""
    return tuple(
        call
        if CALL_ID.fullmatch(call.id)
        else replace(call, id=hashlib.sha256((call.id or f"{message}.{place}").encode()).hexdigest()[:9])
        for place, call in enumerate(calls)
    )


def _characters(messages: Sequence[Message]) -> int:
    """Characters of a conversation that are in its prompt for certain; some of the others may be."""
    last_user = max((place for place, message in enumerate(messages) if message.role == "user"), default=-1)
    count = 0
    for place, message in enumerate(messages):
        if message.role != "tool":
            count += len(message.content.rstrip(" ") if message.role == "assistant" else message.content)
        elif place > last_user:  # Results before that are left out by mistral-common.
            count += _characters_of_result(message.content)
    return count


def _characters_of_result(content: str) -> int:
    """A tool's result is written anew where it is JSON, which may be shorter."""
    try:
        return len(json.dumps(json.loads(content), ensure_ascii=False))
    except json.JSONDecodeError:
        return len(content)
    except (ValueError, RecursionError):  # It cannot be written at all, which is said where that is tried.
        return 0


def _request(messages: Iterable[Message], tools: Sequence[Tool]) -> ChatCompletionRequest[Any]:
    from mistral_common.protocol.instruct import tool_calls as mistral
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    functions = [
        mistral.Function(name=tool.name, description=tool.description, parameters=tool.parameters) for tool in tools
    ]
    return ChatCompletionRequest(
        messages=[_to_mistral(message) for message in messages],
        tools=[mistral.Tool(function=function) for function in functions] or None,
    )


def _to_mistral(message: Message) -> Any:
    from mistral_common.protocol.instruct import messages as mistral
    from mistral_common.protocol.instruct import tool_calls

    if message.role == "system":
        return mistral.SystemMessage(content=message.content)
    if message.role == "user":
        return mistral.UserMessage(content=message.content)
    if message.role == "tool":
        return mistral.ToolMessage(
            content=message.content, tool_call_id=message.tool_call_id, name=message.name or None
        )
    calls = [
        tool_calls.ToolCall(id=c.id, function=tool_calls.FunctionCall(name=c.name, arguments=c.arguments))
        for c in message.tool_calls
    ]
    return mistral.AssistantMessage(content=message.content or None, tool_calls=calls or None)


# The tokenizer: which file, which version, and is it whole?


@dataclass(frozen=True)
class _Published:
    """A tokenizer as Mistral published it, in the files of mistral-common."""

    version: Version
    file: str
    sha256: str


# 8x22B Instruct comes with the second's pieces or the third's. They differ in reserved control pieces only.
_PUBLISHED = (
    _Published(
        version="v1",
        file="tokenizer.model.v1",
        sha256="dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    ),
    _Published(
        version="v3",
        file="mistral_instruct_tokenizer_240216.model.v2",
        sha256="37f00374dea48658ee8f5d0f21895b9bc55cb0103939607c8185bfd1c6ca1f89",
    ),
    _Published(
        version="v3",
        file="mistral_instruct_tokenizer_240323.model.v3",
        sha256="9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    ),
)


def _tokenizer_file(folder: Path) -> Path:
    """The sentencepiece model of `folder`, or the published one whose vocabulary its tokenizer.json has."""
    for name in ("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3"):
        if os.path.lexists(folder / name):
            return folder / name
    if os.path.lexists(folder / "tokenizer.json"):
        return _published_for(folder / "tokenizer.json")
    raise PromptError(
        f"There is no tokenizer.model in {folder}.",
        code="no_tokenizer",
        hint=f"Is this a Mixtral folder? {_GET_TOKENIZER}",
    )


def _read(file: Path) -> bytes:
    """The bytes of a regular file of a tokenizer's size."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(file, "is not a regular file")
        if status.st_size > _MAX_BYTES:
            _refuse(file, f"has {status.st_size:,} bytes, more than any Mixtral tokenizer")
        data = file.read_bytes()
    except OSError as error:
        _refuse(file, f"cannot be read: {error.strerror or error}")
    if data.startswith(b"version https://git-lfs"):
        _refuse(file, "is only a Git LFS pointer, not the file itself")
    return data


def _refuse(file: Path, reason: str) -> NoReturn:
    raise PromptError(f"{file} {reason}.", code="bad_tokenizer", hint=_GET_TOKENIZER)


def _load(file: Path) -> tuple[Any, Version]:
    """The pieces in `file` and their version, if they are a published tokenizer's or begin with those."""
    data = _read(file)
    digest = hashlib.sha256(data).hexdigest()
    for known in _PUBLISHED:
        if known.sha256 == digest:
            return _pieces(data, file), known.version
    pieces = _pieces(data, file)
    control = [pieces.is_control(token) for token in range(3, min(10, pieces.vocab_size()))]
    version: Version = "v3" if any(control) else "v1"
    differences = [_difference(pieces, known) for known in _PUBLISHED if known.version == version]
    if "" not in differences:
        _refuse(file, f"is not Mixtral's {version} tokenizer: {differences[-1]}")
    return pieces, version


def _pieces(data: bytes, file: Path) -> Any:
    import sentencepiece

    try:
        if data:
            return sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError):
        pass
    _refuse(file, "is no SentencePiece model, or a damaged one")


def _difference(pieces: Any, known: _Published) -> str:
    """The first way in which `pieces` do not begin with all of `known`'s, in words; "" if they do."""
    expected = _carried(known)
    size, found = expected.vocab_size(), pieces.vocab_size()
    if found < size:
        return f"it has {found} pieces, expected {size}"
    try:
        for token in range(size):
            if _traits(pieces, token) != _traits(expected, token):
                return f"piece {token} is not the published {expected.id_to_piece(token)!r}"
        if any(_traits(pieces, token).is_byte for token in range(size, found)):
            return "it has more byte pieces than there are bytes"
        return "" if _habits(pieces) == _habits(expected) else "its settings are not the published ones"
    except (ValueError, RuntimeError, IndexError):
        return "it is damaged"


class _Traits(NamedTuple):
    """All there is to a piece."""

    text: str
    score: float
    is_control: bool
    is_byte: bool
    is_unknown: bool
    is_unused: bool


def _traits(pieces: Any, token: int) -> _Traits:
    return _Traits(
        pieces.id_to_piece(token),
        pieces.get_score(token),
        pieces.is_control(token),
        pieces.is_byte(token),
        pieces.is_unknown(token),
        pieces.is_unused(token),
    )


def _habits(pieces: Any) -> tuple[object, ...]:
    """What the settings beside the pieces change: how text is normalized and split, and what the ids stand for."""
    return (
        pieces.normalize("  Tab\tfi ｆ  \n ok "),
        pieces.encode("Hello world\x07"),
        pieces.decode([259, 1000, 0]),
        (pieces.bos_id(), pieces.eos_id(), pieces.unk_id()),
    )


def _carried_file(known: _Published) -> Path:
    # find_spec tells where the package lies without paying for its import.
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None
    assert spec.submodule_search_locations, "mistral-common is a dependency of this package"
    return Path(spec.submodule_search_locations[0], "data", known.file)


def _carried(known: _Published) -> Any:
    file = _carried_file(known)
    return _pieces(_read(file), file)


def _published_for(file: Path) -> Path:
    """The published sentencepiece model with exactly the vocabulary of a tokenizer.json."""
    vocabulary = _vocabulary(file)
    for known in _PUBLISHED:
        pieces = _carried(known)
        if len(vocabulary) == pieces.vocab_size() and all(
            vocabulary.get(pieces.id_to_piece(token)) == token for token in range(pieces.vocab_size())
        ):
            return _carried_file(known)
    raise PromptError(
        f"{file.parent} has no tokenizer.model, and its tokenizer.json has other pieces than Mixtral's.",
        code="unknown_tokenizer",
        hint=_GET_TOKENIZER,
    )


def _vocabulary(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(file))
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
        return {**content["model"]["vocab"], **added}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _refuse(file, "is no tokenizer.json with a vocabulary, or a damaged one")
