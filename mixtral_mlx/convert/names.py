"""The naming schemes of Mixtral checkpoints, as tables: which of our matrices a stored tensor is, or holds.

A scheme says where a matrix is and what to do to it (take an expert's rows, transpose, undo the rotary order). How its
bytes are stored is the containers' business; the two are separate axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from ..config import Config, MixtralError, shown


class ConvertError(MixtralError):
    """A source that is no Mixtral or cannot be converted, or a destination that cannot be written."""


_BLOCK_BYTES = 16 << 20


class Stored(Protocol):
    """A tensor in some container."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes it takes in its file."""
        ...

    def read(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop` of its first axis as floats, evaluated; raises `MixtralError`."""
        ...


@dataclass(frozen=True)
class Block:
    """A run of a piece's rows, `start` to `stop` of `rows`, and what was read for it."""

    start: int
    stop: int
    rows: int
    values: Any


class Piece(Protocol):
    """What is converted at a time: one matrix or vector, `expert` of the stack `path`, or all of `path` if None."""

    @property
    def path(self) -> str: ...

    @property
    def expert(self) -> int | None: ...

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int:
        """Bytes read for it."""
        ...

    def blocks(self) -> Iterator[Block]:
        """What it is made of, from its container, in one block or several in turn."""
        ...

    def packed(self, values: Any, config: Config) -> list[mx.array]:
        """A block's weight, scales and biases (as far as there are) as `config` wants them stored, evaluated."""
        ...


@dataclass(frozen=True)
class Matrix:
    """One of our matrices (or a norm's vector) in a source: `expert` of the stack `path`, or all of `path` if None."""

    path: str
    expert: int | None
    shape: tuple[int, ...]
    stored: Stored
    start: int
    stop: int
    steps: tuple[Callable[[mx.array], mx.array], ...] = ()

    def read(self) -> mx.array:
        """Its values in our layout, (out, in), evaluated."""
        array = self.stored.read(self.start, self.stop)
        for step in self.steps:
            array = step(array)
        array = mx.contiguous(array.reshape(self.shape))
        mx.eval(array)
        return array

    def blocks(self) -> Iterator[Block]:
        """Runs of rows of a few megabytes, where rows can be had one by one; else all at once."""
        rows = self.shape[0]
        if self.steps or not getattr(self.stored, "has_rows", False):
            yield Block(0, rows, rows, self.read())
            return
        step = max(rows * _BLOCK_BYTES // self.nbytes, 1)
        for at in range(0, rows, step):
            stop = min(at + step, rows)
            yield Block(at, stop, rows, self.stored.read(self.start + at, self.start + stop))

    def packed(self, values: mx.array, config: Config) -> list[mx.array]:
        """Quantized as `config` says: weight, scales and biases, or the weight alone."""
        array = values.astype(getattr(mx, config.dtype))
        packing = config.packing(self.path) if array.ndim > 1 else None
        arrays = (
            [array] if packing is None else list(mx.quantize(array, packing.group_size, packing.bits, packing.mode))
        )
        mx.eval(arrays)
        return arrays

    @property
    def name(self) -> str:
        return self.path if self.expert is None else f"{self.path}.{self.expert}"

    @property
    def nbytes(self) -> int:
        """Its share of the stored tensor's bytes."""
        return self.stored.nbytes * (self.stop - self.start) // max(self.stored.shape[0], 1)


def matrices(tensors: Mapping[str, Stored], config: Config) -> list[Matrix]:
    """Every matrix of the model `config` describes, in the order of use, found among `tensors` by any known scheme.

    Raises `ConvertError` if one is missing, has another shape, or if there is a tensor that belongs to none."""
    found = {(matrix.path, matrix.expert): matrix for matrix in some_matrices(tensors, config)}
    wanted = list(_wanted(config))
    if missing := [key for key in wanted if key not in found]:
        path, expert = missing[0]
        what = path if expert is None else f"expert {expert} of {path}"
        raise ConvertError(
            f"The source lacks {len(missing)} of {len(wanted)} matrices, the first {what}.",
            code="missing_tensor",
            hint="Some of its files are missing, or its configuration is of another model.",
        )
    return [found[key] for key in wanted]


def some_matrices(tensors: Mapping[str, Stored], config: Config) -> list[Matrix]:
    """The matrices that `tensors`, perhaps one file of several, hold; raises `ConvertError` as `matrices` does."""
    found: dict[tuple[str, int | None], Matrix] = {}
    for name, stored in tensors.items():
        if _ignored(name, config):
            continue
        for matrix in _from(name, stored, config):
            if (matrix.path, matrix.expert) in found:
                raise ConvertError(
                    f"The source holds {matrix.path} twice, again as {shown(name)}.", code="duplicate_tensor"
                )
            found[matrix.path, matrix.expert] = matrix
    return list(found.values())


def piece_names(tensor: str, config: Config) -> list[str]:
    """Names of the pieces a stored tensor of that name holds; none if no scheme knows it."""
    for pattern, rule in _RULES:
        if match := pattern.fullmatch(tensor):
            groups = match.groupdict()
            paths = [path.format(layer=groups.get("layer")) for path in rule.paths]
            if ".switch_mlp." not in paths[0]:
                return paths
            experts = [groups["expert"]] if groups.get("expert") is not None else range(config.num_local_experts)
            return [f"{path}.{expert}" for path in paths for expert in experts]
    return []


def all_piece_names(config: Config) -> list[str]:
    """Names of all pieces of the model."""
    return [path if expert is None else f"{path}.{expert}" for path, expert in _wanted(config)]


def _wanted(config: Config) -> Iterator[tuple[str, int | None]]:
    for path, shape in _shapes(config).items():
        if ".switch_mlp." in path:
            yield from ((path, expert) for expert in range(shape[0]))
        else:
            yield path, None


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Module path → shape of its weight, the norms' included."""
    plain = {name.removesuffix(".weight"): spec.shape for name, spec in config.tensors(lambda path: False).items()}
    return plain | config.modules()


def _ignored(name: str, config: Config) -> bool:
    """Tensors that only repeat what the configuration says, or what another tensor holds."""
    if name.endswith((".rotary_emb.inv_freq", ".attn_rot_embd")) or name == "rope_freqs.weight":
        return True
    return config.tie_word_embeddings and name in ("lm_head.weight", "output.weight")


@dataclass(frozen=True)
class _Rule:
    """Names of the form `pattern` hold `paths` (one after the other, in equal shares of each expert's rows)."""

    pattern: str
    paths: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False  # rotary pairs lie beside each other, ours half a head apart


_LAYER = r"(?P<layer>0|[1-9][0-9]{0,3})"
_EXPERT = r"(?P<expert>0|[1-9][0-9]{0,3})"
_MOE = "model.layers.{layer}.block_sparse_moe"
_GATE, _UP, _DOWN = (f"{_MOE}.switch_mlp.{name}_proj" for name in ("gate", "up", "down"))
_ATTENTION = "model.layers.{layer}.self_attn"

# Hugging Face, both generations, and MLX's own.
_HUGGING_FACE = (
    _Rule(r"model\.embed_tokens\.weight", ("model.embed_tokens",)),
    _Rule(r"model\.norm\.weight", ("model.norm",)),
    _Rule(r"lm_head\.weight", ("lm_head",)),
    *(
        _Rule(rf"model\.layers\.{_LAYER}\.{name}\.weight", (f"model.layers.{{layer}}.{name}",))
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            "block_sparse_moe.gate",
            *(f"block_sparse_moe.switch_mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    ),
    *(
        _Rule(rf"model\.layers\.{_LAYER}\.(?:block_sparse_moe|mlp)\.experts\.{_EXPERT}\.{letter}\.weight", (path,))
        for letter, path in (("w1", _GATE), ("w2", _DOWN), ("w3", _UP))
    ),
    _Rule(rf"model\.layers\.{_LAYER}\.mlp\.gate\.weight", (f"{_MOE}.gate",)),
    _Rule(rf"model\.layers\.{_LAYER}\.(?:block_sparse_moe|mlp)\.experts\.gate_up_proj", (_GATE, _UP)),
    _Rule(rf"model\.layers\.{_LAYER}\.(?:block_sparse_moe|mlp)\.experts\.down_proj", (_DOWN,)),
)

# Mistral's own files: the torrent's (an expert a tensor) and the hub's (stacked along the rows, w2 transposed).
_MISTRAL = (
    _Rule(r"tok_embeddings\.weight", ("model.embed_tokens",)),
    _Rule(r"norm\.weight", ("model.norm",)),
    _Rule(r"output\.weight", ("lm_head",)),
    _Rule(rf"layers\.{_LAYER}\.attention_norm\.weight", ("model.layers.{layer}.input_layernorm",)),
    _Rule(rf"layers\.{_LAYER}\.ffn_norm\.weight", ("model.layers.{layer}.post_attention_layernorm",)),
    *(
        _Rule(rf"layers\.{_LAYER}\.attention\.w{x}\.weight", (f"{_ATTENTION}.{x}_proj",), interleaved=x in "qk")
        for x in "qkvo"
    ),
    _Rule(rf"layers\.{_LAYER}\.(?:feed_forward|block_sparse_moe)\.gate\.weight", (f"{_MOE}.gate",)),
    *(
        _Rule(rf"layers\.{_LAYER}\.feed_forward\.experts\.{_EXPERT}\.{letter}\.weight", (path,))
        for letter, path in (("w1", _GATE), ("w2", _DOWN), ("w3", _UP))
    ),
    _Rule(rf"layers\.{_LAYER}\.block_sparse_moe\.w1", (_GATE,)),
    _Rule(rf"layers\.{_LAYER}\.block_sparse_moe\.w2", (_DOWN,), transposed=True),
    _Rule(rf"layers\.{_LAYER}\.block_sparse_moe\.w3", (_UP,)),
)

# GGUF: stacked experts, and the older files with one tensor per expert.
_GGUF = (
    _Rule(r"token_embd\.weight", ("model.embed_tokens",)),
    _Rule(r"output_norm\.weight", ("model.norm",)),
    _Rule(rf"blk\.{_LAYER}\.attn_norm\.weight", ("model.layers.{layer}.input_layernorm",)),
    _Rule(rf"blk\.{_LAYER}\.ffn_norm\.weight", ("model.layers.{layer}.post_attention_layernorm",)),
    *(_Rule(rf"blk\.{_LAYER}\.attn_{x}\.weight", (f"{_ATTENTION}.{x}_proj",), interleaved=x in "qk") for x in "qkv"),
    _Rule(rf"blk\.{_LAYER}\.attn_output\.weight", (f"{_ATTENTION}.o_proj",)),
    _Rule(rf"blk\.{_LAYER}\.ffn_gate_inp\.weight", (f"{_MOE}.gate",)),
    *(
        rule
        for word, path in (("gate", _GATE), ("down", _DOWN), ("up", _UP))
        for rule in (
            _Rule(rf"blk\.{_LAYER}\.ffn_{word}_exps\.weight", (path,)),
            _Rule(rf"blk\.{_LAYER}\.ffn_{word}\.{_EXPERT}\.weight", (path,)),
        )
    ),
)
_RULES = tuple((re.compile(rule.pattern), rule) for rule in (*_HUGGING_FACE, *_MISTRAL, *_GGUF))


def _from(name: str, stored: Stored, config: Config) -> Iterator[Matrix]:
    for pattern, rule in _RULES:
        if match := pattern.fullmatch(name):
            yield from _apply(rule, match.groupdict(), name, stored, config)
            return
    raise ConvertError(
        f"The source holds a tensor {shown(name)} ({list(stored.shape)}), which no known form of Mixtral has.",
        code="not_mixtral",
        hint="Is it a Mixtral? Only Mixtral 8x7B, 8x22B and models of the same kind can be converted.",
    )


def _apply(rule: _Rule, groups: Mapping[str, Any], name: str, stored: Stored, config: Config) -> Iterator[Matrix]:
    paths = [path.format(layer=groups.get("layer")) for path in rule.paths]
    shapes = _shapes(config)
    if unknown := [path for path in paths if path not in shapes]:
        raise ConvertError(
            f"The source holds {shown(name)}, and its configuration implies no {unknown[0]}.", code="unexpected_tensor"
        )
    shape = shapes[paths[0]]
    steps = _steps(rule, shape, paths[0], config)
    if ".switch_mlp." not in paths[0]:
        _check(name, stored, shape)
        yield Matrix(paths[0], None, shape, stored, 0, stored.shape[0], steps)
    elif groups.get("expert") is not None:
        expert = int(groups["expert"])
        if expert >= config.num_local_experts:
            raise ConvertError(
                f"The source holds {shown(name)} of {config.num_local_experts} experts.", code="unexpected_tensor"
            )
        _check(name, stored, shape[1:])
        yield Matrix(paths[0], expert, shape[1:], stored, 0, stored.shape[0], steps)
    else:
        yield from _stacked(rule, paths, name, stored, shape, steps)


def _stacked(
    rule: _Rule, paths: list[str], name: str, stored: Stored, shape: tuple[int, ...], steps: tuple[Any, ...]
) -> Iterator[Matrix]:
    """All experts in one tensor: [E, rows, in], or the same with the first two axes in one."""
    experts, out, width = shape
    rows = width if rule.transposed else out * len(paths)
    columns = out if rule.transposed else width
    if stored.shape == (experts, rows, columns):
        for n, path in enumerate(paths):
            for expert in range(experts):
                take = _rows(n * out, (n + 1) * out) if len(paths) > 1 else _first
                yield Matrix(path, expert, shape[1:], stored, expert, expert + 1, (take, *steps))
    else:
        _check(name, stored, (experts * rows, columns))
        for expert in range(experts):
            yield Matrix(paths[0], expert, shape[1:], stored, expert * rows, (expert + 1) * rows, steps)


def _steps(
    rule: _Rule, shape: tuple[int, ...], path: str, config: Config
) -> tuple[Callable[[mx.array], mx.array], ...]:
    if rule.transposed:
        return (mx.transpose,)
    if rule.interleaved:
        heads = config.num_attention_heads if path.endswith("q_proj") else config.num_key_value_heads
        return (_half_split(heads),)
    return ()


def _half_split(heads: int) -> Callable[[mx.array], mx.array]:
    """Rows of rotary pairs beside each other → first halves of all pairs, then second halves, head by head."""

    def permute(array: mx.array) -> mx.array:
        rows, width = array.shape
        return array.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)

    return permute


def _rows(start: int, stop: int) -> Callable[[mx.array], mx.array]:
    return lambda array: array[0, start:stop]


def _first(array: mx.array) -> mx.array:
    return array[0]


def _check(name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ConvertError(
            f"The source's {shown(name)} is {list(stored.shape)}, its configuration implies {list(shape)}.",
            code="wrong_shape",
            hint="Configuration and weights are not of the same model.",
        )
