"""What there is to convert: finds out what a folder or file holds and opens it.

The container (safetensors, torch, GGUF) decides how bytes become tensors; the names inside decide what they are, and
that is `names`' business. Opens nothing outside the folder it is given."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, exists, read_json, shown
from ..prompt import Tokenizer
from .names import ConvertError, Stored
from .safetensors import open_safetensors
from .tokenizer import write_tokenizer_json

_PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,250}", re.ASCII)


@dataclass(frozen=True)
class Source:
    """An opened source. `folder` is where its tokenizer lies; `files` hold the tensors; `format` says it in a word."""

    folder: Path
    config: Config
    tensors: Mapping[str, Stored]
    files: tuple[Path, ...]
    format: str

    built_tokenizer: Callable[[Path], object] | None = None

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer in the forms this program and others read; raises `PromptError`."""
        if self.built_tokenizer and not any(self.folder.glob("tokenizer*")):
            self.built_tokenizer(folder)
        else:
            shutil.copyfile(Tokenizer.read(self.folder).file, folder / "tokenizer.model")
        write_tokenizer_json(folder / "tokenizer.model", folder)

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def open_source(path: Path) -> Source:
    """Open the checkpoint in `path`, a folder or a GGUF file; raises `MixtralError`."""
    if path.is_file() and path.suffix == ".gguf":
        from .gguf import parts_of

        return _open_gguf(parts_of(path))
    if not path.is_dir():
        raise ConvertError(f"There is no folder {path}.", code="no_model", hint="Give a folder or a .gguf file.")
    for form, files in _candidates(path):
        if files and form == "gguf":
            return _open_gguf(files)
        if files:
            return _open_folder(path, form, files)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise ConvertError(
        f"{path} holds no weights in a known form (found: {found}).",
        code="no_weights",
        hint="Known are *.safetensors, pytorch_model*.bin, consolidated*.pt and *.pth, and *.gguf.",
    )


def _candidates(folder: Path) -> list[tuple[str, list[Path]]]:
    """Container → its files, best first: a hub folder often holds the same weights twice."""
    return [
        ("safetensors", _listed(folder, "model.safetensors.index.json") or _files(folder, "model*.safetensors")),
        ("safetensors", _files(folder, "weights*.safetensors")),
        ("safetensors", _files(folder, "consolidated*.safetensors")),
        ("torch", _listed(folder, "pytorch_model.bin.index.json") or _files(folder, "pytorch_model*.bin")),
        ("torch", _files(folder, "consolidated*.pth") or _files(folder, "consolidated*.pt")),
        ("gguf", _files(folder, "*.gguf")),
    ]


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def _listed(folder: Path, index_name: str) -> list[Path]:
    """The files an index lists; every one a plain name in the folder."""
    if not exists(folder / index_name):
        return []
    index = read_json(folder / index_name)
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ConvertError(f"{folder / index_name} has no weight_map.", code="bad_index")
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ConvertError(f"{folder / index_name} lists {shown(name)}, expected a plain name.", code="bad_index")
        names.add(name)
    return [folder / name for name in sorted(names)]


def _open_folder(folder: Path, form: str, files: list[Path]) -> Source:
    config, packed = read_config(folder)
    if form == "torch":
        from .torch import open_torch

        tensors = open_torch(files)
    else:
        tensors = open_safetensors(files)
    if packed:
        from .packed import unpack

        tensors = unpack(tensors, packed)
        form = str(packed["quant_method"])
    return Source(folder, config, tensors, tuple(files), form)


def read_config(folder: Path) -> tuple[Config, dict[str, Any] | None]:
    """The configuration, and the AWQ or GPTQ settings if the weights are packed by one of them."""
    if not exists(folder / "config.json"):
        return Config.read(folder), None
    raw = read_json(folder / "config.json")
    settings = raw.get("quantization_config") if isinstance(raw, dict) else None
    if isinstance(settings, dict) and settings.get("quant_method") in ("awq", "gptq"):
        raw = {key: value for key, value in raw.items() if key != "quantization_config"}
        return Config.from_dict(raw, source=str(folder / "config.json")), settings
    return Config.read(folder), None


def _open_gguf(files: list[Path]) -> Source:
    from .gguf import open_gguf

    tensors, raw, build = open_gguf(files)
    config = Config.from_dict(raw, source=str(files[0]))
    return Source(files[0].parent, config, tensors, tuple(files), "gguf", build)
