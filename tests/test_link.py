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
from mixtral_mlx.distributed.link import Link, Place, meet
from mixtral_mlx.distributed.ranks import Loading, budgets

from . import ranks

T = TypeVar("T")


def met(size: int, folder: Path, do: Callable[[Link], T]) -> list[T]:
    """What `do` gives on each of so many ranks that have met."""
    addresses = tuple(
        (host, int(port))
        for host, port in (one.split(":") for (one,) in json.loads(ranks.hostfile(folder, size).read_text()))
    )

    def one(rank: int) -> Link:
        return meet(Place(rank, addresses), {"model": "m"}, start_s=20)

    with ThreadPoolExecutor(size) as pool, ExitStack() as at_end:
        links = [at_end.enter_context(closing(link)) for link in pool.map(one, range(size))]
        return list(pool.map(do, links))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_said_at_once_is_heard_by_all(size: int, tmp_path: Path) -> None:
    def talk(link: Link) -> object:
        link.tell({"from": link.place.rank})
        return [said["from"] for said in link.hear_all()] if link.place.rank == 0 else link.hear()

    lead, *others = met(size, tmp_path, talk)
    assert lead == list(range(1, size))
    assert others == [{"from": 0}] * (size - 1)


def test_without_a_split_every_rank_learns_what_memory_each_has(tmp_path: Path) -> None:
    found = met(3, tmp_path, lambda link: budgets(link, Loading(memory=(64, 36, 16)[link.place.rank] << 30)))
    assert found == [(64 << 30, 36 << 30, 16 << 30)] * 3


def test_a_rank_that_waits_for_one_that_leaves_is_told(tmp_path: Path) -> None:
    def wait(link: Link) -> str:
        if link.place.rank == 0:
            link.close()
            return ""
        with pytest.raises(DistributedError, match="Rank 0 has left") as told:
            budgets(link, Loading(memory=1))
        return told.value.code

    assert met(2, tmp_path, wait)[1] == "rank_lost"
