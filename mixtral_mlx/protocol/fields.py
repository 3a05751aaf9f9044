"""Every field of the APIs and what is done with it: the one table that requests are held to.

A field is *honoured*; or a *label*, which names the caller or the request and by its meaning changes no answer; or
*fixed*, which is taken with the values that ask for what is done in any case; or *refused*, with the reason. What is
in no list is refused as unknown. null is the same as leaving a field out, as in these APIs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .call import Refused

Treatment = Literal["honoured", "label", "fixed", "refused"]


@dataclass(frozen=True)
class Field:
    """What is done with a field. `note` tells its default, or why it is refused; `values` are those it is fixed to."""

    treatment: Treatment
    note: str = ""
    values: tuple[Any, ...] = ()


def _honoured(**notes: str) -> dict[str, Field]:
    return {name: Field("honoured", note) for name, note in notes.items()}


def _labels(**notes: str) -> dict[str, Field]:
    return {name: Field("label", note) for name, note in notes.items()}


def _fixed(**values: tuple[Any, ...]) -> dict[str, Field]:
    return {name: Field("fixed", "", allowed) for name, allowed in values.items()}


def _refused(**reasons: str) -> dict[str, Field]:
    return {name: Field("refused", reason) for name, reason in reasons.items()}


_EXTENSIONS = _honoured(
    top_k="Ours: sample among so many of the likeliest tokens. Default 0, all of them.",
    min_p="Ours: leave out tokens less likely than this part of the likeliest. Default 0.",
    repetition_penalty="Ours: default 1, none.",
    min_tokens="Ours: the model cannot end before so many tokens. Default 0.",
    ignore_eos="Ours: go on where the model would end. Default false.",
    kv_bits="Ours: keys and values in 8 or 4 bits. Default: as the engine was loaded.",
    max_kv="Ours: keep keys and values of the latest tokens only, so many. Default: of all.",
    speculate='Ours: "n-gram" guesses tokens ahead from the text, "draft" by a small model; changes the speed only.',
)
_OPENAI_SAMPLING = _honoured(
    model='The served model\'s id, its last part, "default" or an alias. Default: the served model.',
    temperature="Default 1.",
    top_p="Default 1.",
    seed="Default: another one each time. Choice k of n has seed + k.",
    stop="Up to 64 texts. Default: none.",
    n="Default 1.",
    max_tokens="Default: up to the end of the context.",
    presence_penalty="Looks back over 20 tokens. Default 0.",
    frequency_penalty="Looks back over 20 tokens. Default 0.",
    logit_bias="Token ids of this model, as text, with numbers from -100 to 100.",
    stream="Default false.",
    stream_options="include_usage is honoured.",
)
_MESSAGES = {
    **_honoured(
        model=_OPENAI_SAMPLING["model"].note,
        messages="Text, tool_use and tool_result; text beside tool_use is left out. The role system is read too.",
        system="Text, or blocks of text.",
        tools="The client's own only, and only where the tokenizer has tokens for them (8x22B).",
        tool_choice="Default auto.",
        output_config="format is honoured; effort is not.",
    ),
    **_labels(cache_control="Prompts that begin alike share what was read in any case."),
    **_fixed(thinking=({"type": "disabled"},), speed=("standard",)),
    **_refused(
        user_profile_id="Of Anthropic's own service.",
        workspace_id="Of Anthropic's own service.",
    ),
}
_LABELS = _labels(
    user="Names the end user.",
    safety_identifier="Names the end user.",
    prompt_cache_key="Prompts that begin alike share what was read whatever their key.",
)

FIELDS: dict[str, dict[str, Field]] = {
    "/v1/chat/completions": {
        **_OPENAI_SAMPLING,
        **_honoured(
            messages="Text only. developer is read as system; what is said beside tool calls is left out.",
            max_completion_tokens="The same as max_tokens.",
            tools="Functions only, and only where the tokenizer has tokens for them (8x22B).",
            tool_choice='Default "auto".',
            parallel_tool_calls="Default true; false holds the model to one call by a grammar.",
            response_format="text, json_object, json_schema, and ours: regex, lark, choice.",
            logprobs="Default false.",
            top_logprobs="0 to 20; needs logprobs.",
        ),
        **_EXTENSIONS,
        **_LABELS,
        **_labels(metadata="Of stored answers; none is stored."),
        **_fixed(
            store=(False,),
            service_tier=("auto", "default"),
            modalities=(["text"],),
            reasoning_effort=("none",),
            verbosity=("medium",),
        ),
        **_refused(
            audio="Mixtral reads and writes text only.",
            function_call="Use tool_choice.",
            functions="Use tools.",
            moderation="Nothing is moderated here.",
            prediction="Use speculate, which needs no prediction.",
            prompt_cache_options="Prompts are kept without being asked.",
            prompt_cache_retention="How long prompts are kept is set where the server is started.",
            web_search_options="Nothing is searched here; offer a function among the tools.",
        ),
    },
    "/v1/completions": {
        **_OPENAI_SAMPLING,
        **_honoured(
            prompt="A text, several, ids, or lists of ids, up to 128.",
            max_tokens="Default 16.",
            best_of="Only the same as n: answers are not ranked.",
            echo="Default false. Not together with logprobs.",
            logprobs="0 to 5. Default: none.",
            response_format="Ours, as for chat completions.",
        ),
        **_EXTENSIONS,
        **_LABELS,
        **_refused(suffix="Mixtral was not taught to fill in; put what comes before into prompt."),
    },
    "/v1/responses": {
        **_honoured(
            model=_OPENAI_SAMPLING["model"].note,
            input="A text, or items: message, function_call, function_call_output. A message beside calls is left out.",
            instructions="Come first, as system. Default: none.",
            max_output_tokens="Default: up to the end of the context.",
            temperature="Default 1.",
            top_p="Default 1.",
            seed="Ours: default another one each time.",
            tools="Functions only, and only where the tokenizer has tokens for them (8x22B). strict: default false.",
            tool_choice='Default "auto".',
            parallel_tool_calls="Default true; false holds the model to one call by a grammar.",
            text="format: text, json_object, json_schema, and ours: regex, lark, choice.",
            include="Log probabilities; encrypted reasoning too, of which there is none.",
            top_logprobs="0 to 20; needs log probabilities in include.",
            reasoning="There is none; effort none may be asked for.",
            metadata="Given back with the answer.",
            stream="Default false.",
            stream_options="Chunks are not padded.",
        ),
        **_EXTENSIONS,
        **_LABELS,
        **_fixed(store=(False,), background=(False,), truncation=("disabled",), service_tier=("auto", "default")),
        **_refused(
            access_programs="Of OpenAI's own service.",
            background_options="Nothing runs in the background.",
            context_management="Nothing is shortened here; leave out the oldest items.",
            conversation="Nothing is kept between requests: give all items as input.",
            image="Mixtral reads text only.",
            max_tool_calls="It counts calls that OpenAI runs; the client runs all of them here.",
            moderation="Nothing is moderated here.",
            previous_response_id="Nothing is kept between requests: give all items as input.",
            prompt="There are no stored prompts; use instructions.",
            prompt_cache_options="Prompts are kept without being asked.",
            prompt_cache_retention="How long prompts are kept is set where the server is started.",
        ),
    },
    "/v1/messages": {
        **_MESSAGES,
        **_honoured(
            max_tokens="Needed.",
            stop_sequences="Up to 64 texts. Default: none.",
            stream="Default false.",
            temperature="Default 1.",
            top_p="Default 1.",
            seed="Ours: default another one each time.",
        ),
        **_EXTENSIONS,
        **_honoured(top_k="Default: all tokens."),
        **_labels(metadata="user_id names the end user."),
        **_fixed(service_tier=("auto", "standard_only")),
        **_refused(
            container="Nothing is run here but the model.",
            diagnostics="There are none.",
            inference_geo="The model runs where the server does.",
            **dict.fromkeys(
                (
                    *("betas", "billing_policy", "compaction", "context_management", "fallback_credit_token"),
                    *("fallbacks", "mcp_servers", "thread"),
                ),
                "Of a beta of Anthropic's own service.",
            ),
        ),
    },
    "/v1/messages/count_tokens": _MESSAGES,
    "/v1/embeddings": {
        **_honoured(
            model=_OPENAI_SAMPLING["model"].note,
            input="A text, several, ids, or lists of ids, up to 2,048. Vectors have length 1.",
            encoding_format="Default float.",
        ),
        **_labels(user="Names the end user."),
        **_refused(dimensions="Vectors are as wide as the model."),
    },
    "/tokenize": _honoured(
        model=_OPENAI_SAMPLING["model"].note,
        prompt="A text; or give messages.",
        add_special_tokens="Of a prompt: begin with the token that begins every text. Default true.",
        messages="As for chat completions.",
        tools="As for chat completions; with messages.",
        return_token_strs="Default false.",
    ),
}
"""What is done with each field, by the path of its API."""

_CHAT_ENTRIES = {
    "messages[]": {
        **_honoured(
            role="system, developer, user, assistant or tool.",
            content="A text, or parts.",
            tool_calls="Of the assistant: calls of functions.",
            tool_call_id="Of a tool: which call this is the result of.",
        ),
        **_labels(
            name="Names who speaks. Mixtral's template has no place for names, so the model is not told: "
            "what it is to know belongs into content."
        ),
        **_fixed(annotations=([],)),
        **_refused(
            audio="Mixtral reads and writes text only.",
            function_call="Use tool_calls.",
            refusal="The model has no words apart for it: they belong into content.",
        ),
    },
    "messages[].content[]": _honoured(type="text.", text="Parts are read with an empty line between them."),
}
_MESSAGES_ENTRIES = {
    "messages[]": _honoured(role="user, assistant or system.", content="A text, or blocks."),
    "messages[].content[]": {
        **_honoured(
            type="text, tool_use or tool_result.",
            text="Of a text.",
            id="Of a tool_use.",
            name="Of a tool_use.",
            input="Of a tool_use.",
            tool_use_id="Of a tool_result: which call this is the result of.",
            content="Of a tool_result: a text, or blocks of text.",
            is_error="Of a tool_result: the model is told. Default false.",
        ),
        **_labels(cache_control=_MESSAGES["cache_control"].note),
        **_fixed(citations=([],), caller=({"type": "direct"},)),
        **_refused(toolset_name="There are no toolsets."),
    },
}
ENTRIES: dict[str, dict[str, dict[str, Field]]] = {
    "/v1/chat/completions": _CHAT_ENTRIES,
    "/v1/responses": {
        "input[]": {
            **_honoured(
                type="message, function_call or function_call_output. Default message.",
                role="Of a message: user, system, developer or assistant.",
                content="Of a message: a text, or parts.",
                call_id="Of a call and of its output.",
                name="Of a call.",
                arguments="Of a call.",
                output="Of a call's output: a text, or parts of type input_text.",
            ),
            **_labels(
                id="Names an item; none is kept to be referred to.",
                status="How an item came to its end; it is read as it is.",
                phase="What an answer was for; it is read as any other.",
            ),
        },
        "input[].content[]": {
            **_honoured(type="input_text or output_text.", text="Parts are read with an empty line between them."),
            **_labels(logprobs="As they were given; they are not read."),
            **_fixed(annotations=([],)),
        },
    },
    "/v1/messages": _MESSAGES_ENTRIES,
    "/v1/messages/count_tokens": _MESSAGES_ENTRIES,
}
"""The same for the entries of lists of messages, by path and list. The models of bodies hold requests to it."""


def known(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `body` that are to be read; raises `Refused` for one that is not known, or cannot be honoured."""
    fields, kept = FIELDS[path], {}
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            raise Refused(
                f"There is no field {shown(name)} in {path}.",
                code="unknown_field",
                hint="Leave it out; nothing that is not understood is passed over.",
                param=name[:80],
            )
        if value is None or (field.treatment == "fixed" and _same(value, field.values)):
            continue
        if field.treatment in ("fixed", "refused"):
            raise _not_honoured(name, value, field)
        kept[name] = value
    return kept


def _same(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)


def _not_honoured(name: str, value: Any, field: Field) -> Refused:
    if field.treatment == "refused":
        return Refused(f"{name} cannot be honoured.", code="unsupported_field", hint=field.note, param=name)
    allowed = " or ".join(map(json.dumps, field.values))
    return Refused(
        f"{name} is {shown(value)}, and only {allowed} can be honoured.",
        code="unsupported_value",
        hint=field.note or "Leave it out.",
        param=name,
    )


def shown(value: Any) -> str:
    """A value of a body for a message, not too long."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value) if isinstance(value, str) else str(value) if abs(value) < 1e30 else "a very large number"
    return text if len(text) <= 60 else text[:57] + "..."


def as_markdown() -> str:
    """The table as people read it."""
    parts = []
    for path, fields in FIELDS.items():
        within = {f"{where}.{name}": one for where, them in ENTRIES.get(path, {}).items() for name, one in them.items()}
        rows = [f"| `{name}` | {_in_words(field)} |" for name, field in sorted({**fields, **within}.items())]
        parts.append("\n".join([f"## `{path}`", "", "| field | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _in_words(field: Field) -> str:
    allowed = " or ".join(f"`{json.dumps(value)}`" for value in field.values)
    words = {"honoured": "", "label": "Label.", "fixed": f"Only {allowed}.", "refused": "Refused."}[field.treatment]
    return f"{words} {field.note}".strip()
