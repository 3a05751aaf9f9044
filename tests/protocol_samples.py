"""Bodies of the APIs that `mixtral_mlx.protocol` understands, and a value for every field of theirs."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
CLOSED = {**SCHEMA, "additionalProperties": False}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": CLOSED}}
RESPONSES_TOOL = {"type": "function", "name": "weather", "description": "Now", "parameters": CLOSED}
MESSAGES_TOOL = {"name": "weather", "description": "Now", "input_schema": CLOSED}

LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [USER], "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
}
"""The least each API takes."""

_EXTENSIONS: dict[str, Any] = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 2,
    "ignore_eos": True,
    "kv_bits": 8,
    "max_kv": 64,
    "speculate": "n-gram",
}
_SAMPLING: dict[str, Any] = {
    **_EXTENSIONS,
    "temperature": 0.5,
    "top_p": 0.5,
    "seed": -1,
    "stop": ["x", "y"],
    "n": 2,
    "max_tokens": 7,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"17": -100},
    "stream": True,
    "stream_options": {"include_usage": True},
}
_LABELS: dict[str, Any] = {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k"}

VALUES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **_SAMPLING,
        **_LABELS,
        "model": "default",
        "messages": [{"role": "developer", "content": "Be kind."}, USER],
        "max_completion_tokens": 7,
        "tools": [CHAT_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "logprobs": True,
        "top_logprobs": 2,
        "metadata": {"a": "b"},
    },
    "/v1/completions": {
        **_SAMPLING,
        **_LABELS,
        "model": "default",
        "prompt": ["one", "two"],
        "best_of": 1,
        "echo": True,
        "logprobs": 2,
        "response_format": {"type": "regex", "regex": "[ab]+"},
    },
    "/v1/responses": {
        **_EXTENSIONS,
        **_LABELS,
        "model": "default",
        "input": [USER, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Ho"}]}],
        "instructions": "Be kind.",
        "max_output_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.5,
        "seed": 3,
        "tools": [RESPONSES_TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "reasoning": {"effort": "none"},
        "metadata": {"a": "b"},
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    },
    "/v1/messages": {
        **_EXTENSIONS,
        "model": "default",
        "messages": [USER, {"role": "system", "content": "Be kind."}],
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "max_tokens": 7,
        "tools": [MESSAGES_TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "stop_sequences": ["x"],
        "stream": True,
        "temperature": 0.5,
        "top_p": 0.5,
        "seed": 3,
        "metadata": {"user_id": "me"},
        "cache_control": {"type": "ephemeral"},
    },
    "/v1/messages/count_tokens": {
        "model": "default",
        "messages": [USER, {"role": "system", "content": "Be kind."}],
        "system": "Be kind.",
        "tools": [MESSAGES_TOOL],
        "tool_choice": {"type": "none"},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "cache_control": {"type": "ephemeral"},
    },
    "/v1/embeddings": {"model": "default", "input": [[1, 2], [3]], "encoding_format": "base64", "user": "me"},
    "/tokenize": {
        "model": "default",
        "prompt": "Ho",
        "add_special_tokens": False,
        "messages": [USER],
        "tools": [CHAT_TOOL],
        "return_token_strs": True,
    },
}
"""A value of every field that is honoured or a label, other than what is done without it."""

WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/chat/completions", "tool_choice"): {"tools": [CHAT_TOOL]},
    ("/v1/chat/completions", "parallel_tool_calls"): {"tools": [CHAT_TOOL]},
    ("/v1/chat/completions", "top_logprobs"): {"logprobs": True},
    ("/v1/chat/completions", "stream_options"): {"stream": True},
    ("/v1/completions", "stream_options"): {"stream": True},
    ("/v1/responses", "tool_choice"): {"tools": [RESPONSES_TOOL]},
    ("/v1/responses", "parallel_tool_calls"): {"tools": [RESPONSES_TOOL]},
    ("/v1/responses", "top_logprobs"): {"include": ["message.output_text.logprobs"]},
    ("/v1/messages", "tool_choice"): {"tools": [MESSAGES_TOOL]},
    ("/v1/messages/count_tokens", "tool_choice"): {"tools": [MESSAGES_TOOL]},
    ("/tokenize", "messages"): {"prompt": None},
    ("/tokenize", "tools"): {"prompt": None, "messages": [USER]},
}
"""What a field needs beside it."""

ONLY_ONE_VALUE = {
    ("/v1/completions", "best_of"),
    ("/v1/responses", "reasoning"),
    ("/v1/responses", "stream_options"),
    ("/v1/messages/count_tokens", "output_config"),
}
"""Honoured, and yet the same as without them: what they may say is what is done in any case, or costs no token."""
ONLY_ONE_VALUE |= {(path, "model") for path in LEAST}
