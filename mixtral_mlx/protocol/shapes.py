"""The shapes of answers, for the OpenAPI document and for tests; answers are not built from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


class Shape(BaseModel):
    """An object of an answer: all fields it may have, and no other."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# OpenAI, chat completions and completions.


class PromptDetails(Shape):
    cached_tokens: Count


class OpenAIUsage(Shape):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails


class LikelyToken(Shape):
    token: str
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None
    logprob: float


class TokenLogprob(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Shape):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Shape):
    name: str
    arguments: str


class CalledTool(Shape):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(Shape):
    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Shape):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: OpenAIUsage


class FunctionDelta(Shape):
    name: str | None = None
    arguments: str


class ToolDelta(Shape):
    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolDelta] | None = None


class ChunkChoice(Shape):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Shape):
    """An event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: OpenAIUsage | None = None


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[Count]


class CompletionChoice(Shape):
    text: str
    index: Count
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Shape):
    """The answer of `/v1/completions`, and an event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = None


# OpenAI, responses.


class ResponseText(Shape):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[TokenLogprob]


class ResponseMessage(Shape):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[ResponseText]


class ResponseCall(Shape):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(Shape):
    cached_tokens: Count
    cache_write_tokens: Count


class OutputDetails(Shape):
    reasoning_tokens: Literal[0]


class ResponseUsage(Shape):
    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: OutputDetails
    total_tokens: Count


class ResponseError(Shape):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(Shape):
    reason: Literal["max_output_tokens"]


class Response(Shape):
    """The answer of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[Annotated[ResponseMessage | ResponseCall, Field(discriminator="type")]]
    usage: ResponseUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_logprobs: Count
    top_p: float
    truncation: Literal["disabled"]


# Anthropic.


class MessageText(Shape):
    type: Literal["text"]
    text: str


class MessageCall(Shape):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Shape):
    input_tokens: Count
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Count
    output_tokens: Count


class Message(Shape):
    """The answer of `/v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[MessageText | MessageCall, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokens(Shape):
    """The answer of `/v1/messages/count_tokens`."""

    input_tokens: Count


# The others.


class Embedding(Shape):
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    prompt_tokens: Count
    total_tokens: Count


class Embeddings(Shape):
    """The answer of `/v1/embeddings`; an embedding in base64 is its little-endian float32s."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(Shape):
    """The answer of `/tokenize`."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class Model(Shape):
    """The model that is served, for clients of OpenAI and of Anthropic."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: Count
    max_tokens: Count


class Models(Shape):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False]


class OpenAIErrorDetails(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Shape):
    """An error, also as an event of a stream."""

    error: OpenAIErrorDetails


class AnthropicErrorDetails(Shape):
    type: str
    message: str


class AnthropicError(Shape):
    """An error, also as an event of a stream."""

    type: Literal["error"]
    error: AnthropicErrorDetails
