"""Build a Mixtral that copies what its prompt says, with some words changed: its weights are written by hand.

    python benchmarks/copier.py FOLDER [--layers 4 --hidden 512 --ffn 384] [--float32]
    python benchmarks/copier.py FOLDER --layers 2 --hidden 4096 --ffn 14336
    python benchmarks/copier.py FOLDER --check

No small trained model at hand can copy, and a copy with edits is what speculation is for. Layer 0 has three heads that
look 1, 2 and 3 tokens back: with rotary positions a constant query and a constant key meet at one distance only. They
note what they see. Layer 1 has an induction head: its query is a code of the last three tokens, its key that of the
three before each token, and what it finds it writes where the output is read. Where nothing matches it looks at the
first token, which says nothing, and then all tokens are equally likely. A word and the one it is to be changed to share
their code, so that the copy goes on behind either. All other heads, the routers and the experts are seeded random
weights, which do all of their work but are small. --check continues a text by the plain path and compares."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from synthetic import config_of

from mixtral_mlx.config import Config
from mixtral_mlx.generate import Conversation, Sampling, stream_generate
from mixtral_mlx.model import Model
from mixtral_mlx.prompt import Tokenizer
from mixtral_mlx.weights import load, locate, quantize, save

EDITS = {
    "Monday": "Friday",
    "river": "road",
    "small": "big",
    "white": "black",
    "north": "south",
    "morning": "evening",
    "brother": "sister",
    "summer": "winter",
}
TEXT = (
    "On Monday we went down to the river with a small boat that my brother had built from white boards. The wind came "
    "from the north, and by the time the sun stood over the old mill we had seen two herons, a fox and more ducks than "
    "anybody could count. In the morning of the next day a man from the village asked whether he might borrow the boat "
    "for a week; his own had been lost during the summer when the water rose. My brother said yes at once, took the "
    "rope from its hook and showed him how the small sail is tied to the mast. Every Monday since then there has been "
    "a basket of fresh eggs in front of our door, and nobody in the white house by the bridge will say who left it."
)
STARTED_TOKENS = 8
"""Tokens of the copy that are in the prompt."""

# Where the stream of hidden states holds what; groups of 64, so that packed weights keep zeros exactly.
_NAME, _NAME_WIDTH = 0, 128  # Which token this is.
_CODES, _CODE_WIDTHS = 128, (24, 20, 18)  # The token as the last, the one before and the one before that.
_ALWAYS, _FIRST = 192, 193
_NOTES = 256  # What the heads that look back saw.
_OUTPUT = 384
_WIDTH = 512

_ALWAYS_SIZE = 4.0
_NOISE = 0.02
_FAST = 24  # Rotary frequencies that tell neighbours apart.
_MARGIN = 14.0  # By how much a head that looks back prefers its distance.
_SURE = 25.0  # The logit of a copied token.
_OUTPUT_SIZE = 2.0
_SINK_DIMS = 40.0  # So many equal dimensions of a code are still chance.


def write_copier(folder: Path, config: Config, tokenizer: Tokenizer, seed: int = 0) -> None:
    """Write a checkpoint of `config`'s sizes, quantized as it says, with its tokenizer."""
    model = Model(replace(config, quantization=None))
    quantize(model, config)
    model.load_weights(list(_weights(config, tokenizer, seed)))
    save(folder, model, config)
    shutil.copyfile(tokenizer.file, folder / tokenizer.file.name)


def edits(tokenizer: Tokenizer) -> dict[int, int]:
    """The tokens to be changed, and into which."""
    pairs = {}
    for before, after in EDITS.items():
        (old,), (new,) = (tokenizer.encode(word, bos=False) for word in (before, after))
        pairs[old] = new
    return pairs


def task(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A prompt that begins to copy its text with the edits, and how it goes on."""
    text = tokenizer.encode(TEXT)
    changed = edits(tokenizer)
    copy = [changed.get(token, token) for token in text[1:]]
    return [*text, *copy[:STARTED_TOKENS]], copy[STARTED_TOKENS:]


def _weights(config: Config, tokenizer: Tokenizer, seed: int) -> Iterator[tuple[str, mx.array]]:
    random = np.random.default_rng(seed)
    dense = dict(_dense(config, tokenizer, random))
    mx.random.seed(seed)
    for name, spec in replace(config, quantization=None).tensors().items():
        path = name.removesuffix(".weight")
        packing = config.packing(path, lambda _: True) if config.quantization and len(spec.shape) > 1 else None
        if name in dense:
            weight = mx.array(dense.pop(name)).astype(getattr(mx, config.dtype))
            if packing:
                parts = mx.quantize(weight, packing.group_size, packing.bits)
                yield from zip([name, f"{path}.scales", f"{path}.biases"], parts, strict=True)
            else:
                yield name, weight
            continue
        size = _expert_size(config, name)
        if packing:
            for part, shape in packing.tensors(path, spec.shape):
                yield part, _packed(part, shape.shape, packing.bits, size, config.dtype, random)
        else:
            yield name, (size * mx.random.normal(spec.shape)).astype(getattr(mx, config.dtype))
    assert not dense, sorted(dense)


def _packed(
    name: str, shape: tuple[int, ...], bits: int, size: float, dtype: str, random: np.random.Generator
) -> mx.array:
    """A part of packed random weights with a mean of 0 and standard deviation `size`."""
    levels = (1 << bits) - 1
    if name.endswith(".weight"):
        return mx.array(random.integers(0, 1 << 32, shape, np.uint32))
    step = size / math.sqrt(((levels + 1) ** 2 - 1) / 12)
    value = step if name.endswith(".scales") else -step * levels / 2
    return mx.full(shape, value, getattr(mx, dtype))


def _expert_size(config: Config, name: str) -> float:
    """How large an expert's random weights are: what goes in keeps its size, what comes out is noise."""
    if "down_proj" in name:
        return _NOISE / math.sqrt(config.intermediate_size)
    return 1 / math.sqrt(config.hidden_size)


def _dense(config: Config, tokenizer: Tokenizer, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Everything but the experts."""
    hidden, vocab = config.hidden_size, config.vocab_size
    assert hidden >= _WIDTH
    assert config.head_dim == 128
    assert config.num_attention_heads >= 3 * config.num_key_value_heads
    names = random.choice([-1.0, 1.0], (vocab, _NAME_WIDTH)).astype(np.float32)
    codes = random.choice([-1.0, 1.0], (vocab, sum(_CODE_WIDTHS))).astype(np.float32)
    outputs = names.copy()
    for old, new in edits(tokenizer).items():
        codes[new] = codes[old]
        outputs[new] += names[old]
        outputs[old] = 0
    embedding = np.zeros((vocab, hidden), np.float32)
    embedding[:, _NAME : _NAME + _NAME_WIDTH] = names
    embedding[:, _CODES : _CODES + codes.shape[1]] = codes
    embedding[tokenizer.bos_id] = 0
    embedding[:, _ALWAYS] = _ALWAYS_SIZE
    told = _NAME_WIDTH + codes.shape[1]
    embedding[tokenizer.bos_id, _FIRST] = math.sqrt(told)  # As long as any other, so that norms treat all alike.
    yield "model.embed_tokens.weight", embedding

    sizes = [told + _ALWAYS_SIZE**2]
    sizes.append(sizes[0] + sum(width for *_, width in _notes()))
    sizes.append(sizes[1] + _OUTPUT_SIZE**2 * _NAME_WIDTH)
    scales = [math.sqrt(size / hidden) for size in sizes]  # What the norm before each layer divides by.
    head = np.zeros((vocab, hidden), np.float32)
    head[:, _OUTPUT : _OUTPUT + _NAME_WIDTH] = outputs * _SURE * scales[2] / (_OUTPUT_SIZE * _NAME_WIDTH)
    yield "lm_head.weight", head
    yield "model.norm.weight", np.ones(hidden, np.float32)

    for layer in range(config.num_hidden_layers):
        attention = _Attention(config, random)
        if layer == 0:
            attention.look_back(scales[0])
        if layer == 1:
            attention.find(scales[1], math.sqrt(sizes[0] / hidden))
        path = f"model.layers.{layer}"
        for name, weight in attention.matrices.items():
            yield f"{path}.self_attn.{name}.weight", weight
        gate = random.standard_normal((config.num_local_experts, hidden)) / math.sqrt(hidden)
        yield f"{path}.block_sparse_moe.gate.weight", gate.astype(np.float32)
        yield f"{path}.input_layernorm.weight", np.ones(hidden, np.float32)
        yield f"{path}.post_attention_layernorm.weight", np.ones(hidden, np.float32)


def _notes() -> Iterator[tuple[int, int, int, int]]:
    """What is noted of the tokens before: how far back, which code of it, where the code is kept, and its width."""
    place = _NOTES
    # The key needs the codes of the three before a token, the query those of the two before the last.
    for code, distance in ((0, 1), (1, 1), (1, 2), (2, 2), (2, 3)):
        yield distance, code, place, _CODE_WIDTHS[code]
        place += _CODE_WIDTHS[code]


def _code_start(code: int) -> int:
    return sum(_CODE_WIDTHS[:code])


class _Attention:
    """A layer's attention: random heads that write noise, and in the first group of heads what is put there."""

    def __init__(self, config: Config, random: np.random.Generator) -> None:
        hidden, width = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.group = width, heads // kv_heads
        self.frequencies = config.rope_theta ** (-np.arange(width // 2) / (width // 2))

        def noise(rows: int, columns: int, size: float) -> np.ndarray:
            return (size * random.standard_normal((rows, columns))).astype(np.float32)

        unit = 1 / math.sqrt(hidden)
        self.matrices = {
            "q_proj": noise(heads * width, hidden, unit),
            "k_proj": noise(kv_heads * width, hidden, unit),
            "v_proj": noise(kv_heads * width, hidden, unit),
            "o_proj": noise(hidden, heads * width, _NOISE / math.sqrt(heads * width)),
        }

    def _clear(self) -> None:
        """Make room for heads that share the first keys and values."""
        group = self.group * self.width
        self.matrices["q_proj"][:group] = 0
        self.matrices["k_proj"][: self.width] = 0
        self.matrices["v_proj"][: self.width] = 0
        self.matrices["o_proj"][:, :group] = 0

    def look_back(self, scale: float) -> None:
        """Heads that note the codes of the tokens 1, 2 and 3 before; `scale` is what the norm divides by."""
        self._clear()
        size = math.sqrt(self._needed() * math.sqrt(self.width)) * scale / _ALWAYS_SIZE
        fast = range(_FAST)
        self.matrices["k_proj"][fast, _ALWAYS] = size
        for head in range(3):
            angles = (head + 1) * self.frequencies[:_FAST]
            rows = head * self.width + np.arange(_FAST)
            self.matrices["q_proj"][rows, _ALWAYS] = size * np.cos(angles)
            self.matrices["q_proj"][rows + self.width // 2, _ALWAYS] = -size * np.sin(angles)
        for n in range(sum(_CODE_WIDTHS)):
            self.matrices["v_proj"][n, _CODES + n] = scale
        for distance, code, place, width in _notes():
            for n in range(width):
                self.matrices["o_proj"][place + n, (distance - 1) * self.width + _code_start(code) + n] = 1

    def _needed(self) -> float:
        """The size of each frequency with which a head's own distance comes before all others by the margin."""
        others = np.array([n for n in range(-3, 4096) if n])
        score = np.cos(np.outer(others, self.frequencies[:_FAST])).sum(axis=1)
        return float(_MARGIN / (_FAST - score.max()))

    def find(self, scale: float, first_scale: float) -> None:
        """The head that finds where the last three tokens were said before, and writes what followed."""
        self._clear()
        size = math.sqrt(math.sqrt(self.width)) * scale
        kept = {(distance, code): place for distance, code, place, _ in _notes()}
        sources = [(_CODES, kept[1, 0]), (kept[1, 1], kept[2, 1]), (kept[2, 2], kept[3, 2])]
        slow = self._slow()
        for code, (asked, had) in enumerate(sources):
            for n in range(_CODE_WIDTHS[code]):
                self.matrices["q_proj"][slow[_code_start(code) + n], asked + n] = size
                self.matrices["k_proj"][slow[_code_start(code) + n], had + n] = size
        # The slowest frequency asks for the first token, which has noted nothing and so is divided by less.
        told = math.sqrt(_NAME_WIDTH + sum(_CODE_WIDTHS))
        sink = math.sqrt(_SINK_DIMS * math.sqrt(self.width))
        self.matrices["q_proj"][self.width // 2 - 1, _ALWAYS] = sink * scale / _ALWAYS_SIZE
        self.matrices["k_proj"][self.width // 2 - 1, _FIRST] = sink * first_scale / told
        for n in range(_NAME_WIDTH):
            self.matrices["v_proj"][n, _NAME + n] = scale
            self.matrices["o_proj"][_OUTPUT + n, n] = _OUTPUT_SIZE

    def _slow(self) -> list[int]:
        """The slowly turning dimensions of a head but for the slowest, in pairs, the slowest first."""
        half = self.width // 2
        return [place for n in range(half - 2, -1, -1) for place in (n, n + half)]


def check(folder: Path) -> None:
    loaded, tokenizer = load(folder), Tokenizer.read(folder)
    prompt, expected = task(tokenizer)
    how = Sampling(max_tokens=len(expected), ignore_eos=True)
    chunks = stream_generate(loaded.model, tokenizer, prompt, how, conversation=Conversation(loaded.model))
    tokens = [chunk.token for chunk in chunks if chunk.token is not None]
    right = sum(a == b for a, b in zip(tokens, expected, strict=True))
    print(f"{folder} in {loaded.dtype}: {right} of {len(expected)} tokens of the edited copy are right")
    print(tokenizer.decode(tokens[:60]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=384)
    parser.add_argument("--float32", action="store_true", help="not quantized")
    parser.add_argument("--check", action="store_true", help="of a folder that was written before")
    args = parser.parse_args()
    if not args.check:
        config = config_of(args.hidden, args.ffn, args.layers)
        if args.float32:
            config = replace(config, quantization=None, dtype="float32")
        write_copier(args.folder, config, Tokenizer.read(locate(None)))
    check(args.folder)


if __name__ == "__main__":
    main()
