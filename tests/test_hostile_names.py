"""Hostile file names, in an index and in what a hub lists: nothing outside the source and DEST is opened or made."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mixtral_mlx.config import MixtralError
from mixtral_mlx.convert.run import Request, convert
from mixtral_mlx.convert.verify import verify
from mixtral_mlx.hub.listing import list_files

from .checkpoints import TOKENIZERS
from .conversions import contents, quick_tokenizer
from .hub_server import HubServer, Repo
from .sources.make_sources import HERE
from .test_convert import assert_refused, tree
from .test_convert_hub import hub, own_session, source
from .test_hostile_files import IN_PLACE, Case, Changes, Watched, fifo, link_to, watched

__all__ = ["hub", "own_session", "quick_tokenizer", "source", "watched"]

FORMS = {
    "safetensors": ("hf", "model.safetensors.index.json"),
    "bin": ("bin-sharded", "pytorch_model.bin.index.json"),
}
# OUT is a folder beside the source that holds the very shards the index is about, X the name of one of them.
NAMES = [
    *("../X", "../../X", "../out/X", "OUT/X", "//OUT/X", "OUT", "..", ".", "", " ", "/", "//", "~/X"),
    *("/etc/passwd", "/dev/stdin", "/dev/zero", "/dev/fd/0", "/proc/self/mem", "/proc/self/cwd/X", "//etc/passwd"),
    *("~root/X", "$HOME/X"),
    *("./X", "X/", "X/.", "X/..", "X/../X", "folder/X", "folder/../../out/X", "folder/../X", "link/X", "..//X"),
    *("..\\X", "..\\out\\X", "C:\\X", "C:X", "\\\\host\\share\\X", "\\\\?\\C:\\X", "X:stream", "CON:"),
    *("\0", "X\0", "X\0.json", "\0X", "\nX", "X\n", "X\r\n", "X\t", " X", "X ", "\x1b[2JX", "X\x7f", "X\x85"),
    *("a" * 252 + "X", "a" * 10_000, "a/" * 2_000 + "X", "../" * 2_000 + "etc/passwd", "." * 300),
    *("\u2025/X", "\uff0e\uff0e/X", "..\uff0fX", "\u2215etc\u2215passwd", "..\u2044X", "X\u202e", "\u200bX", "X\ufeff"),
    *("mo\u0308del", "m\u00f6del", "\u0445.safetensors", "model\uff0esafetensors", "\ud800X", "X\udfff", "\U0010ffffX"),
    *("%2e%2e/X", "%2e%2e%2fX", "..%00X", "&#46;./X", "file:///etc/passwd", "https://example.org/X", "hf://org/mix/X"),
    *(".X", "...", "*", "X*", "?", "[a-z]X", "X|id", "X;id", "$(id)", "`id`", "'X'", '"X"', "{X}", "<X>", "X,X"),
]
"""None of these is a plain name."""
PLACES: Changes = {
    **{label: change for label, change in IN_PLACE.items() if "sparse" not in label and label != "missing"},
    **{"stdin": link_to("/dev/stdin"), "folder outside": link_to("../out"), "own folder": link_to(".")},
    **{"journal": link_to("../dest.partial/journal"), "pipe outside": link_to("../pipe")},
}
"""A plain name, and something else than a shard in its place. Links are followed: the hub's cache is made of them."""


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def base(form: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that can be converted, with an index of its form."""
    folder = tmp_path_factory.mktemp(form) / "base"
    shutil.copytree(HERE / FORMS[form][0], folder)
    shutil.copyfile(str(files("mistral_common") / "data" / TOKENIZERS["v1"]), folder / "tokenizer.model")
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A folder for the source, with others beside it that must not be touched."""
    shutil.copytree(base, tmp_path / "out")
    fifo(tmp_path / "pipe")
    return tmp_path


def index_with(base: Path, form: str, name: object, *, everywhere: bool) -> bytes:
    """The index, with `name` for one of its shards' tensors, or for all of them."""
    index = json.loads((base / FORMS[form][1]).read_bytes())
    weight_map = index["weight_map"]
    weight_map |= dict.fromkeys(weight_map if everywhere else [min(weight_map)], name)
    return json.dumps(index).encode()


def shard_of(base: Path, form: str) -> str:
    shard: str = min(json.loads((base / FORMS[form][1]).read_bytes())["weight_map"].values())
    return shard


def ask(watched: Watched, place: Path, case: Case) -> dict[str, Any]:
    """What comes of converting a case, which touches nothing but its own folders, whatever comes of it."""
    case.write(place / "source")
    before = tree(place)
    said = watched.ask(case, place / "source")
    kept = {name: what for name, what in tree(place).items() if name.split("/")[0] not in ("dest", "dest.partial")}
    assert kept == before
    assert said["outcome"] in ("refused", "used"), said
    assert outside(said["touched"], place) == []
    return said


def outside(touched: list[str], place: Path) -> list[str]:
    """Paths that are neither of the case nor of Python and its packages."""
    own = [place / "source", place / "dest", place / "dest.partial"]
    python = [Path(path) for path in {sys.prefix, sys.base_prefix, *sys.path} if path]
    # The folder that a path is in may be a link or go up; what the path itself leads to is for `PLACES`.
    found = [Path(path).parent.resolve() / Path(path).name for path in touched]
    return [str(path) for path in found if path != place and not any(path.is_relative_to(p) for p in own + python)]


def test_without_a_hostile_name_all_is_converted(watched: Watched, base: Path, place: Path) -> None:
    assert ask(watched, place, Case("right", base, {}, "source"))["outcome"] == "used"
    verify(place / "dest")


def test_there_are_at_least_40_hostile_names() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 40


@pytest.mark.parametrize("everywhere", [False, True], ids=["once", "everywhere"])
@pytest.mark.parametrize("template", NAMES)
def test_an_index_with_a_hostile_name_is_refused_and_the_name_not_followed(
    watched: Watched, form: str, base: Path, place: Path, template: str, everywhere: bool
) -> None:
    name = template.replace("OUT", str(place / "out")).replace("X", shard_of(base, form))
    changed: Changes = {FORMS[form][1]: index_with(base, form, name, everywhere=everywhere)}
    changed |= {"folder": Path.mkdir, "link": link_to("../out")}
    said = ask(watched, place, Case(repr(name), base, changed, "source"))
    assert (said["outcome"], said["detail"]) == ("refused", "bad_index")
    assert not (place / "dest").exists()
    assert not (place / "dest.partial").exists()


@pytest.mark.parametrize("label", PLACES)
def test_an_index_that_names_what_is_no_shard_is_refused(
    watched: Watched, form: str, base: Path, place: Path, label: str
) -> None:
    changed: Changes = {"hostile.bin": PLACES[label]}
    changed[FORMS[form][1]] = index_with(base, form, "hostile.bin", everywhere=False)
    said = ask(watched, place, Case(label, base, changed, "source"))
    assert said["outcome"] == "refused"
    assert not (place / "dest").exists()
    assert not (place / "dest.partial").exists()


@pytest.mark.parametrize("name", [None, True, 0, 1.5, [], ["X"], {}, {"X": "X"}])
def test_an_index_that_names_no_text_is_refused(
    watched: Watched, form: str, base: Path, place: Path, name: object
) -> None:
    changed: Changes = {FORMS[form][1]: index_with(base, form, name, everywhere=False)}
    assert ask(watched, place, Case(repr(name), base, changed, "source"))["detail"] == "bad_index"


# What a hub lists


def listed(name: str) -> str:
    return name.replace("OUT", "/tmp").replace("X", "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_that_lists_only_a_hostile_name_has_nothing_to_convert(hub: HubServer, tmp_path: Path, name: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    hub.repos["org/hostile"] = Repo({listed(name): b"x" * 99, "config.json": b"{}"})
    assert_refused(Request("org/hostile", place / "dest"), "no_weights")
    with pytest.raises(MixtralError) as refused:
        list_files(f"org/hostile:{listed(name)}")
    assert refused.value.code == "no_weights"
    assert not [request for request in hub.requests if "/resolve/" in request.path]


@pytest.mark.usefixtures("quick_tokenizer")
def test_hostile_names_beside_a_checkpoint_are_left_on_the_hub(hub: HubServer, source: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    good = contents(source)
    hostile = {listed(name): b"x" * 99 for name in NAMES if not listed(name).endswith(".gguf")}
    index = json.loads(good["model.safetensors.index.json"])
    index["weight_map"] |= dict(zip(index["weight_map"], NAMES, strict=False))
    hub.repos["org/hostile"] = Repo({**hostile, **good, "model.safetensors.index.json": json.dumps(index).encode()})
    convert(Request("org/hostile", place / "dest"))
    convert(Request(str(source), tmp_path / "local"))
    assert contents(place / "dest", manifest=False) == contents(tmp_path / "local", manifest=False)
    assert [path.name for path in place.iterdir()] == ["dest"]
    assert {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path} <= good.keys()
