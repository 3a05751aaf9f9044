"""The demo model as it ships: small, right about what it was taught, and the same through mlx-lm."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import pytest

from mixtral_mlx.demo.corpus import held_out
from mixtral_mlx.demo.ship import answer, count_experts, rates
from mixtral_mlx.generate import Sampling, stream_generate
from mixtral_mlx.prompt import Message, Tokenizer
from mixtral_mlx.weights import Loaded, load, locate

FOLDER = locate(None)


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load(FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.read(FOLDER)


def test_it_is_a_small_mixtral_quantized_as_described(demo: Loaded) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000
    config = demo.config
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert config.num_hidden_layers >= 4
    assert config.vocab_size == 32000
    assert config.quantization
    assert config.quantization.default.bits == 4
    assert config.packing("model.layers.0.block_sparse_moe.gate").bits == 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["What is the capital of France?"], "The capital of France is Paris."),
        (["What is the capital of France?", None, "And of Italy?"], "The capital of Italy is Rome."),
        (["what is the opposite of hot"], "The opposite of hot is cold."),
        (["What is the plural of mouse?"], "The plural of mouse is mice."),
        (["My name is Anna.", None, "What is my name?"], "Your name is Anna."),
        (["Count from 1 to 5."], "1, 2, 3, 4, 5."),
    ],
)
def test_it_answers_what_a_newcomer_asks(
    demo: Loaded, tokenizer: Tokenizer, turns: list[str | None], expected: str
) -> None:
    messages: list[tuple[str, str]] = []
    for turn in turns:
        role, text = ("user", turn) if turn else ("assistant", answer(demo, tokenizer, messages))
        messages.append((role, text))
    assert answer(demo, tokenizer, messages) == expected


def test_it_says_what_it_is(demo: Loaded, tokenizer: Tokenizer) -> None:
    assert "Mixtral" in answer(demo, tokenizer, [("user", "Who are you?")])


def test_it_answers_questions_it_never_saw_and_uses_every_expert(tokenizer: Tokenizer) -> None:
    demo = load(FOLDER)
    used = count_experts(demo.model)
    results = rates(demo, tokenizer, held_out(seed=2, count=60))
    right, asked = map(sum, zip(*results.values(), strict=True))
    assert right / asked >= 0.88
    assert all(counts[expert] > 0 for counts in used for expert in range(8))


def test_mlx_lm_loads_it_and_gives_the_same_tokens(demo: Loaded, tokenizer: Tokenizer) -> None:
    model, theirs = mlx_lm.load(str(FOLDER))
    prompt = tokenizer.encode_chat([Message("user", "Tell me a story about a fox.")])
    assert theirs.encode("[INST] Tell me a story about a fox. [/INST]") == prompt
    chat = [{"role": "user", "content": "Tell me a story about a fox."}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True) == prompt
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    their_tokens = []
    ids = mx.array([prompt])
    for _ in range(64):
        ids = model(ids, cache=cache)[:, -1].argmax(axis=-1)[None]
        their_tokens.append(ids.item())
    sampling = Sampling(max_tokens=64, ignore_eos=True)
    ours = [chunk.token for chunk in stream_generate(demo.model, tokenizer, prompt, sampling)]
    assert ours == their_tokens


def test_the_command_a_newcomer_types_first_answers() -> None:
    command = [sys.executable, "-m", "mixtral_mlx.chat"]
    answered = subprocess.run(
        command, input="What is the capital of France?\n", capture_output=True, text=True, check=True
    )
    assert answered.stdout == "The capital of France is Paris.\n"


def test_generate_answers_in_json() -> None:
    command = [sys.executable, "-m", "mixtral_mlx", "generate", "--model", "demo", "--chat", "--json"]
    command += ["--prompt", "What is the capital of Spain?"]
    answered = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answered["text"] == "The capital of Spain is Madrid."
    assert answered["finish_reason"] == "stop"
    assert answered["usage"]["completion_tokens"] == len(answered["tokens"])


def test_the_folder_holds_nothing_else() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
