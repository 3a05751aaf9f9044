"""LoRA adapters in mlx-lm's format: read and checked, put into a running model, and taken out again.

A folder with `adapter_config.json` and `adapters.safetensors`, as `mlx_lm.lora` writes them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..config import MixtralError, read_json, shown
from ..weights import opened_file, read_header

if TYPE_CHECKING:
    from ..model import Model

_MOST_RANK = 4096


class AdapterError(MixtralError):
    """An adapter that cannot be read, or is not for this model."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk. `layers` is how many of the last layers it changes, `keys` which matrices of them (all if
    None); `key` tells its contents apart from others'."""

    folder: Path
    key: str
    layers: int
    rank: int
    scale: float
    keys: tuple[str, ...] | None
    shapes: Mapping[str, tuple[int, ...]]
    nbytes: int

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Check a folder without reading its weights; raises `MixtralError`."""
        config, file = read_json(folder / "adapter_config.json"), folder / "adapters.safetensors"
        kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
        if kind != "lora":
            raise _refused(
                folder, f"is of the kind {kind!r}, expected 'lora'", "Fuse it into the model and convert that."
            )
        try:
            lora = config["lora_parameters"]
            layers, rank, scale, keys = config["num_layers"], lora["rank"], lora["scale"], lora.get("keys")
        except (KeyError, TypeError, AttributeError):
            raise _refused(folder, "has no num_layers, or no lora_parameters with rank and scale") from None
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (layers, rank))
        if (
            not (whole and isinstance(scale, int | float) and math.isfinite(scale))
            or not 1 <= rank <= _MOST_RANK
            or layers == 0
        ):
            raise _refused(folder, f"has num_layers {layers!r}, rank {rank!r} and scale {scale!r}, which cannot be")
        if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
            raise _refused(folder, "has keys that are no list of names")
        with opened_file(file) as fd:
            spans = read_header(file, fd)
        with open(file, "rb") as weights:
            digest = hashlib.file_digest(weights, "blake2b")
        digest.update(json.dumps(config).encode())
        shapes = {name: span.shape for name, span in spans.items()}
        nbytes = sum(span.nbytes for span in spans.values())
        return cls(
            folder, digest.hexdigest(), layers, rank, float(scale), tuple(keys) if keys else None, shapes, nbytes
        )


def put(model: Model, adapter: Adapter) -> None:
    """Give `model` the adapter, in the place of one it has; raises `AdapterError`, and then it has none."""
    # Here, since it brings transformers, which takes seconds and nothing else needs.
    from mlx_lm.tuner.utils import linear_to_lora_layers

    take_out(model)
    count = len(model.layers) if adapter.layers < 0 else min(adapter.layers, len(model.layers))
    how: dict[str, Any] = {"rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0}
    if adapter.keys:
        how["keys"] = list(adapter.keys)
    try:
        linear_to_lora_layers(model, count, how)
        _load(model, adapter)
    except BaseException:
        take_out(model)
        raise


def take_out(model: Model) -> None:
    """Give every matrix that an adapter has changed its own place back."""
    for layer in model.layers:
        if inner := list(_adapted(layer)):
            layer.update_modules(tree_unflatten(inner))


def _load(model: Model, adapter: Adapter) -> None:
    expected = {
        name: array.shape for name, array in tree_flatten(model.parameters()) if name.endswith((".lora_a", ".lora_b"))
    }
    found = adapter.shapes
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise _refused(
            adapter.folder,
            f"is not for this model: {shown(wrong[0])} is {found.get(wrong[0])}, expected {expected.get(wrong[0])}",
        )
    weights = mx.load(str(adapter.folder / "adapters.safetensors"))
    assert isinstance(weights, dict)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    mx.eval(list(weights.values()))


def _adapted(layer: Any) -> Iterator[tuple[str, Any]]:
    """The matrices under adapters, by name."""
    for name, module in layer.named_modules():
        if "lora_a" in module:
            yield name, module["linear"] if "linear" in module else module["embedding"]


def _refused(folder: Path, what: str, hint: str = "") -> AdapterError:
    return AdapterError(f"The adapter in {folder} {what}.", code="bad_adapter", hint=hint)
