"""Mixtral 8x7B and 8x22B on Apple silicon with MLX.

    config     the numbers that define a Mixtral
    writing    files that appear whole or not at all
    memory     this machine: what there is, and what is done when it runs short
    budget     who gets how much of it, and how fast that should run
    borrowed   what we use of mlx-lm
    model      the mathematics
    experts    experts that stay on the SSD until they are needed
    cpu        products and attention where there is no GPU
    routing    which experts each token is given, noted on a loaded model
    hub        what a repository on Hugging Face has, and its files fetched
    weights    folder ↔ model, strictly checked
    prompt     messages and tools → token ids; generated ids → text and tool calls
    generate   one prompt → a stream of chunks
    engine     many requests at once, for programs that embed a model
    distributed  a model over several machines, and how they keep together
    opening    a model opened from a command line, with a bar
    protocol   OpenAI's and Anthropic's JSON ↔ what the engine takes and gives
    session    a conversation: its messages, settings and commands
    speeds     what this machine reaches, measured or assumed
    plan       what runs in how much memory, in words
    chat       the conversation in the terminal, with terminal and markdown for the screen
    page       the chat page that a server gives out
    server     the engine over HTTP, for programs that speak OpenAI's and Anthropic's APIs
    helper     the engine as an app's child process: JSON lines on stdin and stdout
    cli        the command `mixtral-mlx`
    convert    checkpoints → our folder format
    bench      how fast a model runs here, next to another engine
    routes     which experts each token of a text used, as figures and pictures
    demo       a small trained Mixtral to try everything on

Importing this package imports neither MLX nor mlx-lm; each name below is fetched on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import Config as Config
    from .config import MixtralError as MixtralError
    from .engine.engine import Engine as Engine
    from .engine.engine import load as load
    from .engine.grammar import Format as Format
    from .engine.reply import Reply as Reply
    from .engine.request import Done as Done
    from .engine.request import EngineError as EngineError
    from .engine.request import PromptProgress as PromptProgress
    from .engine.request import Request as Request
    from .engine.request import Result as Result
    from .engine.request import Token as Token
    from .engine.request import ToolCallDelta as ToolCallDelta
    from .engine.tools import ToolChoice as ToolChoice
    from .generate import Chunk as Chunk
    from .generate import Conversation as Conversation
    from .generate import Sampling as Sampling
    from .generate import Usage as Usage
    from .generate import stream_generate as stream_generate
    from .prompt import Message as Message
    from .prompt import Tokenizer as Tokenizer
    from .prompt import Tool as Tool
    from .prompt import ToolCall as ToolCall
    from .weights import locate as locate

_HOMES = {
    "Config": "config",
    "MixtralError": "config",
    "Engine": "engine.engine",
    "load": "engine.engine",
    "Format": "engine.grammar",
    "Reply": "engine.reply",
    "Done": "engine.request",
    "EngineError": "engine.request",
    "PromptProgress": "engine.request",
    "Request": "engine.request",
    "Result": "engine.request",
    "Token": "engine.request",
    "ToolCallDelta": "engine.request",
    "ToolChoice": "engine.tools",
    "locate": "weights",
    "Message": "prompt",
    "Tool": "prompt",
    "ToolCall": "prompt",
    "Tokenizer": "prompt",
    "Chunk": "generate",
    "Conversation": "generate",
    "Sampling": "generate",
    "Usage": "generate",
    "stream_generate": "generate",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
