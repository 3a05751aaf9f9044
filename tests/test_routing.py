"""Routing as it is recorded: what the router says, whatever computes the experts, and nothing is changed by looking."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mixtral_mlx import cpu
from mixtral_mlx.engine.batch import Part
from mixtral_mlx.engine.engine import Engine, load
from mixtral_mlx.engine.grammar import Format
from mixtral_mlx.engine.request import EngineError
from mixtral_mlx.engine.routing import Routing, Watch, Watched
from mixtral_mlx.generate import new_caches
from mixtral_mlx.model import Model
from mixtral_mlx.routing import Choices, Recorder, counted, recorded
from mixtral_mlx.weights import load as load_weights

from .checkpoints import Q4, TINY, random_model, streamed, write_tiny

CONFIG = replace(TINY, head_dim=32, num_hidden_layers=3, quantization=Q4)
LAYERS, EXPERTS, PER_TOKEN = 3, 8, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("routing") / "model", CONFIG)


@pytest.fixture(scope="module")
def plain() -> Model:
    """The model that is in `folder`, computed by MLX alone."""
    model = random_model(CONFIG)
    model.eval()
    return model


@pytest.fixture(scope="module", params=["MLX's", "our kernels", "streamed", "streamed by MLX"])
def model(request: pytest.FixtureRequest, folder: Path) -> Iterator[Model]:
    ours = request.param in ("our kernels", "streamed")
    if ours and not cpu.is_available():
        pytest.skip("there is a GPU, or no numba")
    with ExitStack() as stack:
        with patch.object(cpu, "is_available", lambda: ours):
            if request.param.startswith("streamed"):
                model = stack.enter_context(streamed(folder, 3)).model
            else:
                model = load_weights(folder).model
        assert (type(model.layers[0]).__module__ == "mixtral_mlx.cpu.modules") == ours
        yield model


def words(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, CONFIG.vocab_size, count).tolist()


def router_logits(model: Model, ids: list[int]) -> np.ndarray:
    """What the router of each layer says to each token of a text: (N, L, E), by the book and without experts' help."""
    x = model.model.embed_tokens(mx.array([ids]))
    logits = []
    for layer in model.layers:
        hidden = x + layer.self_attn(layer.input_layernorm(x), "causal", None)
        moe = layer.block_sparse_moe
        logits.append(moe.gate(layer.post_attention_layernorm(hidden))[0])
        x = hidden + moe(layer.post_attention_layernorm(hidden))
    return np.stack([np.array(each) for each in logits], 1)


def assert_greatest(choices: Choices, logits: np.ndarray) -> None:
    """The choices are the two greatest of `logits`, in their order, and weigh what a softmax over them says."""
    order = np.argsort(-logits, axis=-1)[..., :PER_TOKEN]
    ranked = -np.sort(-logits, axis=-1)
    clear = (ranked[..., :PER_TOKEN] - ranked[..., 1 : PER_TOKEN + 1]).min(axis=-1) > 1e-3
    assert clear.mean() > 0.9
    assert (choices.experts == order)[clear].all()
    likely = np.exp(ranked[..., :PER_TOKEN] - ranked[..., :1])
    np.testing.assert_allclose(
        choices.weights[clear], (likely / likely.sum(-1, keepdims=True))[clear], atol=2e-3, rtol=0
    )


def test_what_is_recorded_are_the_routers_greatest_logits(model: Model, plain: Model) -> None:
    ids = words(40)
    with recorded(model) as recorder:
        mx.eval(model(mx.array([ids])))
    (only,) = recorder.passes
    assert only.choices().experts.shape == (40, LAYERS, PER_TOKEN)
    assert_greatest(only.choices(), router_logits(plain, ids))


def test_a_text_read_in_parts_is_a_pass_each(model: Model, plain: Model) -> None:
    ids, cache = words(20, seed=1), new_caches(CONFIG, None)
    with recorded(model) as recorder:
        for part in (ids[:12], ids[12:19], ids[19:]):
            mx.eval(model(mx.array([part]), cache))
    assert [len(each.choices()) for each in recorder.passes] == [12, 7, 1]
    assert_greatest(Choices.joined([each.choices() for each in recorder.passes]), router_logits(plain, ids))


def test_looking_changes_no_bit_and_leaves_the_model_as_it_was(model: Model) -> None:
    def state() -> list[Any]:
        modules = [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]
        return sorted(modules) + [(name, id(array)) for name, array in tree_flatten(model.parameters())]

    ids = mx.array([words(30, seed=2)])
    before, alone = state(), np.array(model(ids))
    with recorded(model):
        watched = np.array(model(ids))
        assert state() != before
    assert (watched == alone).all()
    assert state() == before
    assert (np.array(model(ids)) == alone).all()


def test_the_model_is_left_as_it_was_when_a_pass_breaks_off(plain: Model) -> None:
    before = [type(layer.block_sparse_moe.switch_mlp) for layer in plain.layers]
    recorder = Recorder(0)

    def break_off() -> None:
        nonlocal recorder
        with recorded(plain) as recorder:
            plain.layers[0](mx.zeros((1, 2, CONFIG.hidden_size)), None, None)  # One layer of three: no pass.
            mx.eval(plain(mx.array([[5, 6]])))
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        break_off()
    assert [type(layer.block_sparse_moe.switch_mlp) for layer in plain.layers] == before
    assert [len(each.choices()) for each in recorder.passes] == [2]


@pytest.mark.parametrize("wrapped", [None, "attention", "experts"])
@pytest.mark.parametrize("kernels", [False, True])
def test_every_way_to_ask_the_experts_is_noted_once(kernels: bool, wrapped: str | None) -> None:
    """A single layer, so that what is noted twice would be two passes; with something around a matrix, as by LoRA."""
    model = random_model(replace(CONFIG, num_hidden_layers=1))
    model.eval()
    if kernels:
        if not cpu.is_available():
            pytest.skip("there is a GPU, or no numba")
        cpu.accelerate(model)
    layer: Any = model.layers[0]
    if wrapped:
        matrix = layer.self_attn.q_proj if wrapped == "attention" else layer.block_sparse_moe.switch_mlp.up_proj
        matrix.__class__ = type("Wrapped", (type(matrix),), {})
    with recorded(model) as recorder:
        mx.eval(model(mx.array([[5, 6, 7]])))
    assert [len(each.choices()) for each in recorder.passes] == [3]


def test_choices_are_counted_by_layer_and_expert() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[0, 3], [3, 1]]])  # Two tokens, two layers.
    counts = counted(Choices(experts, np.full(experts.shape, 0.5)), 4)
    assert counts.tolist() == [[2, 1, 0, 1], [0, 1, 1, 2]]


# In the engine.


@pytest.fixture(params=["MLX's", "our kernels"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """By MLX alone it launches each pass before it has seen the results of the one before."""
    ours = request.param == "our kernels"
    if ours and not cpu.is_available():
        pytest.skip("there is a GPU, or no numba")
    with patch.object(cpu, "is_available", lambda: ours), load(folder) as engine:
        yield engine


def test_nothing_is_counted_while_nobody_looks(engine: Engine) -> None:
    engine.complete(words(9), max_tokens=3).result()
    nothing = Routing(LAYERS, EXPERTS, 0, ((0,) * EXPERTS,) * LAYERS, ())
    assert engine.routing() == nothing
    engine.watch_routing()
    engine.watch_routing(0)
    engine.complete(words(9, seed=1), max_tokens=3).result()
    assert engine.routing() == nothing


def test_routing_is_counted_by_hand_and_as_json(engine: Engine, plain: Model) -> None:
    prompt = words(30)
    engine.watch_routing(3600)
    tokens = engine.complete(prompt, max_tokens=6, ignore_eos=True).result().tokens
    ids = [*prompt, *tokens[:-1]]  # The last one is said and not read.
    logits = router_logits(plain, ids)
    expected = np.argsort(-logits, axis=-1)[..., :PER_TOKEN]
    counts = [np.bincount(expected[:, n].ravel(), minlength=EXPERTS).tolist() for n in range(LAYERS)]
    found = json.loads(json.dumps(asdict(engine.routing())))
    assert found == {
        "layers": LAYERS,
        "experts": EXPERTS,
        "tokens": 35,
        "counts": counts,
        "last": expected[-1].tolist(),
    }
    engine.reset_routing()
    assert engine.routing().tokens == 0


def test_rows_of_a_pass_belong_to_the_sequences_that_brought_them(engine: Engine, plain: Model) -> None:
    """Four requests of different lengths in shared passes: what was chosen for each is what it chooses alone."""
    seen: list[Watched] = []
    watch = engine._watch

    def add(watched: Watched) -> None:
        seen.append(watched)
        Watch.add(watch, watched)

    watch.add = add  # type: ignore[method-assign]
    hold = threading.Event()
    held = engine._worker.call(lambda opened: hold.wait(10))
    engine.watch_routing()
    prompts = [words(length, seed) for seed, length in enumerate((3, 21, 2, 40))]
    replies = [engine.complete(prompt, max_tokens=4, ignore_eos=True) for prompt in prompts]
    hold.set()
    held.result()
    answers = [reply.result().tokens for reply in replies]
    assert any(len(watched.lengths) == 4 for watched in seen)
    texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    expected = [router_logits(plain, text) for text in texts]
    total = sum(counted(_greatest(logits), EXPERTS) for logits in expected)
    assert np.abs(np.array(engine.routing().counts) - total).sum() <= 2
    assert engine.routing().tokens == sum(map(len, texts))
    # Their prompts go through one pass, and then they stand in the order they came in.
    decoding = [watched for watched in seen if list(watched.lengths) == [1, 1, 1, 1]]
    assert decoding
    for n, logits in enumerate(expected):
        some = Choices.joined([watched.choices()[n] for watched in decoding])
        assert_greatest(some, logits[-len(some) :])


def _greatest(logits: np.ndarray) -> Choices:
    order = np.argsort(-logits, axis=-1)[..., :PER_TOKEN]
    return Choices(order, np.take_along_axis(logits, order, -1))


def test_the_latest_token_is_none_that_was_only_guessed(plain: Model) -> None:
    watch, ids = Watch(CONFIG), words(9)
    watch.look(3600)
    decoded = Part(ids[:7], new_caches(CONFIG, None), 3, guesses=2)
    read = Part(ids, new_caches(CONFIG, None), 0)
    logits, watched = watch.run(plain, [decoded, read])
    mx.eval(logits, watched.arrays)
    watch.add(watched)
    expected = np.argsort(-router_logits(plain, ids[:7]), axis=-1)[..., :PER_TOKEN].tolist()
    assert watch.now().last == tuple(map(tuple, expected[4]))
    assert expected[4] not in (expected[5], expected[6])
    assert watch.now().tokens == 7 + 9


def test_guesses_are_counted_as_what_they_are(engine: Engine) -> None:
    seen: list[Part] = []
    run = engine._watch.run

    def watched_run(model: Model, parts: Sequence[Part]) -> Any:
        seen.extend(parts)
        return run(model, parts)

    engine._watch.run = watched_run  # type: ignore[method-assign]
    either = Format("choice", ["first", "second"])
    engine.complete(words(6) * 5, max_tokens=12, ignore_eos=True, speculate="n-gram").result()
    engine.chat("Which?", max_tokens=12, response_format=either).result()
    assert any(part.guesses for part in seen)
    assert all(len(part.ids) == 1 + part.guesses == part.wanted for part in seen if part.guesses)


def test_routing_goes_on_after_the_model_was_let_go_of(engine: Engine) -> None:
    engine.watch_routing()
    engine.complete(words(5), max_tokens=1).result()
    engine.unload()
    engine.complete(words(5), max_tokens=1).result()
    assert engine.routing().tokens == 10


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_time_that_cannot_be_is_refused(engine: Engine, seconds: float) -> None:
    with pytest.raises(EngineError, match="expected 0 or more"):
        engine.watch_routing(seconds)
