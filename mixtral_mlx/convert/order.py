"""What is asked of a conversion: a request, its options checked against each other, and the folders it is about.

Touches nothing but to see that names are free. Carrying it out is left to `run`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RECIPES, Config, Quantization, read_json, recipe, recipe_of_patterns, shown
from .journal import SOURCE
from .names import ConvertError
from .pipeline import Target, versions
from .source import Source

KEEP = "keep"
FLOAT_RECIPES = {"bf16": "bfloat16", "f16": "float16"}
_DEFAULT_RECIPE = "q4"
_GROUP_SIZE = 64
_PATTERNS_HINT = 'A recipe file says bits by names, as {"*": 4, "*.self_attn.*": 8}.'
_RECIPES_HINT = f"There are {', '.join(RECIPES)}, and {KEEP} for what MLX has quantized."


@dataclass(frozen=True)
class Request:
    """What to convert, to where, and how. Several `recipes` are written in one pass, to `dest`-RECIPE each.

    Without any recipe, a source MLX has quantized is kept as it is, any other becomes q4. `dtype` is that of the
    floats: "auto" keeps float16 and makes everything else bfloat16. `group_size` and `mode` are for the recipes; None
    is 64 and affine."""

    source: str
    dest: Path
    recipes: tuple[str, ...] = ()
    recipe_file: Path | None = None
    group_size: int | None = None
    mode: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    offline: bool = False
    keep_source: bool = False


class Order:
    """A request whose options have been checked, and the folders it is about."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.patterns = read_json(request.recipe_file, hint=_PATTERNS_HINT) if request.recipe_file else None
        self.names = self._recipe_names()
        self.dest = _absolute(request.dest)
        self.work = self.dest.with_name(self.dest.name + ".partial")
        self.folders = [self.dest]
        if len(self.names) > 1:
            self.folders = [self.dest.with_name(f"{self.dest.name}-{name}") for name in self.names]
        self.kept_source = self.dest.with_name(self.dest.name + "-source")
        if not self.work.parent.is_dir():
            raise ConvertError(f"There is no folder {self.work.parent}.", code="no_folder", hint="Create it first.")
        if not os.path.lexists(self.work):
            self.check_free()

    def _recipe_names(self) -> tuple[str, ...]:
        names = (self.request.recipe_file.stem,) if self.request.recipe_file else self.request.recipes
        if self.request.recipe_file and self.request.recipes:
            raise ConvertError("Both recipes and a recipe file were given, expected one.", code="bad_recipe")
        for name in self.request.recipes:
            if name not in (*RECIPES, KEEP):
                raise ConvertError(f"There is no recipe {shown(name)}.", code="bad_recipe", hint=_RECIPES_HINT)
        if len(set(names)) < len(names):
            raise ConvertError("A recipe was given twice.", code="bad_recipe")
        if KEEP in names and len(names) > 1:
            raise ConvertError("`keep` stands alone: it copies what MLX has quantized.", code="bad_recipe")
        return names

    def check_free(self) -> None:
        """Raise `ConvertError` if something already has the name of what is to be written."""
        for path in [*self.folders, *([self.kept_source] if self.request.keep_source else [])]:
            if os.path.lexists(path):
                raise ConvertError(f"{path} exists already.", code="exists", hint="Choose another name, or remove it.")

    def check_here(self) -> None:
        """Raise `ConvertError` for what says how to fetch a source that need not be fetched."""
        for option, given in (("--revision", self.request.revision), ("--keep-source", self.request.keep_source)):
            if given not in (None, False):
                raise ConvertError(
                    f"{option} is for repositories, and {self.request.source} is on this machine.",
                    code="bad_option",
                    hint="Leave it out.",
                )

    def plan(self, local: Source | None) -> dict[str, Any]:
        """All that what is written depends on, but for the commit of a repository."""
        request = self.request
        source: dict[str, Any] = {"repository": request.source, "revision": request.revision}
        if local:
            # Whoever changes the source between two tries would get a mixture of both.
            stats = {path: path.stat() for path in (*local.files, *_beside(local.folder))}
            source = {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
        options = [request.group_size, request.mode, request.dtype]
        return {
            "source": source,
            "folders": [folder.name for folder in self.folders],
            "recipes": [self.patterns, *self.names, *options],
            "versions": versions(),
        }

    @property
    def kept(self) -> tuple[str, str] | None:
        """Where what is fetched lies in the work folder, and its name to be, if it is to be kept."""
        return (SOURCE, self.kept_source.name) if self.request.keep_source else None

    def targets(self, config: Config) -> list[Target]:
        """A target for each recipe, `config` being without quantization."""
        return [
            Target.plan(folder, name, config, *self._quantization(name, config))
            for folder, name in zip(self.folders, self.names or (_DEFAULT_RECIPE,), strict=True)
        ]

    def _quantization(self, name: str, config: Config) -> tuple[Quantization | None, str]:
        """The recipe called `name`, and the dtype of what it leaves as floats."""
        request = self.request
        if request.recipe_file:
            self._refuse_options("a recipe file", group_size=request.group_size, mode=request.mode)
            return recipe_of_patterns(config, self.patterns), self._dtype(config)
        if name == KEEP:
            raise ConvertError("Only what MLX has quantized can be kept as it is.", code="bad_recipe")
        if name in FLOAT_RECIPES:
            dtype = None if request.dtype in ("auto", FLOAT_RECIPES[name]) else request.dtype
            self._refuse_options(f"recipe {name}", group_size=request.group_size, mode=request.mode, dtype=dtype)
            return None, FLOAT_RECIPES[name]
        group_size = request.group_size or _GROUP_SIZE
        return recipe(config, name, group_size=group_size, mode=request.mode or "affine"), self._dtype(config)

    def keeps(self) -> bool:
        """Whether what MLX has quantized is to be kept as it is."""
        request = self.request
        if request.recipe_file or self.names not in ((), (KEEP,)):
            return False
        dtype = None if request.dtype == "auto" else request.dtype
        self._refuse_options("keeping a quantization", group_size=request.group_size, mode=request.mode, dtype=dtype)
        return True

    def _refuse_options(self, what: str, **options: object) -> None:
        for name, value in options.items():
            if value is not None:
                raise ConvertError(
                    f"{name} {value} does not go with {what}.",
                    code="bad_recipe",
                    hint="Leave it out, or choose a recipe such as q4.",
                )

    def _dtype(self, config: Config) -> str:
        if self.request.dtype != "auto":
            return self.request.dtype
        return "float16" if config.dtype == "float16" else "bfloat16"


def _absolute(dest: Path) -> Path:
    """`dest` with its parent's links followed, but not its own."""
    dest = dest.expanduser()
    return dest.resolve() if dest.name in ("", "..") else dest.parent.resolve() / dest.name


def _beside(folder: Path) -> list[Path]:
    """The small files that also make a difference."""
    names = ("config.json", "params.json", "tokenizer.model")
    return [folder / name for name in names if (folder / name).is_file()]
