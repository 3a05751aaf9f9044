"""What ranks say to each other: each a thread here, as if it were a machine of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeVar

import pytest

from mixtral_mlx.distributed import DistributedError
from mixtral_mlx.distributed.link import Backend, Link, Place, meet
from mixtral_mlx.distributed.ranks import Loading, agreed

from . import ranks

T = TypeVar("T")


def met(size: int, folder: Path, do: Callable[[Link], T], backend: Backend = "ring") -> list[T]:
    """What `do` gives on each of so many ranks that have met."""
    addresses = tuple(
        (host, int(port))
        for host, port in (one.split(":") for (one,) in json.loads(ranks.hostfile(folder, size).read_text()))
    )

    def one(rank: int) -> Link:
        where = addresses if backend == "ring" else addresses[:1]
        return meet(Place(rank, size, where, backend), {"model": "m"}, start_s=20)

    with ThreadPoolExecutor(size) as pool, ExitStack() as at_end:
        links = [at_end.enter_context(closing(link)) for link in pool.map(one, range(size))]
        return list(pool.map(do, links))


@pytest.mark.parametrize("backend", ["ring", "jaccl"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_said_at_once_is_heard_by_all(size: int, backend: Backend, tmp_path: Path) -> None:
    def talk(link: Link) -> object:
        link.tell({"from": link.place.rank})
        return [said["from"] for said in link.hear_all()] if link.place.rank == 0 else link.hear()

    lead, *others = met(size, tmp_path, talk, backend)
    assert lead == list(range(1, size))
    assert others == [{"from": 0}] * (size - 1)


def test_without_a_split_every_rank_learns_what_memory_each_has(tmp_path: Path) -> None:
    memory = (64 << 30, 36 << 30, 16 << 30)
    found = met(3, tmp_path, lambda link: agreed(link, Loading(memory=memory[link.place.rank]), "float16"))
    assert [loading.weights for loading in found] == [memory] * 3
    found = met(2, tmp_path, lambda link: agreed(link, Loading(weights=(3.0, 1.0), memory=8), "float16"))
    assert [loading.weights for loading in found] == [(3.0, 1.0)] * 2


@pytest.mark.parametrize(
    ("own", "all_of_them"),
    [
        (("bfloat16", "float16"), "float16"),
        (("float16", "bfloat16"), "float16"),
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("bfloat16", "float32"), "float32"),
    ],
)
def test_chips_that_would_compute_in_different_dtypes_agree_on_one(
    own: tuple[str, str], all_of_them: str, tmp_path: Path
) -> None:
    found = met(2, tmp_path, lambda link: agreed(link, Loading(memory=1), own[link.place.rank]))
    assert [loading.dtype for loading in found] == [all_of_them] * 2


def test_a_rank_that_waits_for_one_that_leaves_is_told(tmp_path: Path) -> None:
    def wait(link: Link) -> str:
        if link.place.rank == 0:
            link.close()
            return ""
        with pytest.raises(DistributedError, match="Rank 0 has left") as told:
            agreed(link, Loading(memory=1), "float32")
        return told.value.code

    assert met(2, tmp_path, wait)[1] == "rank_lost"


# Where `mlx.launch` has put this process.


def launched(folder: Path, **more: str) -> dict[str, str]:
    """An environment with files as `mlx.launch` writes them."""
    files = {
        "MLX_HOSTFILE": [["10.0.0.1:32323"], ["10.0.0.2:32324"]],
        "MLX_IBV_DEVICES": [[None, "rdma_en3"], ["rdma_en3", None]],
    }
    named = {name: folder / name for name in files if name in more}
    for name, path in named.items():
        path.write_text(more.get(name) or json.dumps(files[name]))
    return {"MLX_RANK": "1", **more, **{name: str(path) for name, path in named.items()}}


def test_a_ring_has_every_ranks_address(tmp_path: Path) -> None:
    found = Place.find(launched(tmp_path, MLX_HOSTFILE=""))
    assert found == Place(1, 2, (("10.0.0.1", 32323), ("10.0.0.2", 32324)), "ring")


def test_jaccl_has_rank_0s_address(tmp_path: Path) -> None:
    found = Place.find(launched(tmp_path, MLX_IBV_DEVICES="", MLX_JACCL_COORDINATOR="10.0.0.1:32323"))
    assert found == Place(1, 2, (("10.0.0.1", 32323),), "jaccl")


def test_a_process_alone_has_no_place(tmp_path: Path) -> None:
    assert Place.find({}) is None
    assert Place.find({**launched(tmp_path, MLX_HOSTFILE='[["10.0.0.1:1"]]'), "MLX_RANK": "0"}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "MLX_RANK is set and MLX_HOSTFILE is not"),
        ({"MLX_JACCL_COORDINATOR": "10.0.0.1:1"}, "MLX_RANK is set and MLX_IBV_DEVICES is not"),
        ({"MLX_HOSTFILE": "{"}, "is not what mlx.launch writes for a ring"),
        ({"MLX_HOSTFILE": "[[1], [2]]"}, "is not what mlx.launch writes for a ring"),
        ({"MLX_HOSTFILE": "[]"}, "This is rank 1 and .* has 0 hosts"),
        ({"MLX_RANK": "x", "MLX_HOSTFILE": ""}, "is not what mlx.launch writes for a ring"),
        ({"MLX_IBV_DEVICES": "", "MLX_JACCL_COORDINATOR": "mac1"}, "is not what mlx.launch writes for a jaccl"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DistributedError, match=message) as refused:
        Place.find(launched(tmp_path, **environment))
    assert refused.value.code == "bad_hostfile"
