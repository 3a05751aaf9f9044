"""The numbers that define a Mixtral: read them, check them, and say what follows from them.

Reads Hugging Face `config.json` and Mistral `params.json`, knows the published sizes, and computes the name, shape and
bytes of every tensor, the bytes of an expert and of a token of KV cache. Standard library only; opens no weights."""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

# Far beyond any Mixtral, and small enough that nothing computed from them can exhaust memory.
_LIMITS = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "num_local_experts": 256,
    "num_experts_per_tok": 256,
}
_MAX_JSON_BYTES = 4 << 20
_MAX_JSON_PARTS = 100_000
_FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_MODES = {  # quantization mode: allowed bits, allowed group sizes
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
_ROPE_NEEDS = {  # rope type: the numbers it must have, and may have
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor",), ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}


class MixtralError(Exception):
    """A mistake a person can mend: `str()` says what was found and expected, `code` is stable, `hint` what to do."""

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class ConfigError(MixtralError):
    """The configuration is missing, unreadable or describes no possible Mixtral."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like in a file: `kind` is "float" (F32, F16 or BF16), "U32" (packed) or "U8" (scales)."""

    shape: tuple[int, ...]
    kind: str = "float"

    def nbytes(self, dtype: str) -> int:
        """Bytes it takes with its floats held as `dtype` ("bfloat16", "float16" or "float32")."""
        size = {"float": _FLOAT_BYTES[dtype], "U32": 4, "U8": 1}[self.kind]
        return math.prod(self.shape) * size


@dataclass(frozen=True)
class Packing:
    """How one matrix is quantized: `bits` per weight in groups of `group_size` along the input, by MLX's `mode`."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def tensors(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, TensorSpec]]:
        """The packed form of the matrix `path` of `shape` (..., out, in)."""
        *lead, width = shape
        if width % self.group_size:
            raise ConfigError(
                f"{path} has {width} inputs, which is not a multiple of the quantization group size {self.group_size}.",
                code="bad_quantization",
            )
        yield f"{path}.weight", TensorSpec((*lead, width * self.bits // 32), "U32")
        yield (
            f"{path}.scales",
            TensorSpec((*lead, width // self.group_size), "float" if self.mode == "affine" else "U8"),
        )
        if self.mode == "affine":
            yield f"{path}.biases", TensorSpec((*lead, width // self.group_size))


@dataclass(frozen=True)
class Quantization:
    """MLX's `quantization` entry: a packing for all matrices, and exceptions by module path (None: left as floats)."""

    default: Packing
    overrides: Mapping[str, Packing | None] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Quantization:
        default = _packing(entry, "quantization")
        overrides: dict[str, Packing | None] = {}
        for path, value in entry.items():
            if isinstance(value, Mapping):
                overrides[path] = _packing({"mode": default.mode, **value}, f"quantization of {shown(path)}")
            elif value is True:
                overrides[path] = default
            elif value is False:
                overrides[path] = None
        return cls(default, overrides)

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = dict(vars(self.default))
        for path, packing in self.overrides.items():
            entry[path] = dict(vars(packing)) if packing else False
        return entry


@dataclass(frozen=True)
class Config:
    """A Mixtral's numbers under their Hugging Face names. Build with `read` or `from_dict`, which check them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    model_type: str = "mixtral"

    @classmethod
    def read(cls, folder: str | Path) -> Config:
        """Read `config.json`, or Mistral's `params.json`, of a checkpoint folder; raises `ConfigError`."""
        folder = Path(folder)
        if exists(folder / "config.json"):
            return cls.from_dict(read_json(folder / "config.json"), source=str(folder / "config.json"))
        if exists(folder / "params.json"):
            return cls.from_params(read_json(folder / "params.json"), source=str(folder / "params.json"))
        raise ConfigError(
            f"{folder} holds no config.json and no params.json.",
            code="no_config",
            hint="Point to a folder with a Mixtral checkpoint in it.",
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config.json") -> Config:
        """Build from Hugging Face `config.json` data, either generation; raises `ConfigError`."""
        fields = _Fields(raw, source)
        fields.require("model_type", "mixtral", code="not_mixtral")
        if raw.get("hidden_act") is not None:
            fields.require("hidden_act", "silu")
        rope = raw.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise fields.error("rope_parameters", rope, "an object")
        heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
        config = cls(
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.size("intermediate_size"),
            num_hidden_layers=fields.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.size("num_key_value_heads"),
            head_dim=fields.head_dim(hidden, heads),
            num_local_experts=fields.size("num_local_experts"),
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5, below=1.0),
            rope_theta=_Fields({**rope, **_without_none(raw)}, source).number("rope_theta", 1e6, above=1.0, below=1e12),
            rope_scaling=fields.rope_scaling(raw.get("rope_scaling") or rope),
            sliding_window=fields.optional_count("sliding_window"),
            max_position_embeddings=fields.optional_count("max_position_embeddings") or 32768,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            bos_token_id=fields.token_ids("bos_token_id", (1,))[0],
            eos_token_ids=fields.token_ids("eos_token_id", (2,)),
            dtype=fields.dtype(),
            quantization=fields.quantization(),
        )
        config._check(source)
        return config

    @classmethod
    def from_params(cls, raw: Mapping[str, Any], *, source: str = "params.json") -> Config:
        """Build from Mistral's `params.json`: the torrent's own names, or the hub's Hugging Face-like ones."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source} holds no JSON object.", code="bad_config")
        moe = raw.get("moe")
        if "dim" in raw and not isinstance(moe, Mapping):
            raise ConfigError(
                f"{source} has no `moe` entry, so this is no mixture of experts.",
                code="not_mixtral",
                hint=_NOT_MIXTRAL,
            )
        renamed = dict(raw)
        for theirs, ours in _MISTRAL_NAMES.items():
            if theirs in raw:
                renamed[ours] = raw[theirs]
        if isinstance(moe, Mapping):
            renamed |= {"num_local_experts": moe.get("num_experts"), **_without_none(dict(moe))}
        # The hub's params.json holds the window as a string.
        window = raw.get("sliding_window")
        if isinstance(window, str) and window.isdecimal() and len(window) < 10:
            renamed["sliding_window"] = int(window)
        return cls.from_dict({"model_type": "mixtral", **renamed}, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Hugging Face `config.json` data that this program, mlx-lm and transformers all read."""
        entry: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "hidden_act": "silu"}
        entry |= {k: v for k, v in vars(self).items() if k not in ("quantization", "eos_token_ids", "dtype")}
        entry["eos_token_id"] = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids)
        entry["torch_dtype"] = self.dtype
        if self.quantization:
            # mlx-lm reads the first, other programs that look for quantized weights the second.
            entry["quantization"] = entry["quantization_config"] = self.quantization.to_dict()
        return entry

    def modules(self) -> dict[str, tuple[int, ...]]:
        """Every matrix that may be quantized: module path → shape (..., out, in)."""
        hidden, experts, ffn = self.hidden_size, self.num_local_experts, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocab_size, hidden)}
        for n in range(self.num_hidden_layers):
            attention, moe = f"model.layers.{n}.self_attn", f"model.layers.{n}.block_sparse_moe"
            shapes |= {
                f"{attention}.q_proj": (queries, hidden),
                f"{attention}.k_proj": (keys, hidden),
                f"{attention}.v_proj": (keys, hidden),
                f"{attention}.o_proj": (hidden, queries),
                f"{moe}.gate": (experts, hidden),
                f"{moe}.switch_mlp.gate_proj": (experts, ffn, hidden),
                f"{moe}.switch_mlp.up_proj": (experts, ffn, hidden),
                f"{moe}.switch_mlp.down_proj": (experts, hidden, ffn),
            }
        if not self.tie_word_embeddings:
            shapes["lm_head"] = (self.vocab_size, hidden)
        return shapes

    def packing(self, path: str, has_scales: Callable[[str], bool] = lambda path: True) -> Packing | None:
        """How module `path` is quantized. As in mlx-lm, a module the settings do not name is quantized
        by the default if the checkpoint holds scales for it (`has_scales(path)`)."""
        if self.quantization is None:
            return None
        if path in self.quantization.overrides:
            return self.quantization.overrides[path]
        return self.quantization.default if has_scales(path) else None

    def tensors(self, has_scales: Callable[[str], bool] = lambda path: True) -> dict[str, TensorSpec]:
        """Name → shape and kind of every tensor of the model in mlx-lm's layout, in the order of use."""
        specs: dict[str, TensorSpec] = {}
        for path, shape in self.modules().items():
            packing = self.packing(path, has_scales)
            if packing:
                specs.update(packing.tensors(path, shape))
            else:
                specs[f"{path}.weight"] = TensorSpec(shape)
        norms = [
            f"model.layers.{n}.{name}"
            for n in range(self.num_hidden_layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        for path in [*norms, "model.norm"]:
            specs[f"{path}.weight"] = TensorSpec((self.hidden_size,))
        return specs

    def nbytes(self, dtype: str | None = None) -> int:
        """Bytes of all weights."""
        return sum(spec.nbytes(dtype or self.dtype) for spec in self.tensors().values())

    def expert_nbytes(self, layer: int = 0, dtype: str | None = None) -> int:
        """Bytes of one expert of a layer: its gate, up and down projections."""
        prefix = f"model.layers.{layer}.block_sparse_moe.switch_mlp."
        stack = sum(s.nbytes(dtype or self.dtype) for name, s in self.tensors().items() if name.startswith(prefix))
        return stack // self.num_local_experts

    def kv_nbytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of keys and values that one token adds to the KV cache, over all layers."""
        values = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return values * _FLOAT_BYTES[dtype or self.dtype]

    def parameters(self) -> int:
        """How many weights there are, quantized or not."""
        return sum(math.prod(spec.shape) for spec in replace(self, quantization=None).tensors().values())

    @property
    def name(self) -> str:
        """What people call it: `Mixtral 8x7B`, or its size where it is none of the published ones."""
        for name, known in KNOWN.items():
            shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts")
            if all(getattr(self, key) == getattr(known, key) for key in shape):
                return f"Mixtral {name}"
        return f"Mixtral ({_short(self.parameters())} parameters)"

    def _check(self, source: str) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        experts, chosen = self.num_local_experts, self.num_experts_per_tok
        wrong = None
        if heads % kv_heads:
            wrong = f"{heads} attention heads, which {kv_heads} key/value heads do not divide evenly"
        elif chosen > experts:
            wrong = f"{chosen} experts per token but there are only {experts} experts"
        elif self.head_dim % 2:
            wrong = f"a head_dim of {self.head_dim}, and rotary embedding needs an even one"
        elif any(token >= self.vocab_size for token in (self.bos_token_id, *self.eos_token_ids)):
            wrong = f"a begin or end token outside its vocabulary of {self.vocab_size}"
        if wrong:
            raise ConfigError(f"{source} says {wrong}.", code="bad_config", hint=_NOT_MIXTRAL)
        for path, shape in self.modules().items():
            if packing := self.packing(path):
                list(packing.tensors(path, shape))


_NOT_MIXTRAL = "Is this a Mixtral checkpoint? This program runs Mixtral 8x7B, 8x22B and models of the same kind."
_MISTRAL_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}

KNOWN: dict[str, Config] = {
    "8x7B": Config(32000, 4096, 14336, 32, 32, 8, 128, 8, 2),
    "8x22B": Config(32768, 6144, 16384, 56, 48, 8, 128, 8, 2, max_position_embeddings=65536),
}


def read_json(path: Path, *, hint: str = "Fetch the file again.") -> Any:
    """Parse a JSON file, which may be hostile; raises `ConfigError` naming it, with `hint` where it is no JSON."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path} is not a regular file.", code="bad_json")
        if info.st_size > _MAX_JSON_BYTES:
            raise ConfigError(f"{path} is {info.st_size:,} bytes, too large for a JSON file.", code="bad_json")
        return parse_json(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}).", code="bad_json", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", code="unreadable") from None


def parse_json(text: str, **options: Any) -> Any:
    """`json.loads` for what may be hostile: raises `ValueError` for all that is no JSON or would take seconds."""
    if text.count("[") + text.count("{") > _MAX_JSON_PARTS:
        raise ValueError("it has too many parts")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def exists(path: Path) -> bool:
    """Whether there is such a file; true also where it cannot be told, so that opening it says why."""
    try:
        return path.exists()
    except OSError:
        return True


def shown(value: Any) -> str:
    """A value from a file, for a message: short, however long or deep it is, and free of control characters."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = 100


class _Fields:
    """Typed access to the entries of a configuration, naming file and field in every error."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source} holds no JSON object.", code="bad_config")
        self.raw = raw
        self.source = source

    def error(self, name: str, found: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"{self.source} has {'nothing' if found is None else shown(found)} for `{name}`, expected {expected}.",
            code="bad_config",
            hint=_NOT_MIXTRAL,
        )

    def require(self, name: str, expected: str, *, code: str = "bad_config") -> None:
        found = self.raw.get(name)
        if found != expected:
            raise ConfigError(
                f"{self.source} says {name} {shown(found)}, expected {expected!r}.",
                code=code,
                hint=_NOT_MIXTRAL,
            )

    def size(self, name: str) -> int:
        value = self.raw.get(name)
        if not _is_int(value) or not 1 <= value <= _LIMITS[name]:
            raise self.error(name, value, f"a whole number from 1 to {_LIMITS[name]:,}")
        return int(value)

    def optional_count(self, name: str) -> int | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not _is_int(value) or not 1 <= value <= 1 << 30:  # Two of them still add up in 32 bits.
            raise self.error(name, value, f"a whole number from 1 to {1 << 30:,}")
        return int(value)

    def head_dim(self, hidden: int, heads: int) -> int:
        value = self.raw.get("head_dim")
        if value is None and hidden % heads == 0:
            value = hidden // heads
        if not _is_int(value) or not 4 <= value <= 1024:
            raise self.error("head_dim", value, f"a whole number from 4 to 1,024 ({hidden} wide, {heads} heads)")
        return int(value)

    def number(self, name: str, default: float, *, above: float = 0.0, below: float) -> float:
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
            raise self.error(name, value, f"a number between {above:g} and {below:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def token_ids(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.raw.get(name)
        if value is None:
            return default
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(_is_int(i) and 0 <= i < _LIMITS["vocab_size"] for i in ids):
            raise self.error(name, value, "a token id or a list of them")
        return tuple(ids)

    def dtype(self) -> str:
        value = self.raw.get("torch_dtype") or self.raw.get("dtype") or "bfloat16"
        name = value.removeprefix("torch.") if isinstance(value, str) else ""
        if name not in _FLOAT_BYTES:
            raise self.error("torch_dtype", value, " or ".join(_FLOAT_BYTES))
        return name

    def rope_scaling(self, value: Any) -> Mapping[str, Any] | None:
        if not isinstance(value, Mapping):
            raise self.error("rope_scaling", value, "an object")
        value = _without_none(value)
        kind = value.get("rope_type", value.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
            raise self.error("rope_scaling.rope_type", kind, "one of default, " + ", ".join(_ROPE_NEEDS))
        needed, allowed = _ROPE_NEEDS[kind]
        # What mlx-lm would leave out of its sum changes what the model says.
        unknown = value.keys() - {"type", "rope_type", "rope_theta", *needed, *allowed}
        if unknown:
            raise self.error("rope_scaling", min(unknown), "only " + ", ".join((*needed, *allowed)))
        scaling: dict[str, Any] = {"rope_type": kind}
        for key in (*needed, *allowed):
            if key in needed or key in value:
                scaling[key] = self.rope_number(key, value.get(key))
        return scaling

    def rope_number(self, key: str, value: Any) -> float:
        low, high = (2, 1 << 31) if key == "original_max_position_embeddings" else (1e-3, 1e6)
        low = 0 if key.startswith("mscale") else low
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(f"rope_scaling.{key}", value, f"a number from {low:g} to {high:g}")
        return value

    def quantization(self) -> Quantization | None:
        entry = self.raw.get("quantization") or self.raw.get("quantization_config")
        if entry is None:
            return None
        if not isinstance(entry, Mapping):
            raise self.error("quantization", entry, "an object")
        if method := entry.get("quant_method"):
            raise ConfigError(
                f"{self.source} has weights quantized by {shown(method)}, expected MLX's own form or none.",
                code="unsupported_quantization",
                hint="Use an unquantized checkpoint, or one quantized by MLX.",
            )
        return Quantization.from_dict(entry)


def _packing(entry: Mapping[str, Any], what: str) -> Packing:
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _MODES:
        raise ConfigError(
            f"The {what} has mode {shown(mode)}, expected one of {', '.join(_MODES)}.", code="bad_quantization"
        )
    bits, group = entry.get("bits"), entry.get("group_size")
    allowed_bits, allowed_groups = _MODES[mode]
    if not _is_int(bits) or bits not in allowed_bits or not _is_int(group) or group not in allowed_groups:
        raise ConfigError(
            f"The {what} has {shown(bits)} bits in groups of {shown(group)}, expected bits in {allowed_bits}"
            f" and groups in {allowed_groups} for mode {mode}.",
            code="bad_quantization",
        )
    return Packing(bits, group, mode)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _without_none(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


# Recipe: bits of the experts, bits of everything else. Experts are 97 % of the weights; what little the rest would save
# is paid for in quality, and the router, which decides who answers, never goes below 8.
RECIPES: dict[str, tuple[int, int] | None] = {
    "q8": (8, 8),
    "q6": (6, 8),
    "q5": (5, 8),
    "q4": (4, 8),
    "q4-mini": (4, 4),
    "q3": (3, 6),
    "q2": (2, 6),
    "bf16": None,
    "f16": None,
}
_ROUTER_BITS = 8
_GROUP_SIZE = 64


def recipe(config: Config, name: str, *, group_size: int = _GROUP_SIZE, mode: str = "affine") -> Quantization | None:
    """The quantization that recipe `name` gives `config`; None for the recipes that leave floats.

    `mode` other than "affine" applies to the experts, in the group size that mode has."""
    if name not in RECIPES:
        raise ConfigError(f"There is no recipe {shown(name)}, only {', '.join(RECIPES)}.", code="bad_recipe")
    chosen = RECIPES[name]
    if chosen is None:
        return None
    expert_bits, dense_bits = chosen
    dense, router = (
        _packing({"bits": b, "group_size": group_size}, f"recipe {name}") for b in (dense_bits, _ROUTER_BITS)
    )
    experts = _packing({"bits": expert_bits, "group_size": group_size}, f"recipe {name}")
    if mode not in _MODES:
        raise ConfigError(f"There is no mode {shown(mode)}, only {', '.join(_MODES)}.", code="bad_recipe")
    if mode != "affine":
        (mode_bits,), (mode_group,) = _MODES[mode]
        if mode_bits != expert_bits:
            raise ConfigError(f"Mode {mode} has {mode_bits} bits, recipe {name} {expert_bits}.", code="bad_recipe")
        experts = Packing(mode_bits, mode_group, mode)
    overrides: dict[str, Packing | None] = {}
    for path in config.modules():
        if path.endswith(".gate"):
            overrides[path] = router
        elif ".switch_mlp." not in path:
            overrides[path] = dense
    return Quantization(experts, {path: packing for path, packing in overrides.items() if packing != experts})


def recipe_of_patterns(config: Config, patterns: Any) -> Quantization:
    """A recipe given as data: `{"*": 4, "*.self_attn.*": 8, "lm_head": {"bits": 6, "group_size": 32}}`.

    Keys are shell patterns for module paths, values are bits or packings, null leaves floats; the last match counts.
    What no pattern matches stays floats, and a router below 8 bits gets 8."""
    if not isinstance(patterns, Mapping) or not patterns:
        raise ConfigError("A recipe file holds an object of patterns and bits.", code="bad_recipe")
    packings = {pattern: _recipe_entry(pattern, value) for pattern, value in patterns.items()}
    paths = list(config.modules())
    for pattern in packings:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(
                f"The recipe's pattern {shown(pattern)} fits no module.",
                code="bad_recipe",
                hint=f"Modules are named like {paths[1]}, {paths[6]} and {paths[0]}.",
            )
    chosen: dict[str, Packing | None] = {}
    for path in paths:
        matching = [packing for pattern, packing in packings.items() if fnmatchcase(path, pattern)]
        packing = matching[-1] if matching else None
        if path.endswith(".gate") and packing and packing.bits < _ROUTER_BITS:
            group_size = packing.group_size if packing.mode == "affine" else _GROUP_SIZE
            packing = Packing(_ROUTER_BITS, group_size)
        chosen[path] = packing
    default = next((packing for packing in chosen.values() if packing), None)
    if default is None:
        raise ConfigError("This recipe quantizes nothing; use the recipe bf16 or f16.", code="bad_recipe")
    return Quantization(default, {path: packing for path, packing in chosen.items() if packing != default})


def _recipe_entry(pattern: str, value: Any) -> Packing | None:
    if value is None:
        return None
    entry = value if isinstance(value, Mapping) else {"bits": value}
    if unknown := entry.keys() - {"bits", "group_size", "mode"}:
        raise ConfigError(
            f"The recipe's entry {shown(pattern)} holds {shown(min(unknown))}, known are bits, group_size and mode.",
            code="bad_recipe",
        )
    mode = entry.get("mode", "affine")
    groups = _MODES[mode][1] if isinstance(mode, str) and mode in _MODES else ()
    default = groups[0] if len(groups) == 1 else _GROUP_SIZE
    return _packing({"group_size": default, **entry}, f"recipe entry {shown(pattern)}")
