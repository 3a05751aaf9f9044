import errno
import hashlib
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

from mixtral_mlx.hub.fetch import CHUNK_BYTES, fetch, prefetch
from mixtral_mlx.hub.listing import HubFile, Listing, cached, list_files
from mixtral_mlx.hub.patience import HubError, Patience
from tests.hub_server import TOKEN, Fault, HubServer, Repo, hub_server

REPO = "org/mix"
SHARDS = [f"model-{n:05}-of-00006.safetensors" for n in range(1, 7)]
BUSY = Fault("status", status=429, headers={"Retry-After": "7"})
BROKEN = Fault("status", status=503)


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def patience(self, tries: int = 10) -> Patience:
        return Patience(tries=tries, sleep=self.sleep, clock=lambda: self.now)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True, scope="module")
def own_session() -> Iterator[None]:
    """huggingface_hub keeps its connections for as long as the process lives; these tests begin and end without any."""
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one checkpoint on it, for a person who is logged in."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server() as server:
        server.repos[REPO] = Repo(checkpoint())
        point_at(server.url, monkeypatch)
        yield server


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def checkpoint(shard_bytes: int = 1 << 20) -> dict[str, bytes]:
    random_bytes = random.Random(3).randbytes
    return {
        "README.md": b"not wanted",
        "config.json": b'{"model_type": "mixtral"}',
        "model.safetensors.index.json": random_bytes(9_000),
        "tokenizer.model": random_bytes(50_000),
        "pytorch_model.bin": random_bytes(20_000),
        **{name: random_bytes(shard_bytes) for name in SHARDS},
    }


def fetch_all(listing: Listing, folder: Path, clock: Clock, files: tuple[HubFile, ...] | None = None) -> list[Path]:
    folder.mkdir(exist_ok=True)
    with closing(prefetch(listing, files or listing.needed, folder, patience=clock.patience())) as paths:
        return list(paths)


def one(hub: HubServer, clock: Clock, folder: Path, *faults: Fault, name: str = SHARDS[0]) -> Path:
    """Fetch one file of the checkpoint with `faults` on the way."""
    listing = list_files(REPO)
    hub.fault(name, *faults)
    return fetch(listing, the(listing, name), folder, patience=clock.patience())


def the(listing: Listing, name: str) -> HubFile:
    return next(file for file in listing.files if file.path == name)


# Listing


def test_the_listing_names_what_a_conversion_needs(hub: HubServer) -> None:
    listing = list_files(REPO)
    files = hub.repos[REPO].files
    beside = ["config.json", "model.safetensors.index.json", "tokenizer.model"]
    assert [file.path for file in listing.needed] == beside + SHARDS
    assert listing.commit == "c" * 40
    assert listing.form == "safetensors"
    assert listing.nbytes == sum(len(files[name]) for name in beside + SHARDS)
    assert the(listing, SHARDS[0]).sha256 == hashlib.sha256(files[SHARDS[0]]).hexdigest()
    assert the(listing, "config.json").sha256 is None


@pytest.mark.parametrize(
    ("names", "form", "weights"),
    [
        (
            ["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors", "pytorch_model.bin"],
            "safetensors",
            ["model.safetensors"],
        ),
        (
            ["model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "safetensors",
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["consolidated.safetensors", "params.json"], "safetensors", ["consolidated.safetensors"]),
        (["pytorch_model-00001-of-00001.bin", "consolidated.00.pt"], "torch", ["pytorch_model-00001-of-00001.bin"]),
        (["consolidated.00.pt", "consolidated.01.pt"], "torch", ["consolidated.00.pt", "consolidated.01.pt"]),
        (["consolidated.00.pth", "params.json"], "torch", ["consolidated.00.pth"]),
        (["adapter_model.safetensors", "mix.Q4_K_M.gguf"], "gguf", ["mix.Q4_K_M.gguf"]),
        (["../model.safetensors", "/model.safetensors", "a/../b.gguf", "pytorch_model.bin"], "torch", None),
    ],
)
def test_the_best_form_is_chosen(hub: HubServer, names: list[str], form: str, weights: list[str] | None) -> None:
    hub.repos[REPO] = Repo(dict.fromkeys(names, b"x"))
    listing = list_files(REPO)
    assert listing.form == form
    assert [file.path for file in listing.weights] == (weights or ["pytorch_model.bin"])


def test_of_several_ggufs_one_must_be_named(hub: HubServer, tmp_path: Path) -> None:
    parts = [f"Q8_0/mix.Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    hub.repos[REPO] = Repo(dict.fromkeys(["mix.Q4_K_M.gguf", "mix.Q4_K_S.gguf", "config.json", *parts], b"x"))
    for source, expected in {
        f"{REPO}:mix.Q4_K_S.gguf": ["mix.Q4_K_S.gguf"],
        f"{REPO}:q4_k_m": ["mix.Q4_K_M.gguf"],
        f"{REPO}:{parts[1]}": parts,
        f"{REPO}:Q8_0": parts,
    }.items():
        listing = list_files(source)
        assert [file.path for file in listing.weights] == expected
        assert [file.path for file in listing.beside] == ["config.json"]
    assert fetch(listing, listing.weights[0], tmp_path).parent == tmp_path
    for source in (REPO, f"{REPO}:Q4_K", f"{REPO}:Q2"):
        with pytest.raises(HubError, match=rf"(?s){REPO}:mix\.Q4_K_M\.gguf.*{REPO}:mix\.Q4_K_S\.gguf") as caught:
            list_files(source)
        assert caught.value.code == "hub_choose"


@pytest.mark.parametrize(
    "name", ["../mix.gguf", "/tmp/mix.gguf", "a/../../mix.gguf", ".hidden.gguf", "a\\b.gguf", "a\nb.gguf"]
)
def test_a_hostile_name_is_no_file(hub: HubServer, name: str) -> None:
    hub.repos[REPO] = Repo({name: b"x"})
    assert code_of(lambda: list_files(REPO))[0] == code_of(lambda: list_files(f"{REPO}:{name}"))[0] == "no_weights"


def code_of(work: Callable[[], object]) -> tuple[str, str, str]:
    with pytest.raises(HubError) as caught:
        work()
    assert TOKEN not in f"{caught.value}{caught.value.hint}"
    return caught.value.code, str(caught.value), caught.value.hint


def test_what_cannot_be_had_is_said_with_what_to_do(
    hub: HubServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(source: str, revision: str | None = None) -> tuple[str, str, str]:
        return code_of(lambda: list_files(source, revision, patience=clock.patience()))

    hub.repos["org/gated"] = Repo({"model.safetensors": b"x"}, gated=True)
    hub.repos["org/private"] = Repo({"model.safetensors": b"x"}, private=True)
    hub.repos["org/none"] = Repo({"README.md": b"x"})
    hub.repos["org/half"] = Repo({SHARDS[2]: b"x"})
    assert list_files("org/gated").nbytes == list_files("org/private").nbytes == 1
    assert refusal("org/missing")[0] == "hub_not_found"
    assert refusal(REPO, "no-such")[0] == "hub_no_revision"
    assert "README.md" in refusal("org/none")[1]
    assert refusal("org/half")[:2] == ("hub_incomplete", f"org/half has 1 of the 6 parts that {SHARDS[2]} is one of.")
    assert refusal("a b")[0] == refusal("a/b/c")[0] == "bad_repository"
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert refusal(REPO)[0] == "hub_token"
    code, _, hint = refusal("org/gated")
    assert code == "hub_gated"
    assert hint == f"Accept it on {hub.url}/org/gated, then run: hf auth login"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert refusal("org/gated")[0] == "hub_gated"
    code, _, hint = refusal("org/private")
    assert code == "hub_not_found"
    assert "hf auth login" in hint


def test_a_hub_that_stumbles_is_asked_again_and_one_that_lies_flat_is_not_for_long(
    hub: HubServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fault(f"api/{REPO}", BUSY, BROKEN)
    assert list_files(REPO, patience=clock.patience()).commit == "c" * 40
    assert clock.now >= 7
    hub.fault(f"api/{REPO}", *[BROKEN] * 9)
    assert code_of(lambda: list_files(REPO, patience=clock.patience()))[0] == "hub_failing"
    hub.hub.server_close()
    point_at("http://127.0.0.1:9", monkeypatch)
    assert code_of(lambda: list_files(REPO, patience=clock.patience()))[0] == "hub_unreachable"
    assert clock.now < 60


# Fetching


def test_every_kind_of_trouble_ends_in_the_same_bytes(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    hub.repos[REPO] = Repo(checkpoint(2 << 20))
    files = hub.repos[REPO].files
    listing = list_files(REPO)
    rng = random.Random(5)
    cuts: dict[str, list[int]] = {name: [] for name in SHARDS}
    for _ in range(50):
        cuts[rng.choice(SHARDS)].append(rng.randrange(2 << 20))
    others = [BUSY, BROKEN, Fault("status", status=500), Fault("status", status=416), Fault("status", status=403)]
    others += [Fault("wrong range", at=17), Fault("no range"), Fault("etag")]
    for name, offsets in cuts.items():
        offsets = sorted([*offsets, 1_000_000])
        steps = [after - before for before, after in zip([0, *offsets], offsets, strict=False)]
        kinds = ["short" if offset == 1_000_000 else "cut" for offset in offsets]
        hub.fault(name, *[Fault(kind, at=step) for kind, step in zip(kinds, steps, strict=True)])
        for fault in others:
            hub.faults[name].insert(rng.randrange(1, len(steps) + 1), fault)
    hub.fault("tokenizer.model", Fault("flip", at=4_321))
    hub.fault("config.json", BROKEN, Fault("cut", at=3))
    paths = fetch_all(listing, tmp_path / "new", clock)
    assert not any(hub.faults.values())
    assert {path.name: path.read_bytes() for path in paths} == {file.name: files[file.path] for file in listing.needed}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {file.name for file in listing.needed}
    again = sum(hub.sent.values()) - listing.nbytes
    assert again <= listing.nbytes / 100 + 50 * CHUNK_BYTES


def test_the_token_is_for_the_hub_alone(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    hub.repos["org/old"] = Repo({}, moved_to=REPO)
    hub.fault(SHARDS[0], Fault("cut", at=10), Fault("status", status=403), BUSY)
    listing = list_files(REPO)
    fetch_all(listing, tmp_path, clock)
    moved = Listing("org/old", "main", listing.commit, "safetensors", (), (), ())
    (tmp_path / "moved").mkdir()
    fetch(moved, the(listing, SHARDS[1]), tmp_path / "moved")
    elsewhere = hub.asked("files")
    assert len(elsewhere) == 11
    assert not any("authorization" in request.headers for request in elsewhere)
    assert TOKEN not in repr(elsewhere) + "".join(request.path for request in hub.requests)
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in hub.asked("hub"))


def test_a_part_left_behind_is_gone_on_with(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    whole = hub.repos[REPO].files[SHARDS[0]]
    (tmp_path / f"{SHARDS[0]}.part").write_bytes(whole[:1_000_000])
    assert one(hub, clock, tmp_path).read_bytes() == whole
    assert hub.sent[SHARDS[0]] == len(whole) - 1_000_000
    (tmp_path / f"{SHARDS[1]}.part").write_bytes(hub.repos[REPO].files[SHARDS[1]])  # Killed before it was renamed.
    one(hub, clock, tmp_path, name=SHARDS[1])
    assert hub.sent[SHARDS[1]] == 0
    one(hub, clock, tmp_path)
    assert hub.sent[SHARDS[0]] == len(whole) - 1_000_000


@pytest.mark.parametrize("left", [b"other bytes", b"x" * (3 << 20)])
def test_a_part_of_something_else_is_found_out(hub: HubServer, tmp_path: Path, clock: Clock, left: bytes) -> None:
    (tmp_path / f"{SHARDS[0]}.part").write_bytes(left)
    (tmp_path / SHARDS[0]).write_bytes(bytes(1 << 20))  # Of the right size, from another model.
    assert one(hub, clock, tmp_path).read_bytes() == hub.repos[REPO].files[SHARDS[0]]


CUT = Fault("cut", at=100_000)


@pytest.mark.parametrize(
    "faults",
    [
        [CUT, Fault("etag")],
        [CUT, *[Fault("etag")] * 3],
        [CUT, *[Fault("no range")] * 3],
        [CUT, *[Fault("wrong range", at=5)] * 3],
        [CUT, *[Fault("status", status=416)] * 3],
        [CUT, Fault("reset", at=200_000), Fault("reset", at=0), Fault("cut", at=0)],
        [Fault("short", at=0), Fault("short", at=5), Fault("flip", at=500_000)],
        [CUT, Fault("flip", at=500_000)],
        [Fault("etag")],
        [CUT, *[Fault("no range")] * 3, *[CUT, Fault("cut", at=0)] * 9],
    ],
)
def test_what_does_not_fit_is_never_glued(hub: HubServer, tmp_path: Path, clock: Clock, faults: list[Fault]) -> None:
    assert one(hub, clock, tmp_path, *faults).read_bytes() == hub.repos[REPO].files[SHARDS[0]]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("etag"),
        Fault("no range"),
        Fault("wrong range", at=5),
        Fault("wrong total", 5),
        Fault("status", status=416),
    ],
)
def test_one_wrong_answer_costs_nothing_of_what_is_there(
    hub: HubServer, tmp_path: Path, clock: Clock, fault: Fault
) -> None:
    one(hub, clock, tmp_path, Fault("cut", at=900_000), fault, fault)
    assert not hub.faults[SHARDS[0]]
    assert len([request for request in hub.asked("files") if request.method == "GET"]) == 4
    # The server is some way into each wrong answer when it sees that nobody listens.
    assert hub.sent[SHARDS[0]] < (1 << 20) + 2 * 300_000


def test_a_file_that_is_wrong_twice_is_refused(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    flip = Fault("flip", at=77)
    assert code_of(lambda: one(hub, clock, tmp_path, flip, flip))[0] == "hub_wrong_hash"
    assert code_of(lambda: one(hub, clock, tmp_path, flip, flip, name="config.json"))[0] == "hub_wrong_hash"
    assert not (tmp_path / SHARDS[0]).exists()
    assert (tmp_path / f"{SHARDS[0]}.part").stat().st_size == 0
    assert one(hub, clock, tmp_path).read_bytes() == hub.repos[REPO].files[SHARDS[0]]


def test_waiting_is_bounded_and_as_long_as_the_server_asks(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    one(hub, clock, tmp_path, CUT, BUSY)
    assert 7 < clock.now < 12
    limit = {"ratelimit": '"resolvers";r=0;t=90', "Retry-After": "1"}
    one(hub, clock, tmp_path, Fault("status", status=429, headers=limit), name=SHARDS[1])
    assert clock.now > 90
    too_long = Fault("status", status=429, headers={"Retry-After": "9999"})
    code, message, _ = code_of(lambda: one(hub, clock, tmp_path, too_long, name=SHARDS[2]))
    assert code == "hub_failing"
    assert "asks to wait 9999 s" in message
    code, message, hint = code_of(lambda: one(hub, clock, tmp_path, *[Fault("cut", at=9)] * 10, name=SHARDS[3]))
    assert (code, "(try 10)" in message, "same command again" in hint) == ("hub_failing", True, True)
    assert (tmp_path / f"{SHARDS[3]}.part").stat().st_size == 90
    no_ranges = [CUT, *[Fault("no range")] * 3] * 3
    assert code_of(lambda: one(hub, clock, tmp_path, *no_ranges, name=SHARDS[4]))[0] == "hub_failing"


def test_a_licence_withdrawn_on_the_way_is_said(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = list_files(REPO)
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert code_of(lambda: fetch(listing, the(listing, SHARDS[0]), tmp_path))[0] == "hub_gated"
    hub.repos[REPO].gated = False
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    del hub.repos[REPO].files[SHARDS[0]]
    assert code_of(lambda: fetch(listing, the(listing, SHARDS[0]), tmp_path))[0] == "hub_no_file"


def test_a_full_disk_a_closed_folder_and_a_second_process_are_said(
    hub: HubServer, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = list_files(REPO)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        code, message, _ = code_of(lambda: one(hub, clock, tmp_path))
    assert (code, bool(re.search(r"[\d,]+ bytes are free", message))) == ("disk_full", True)
    assert code_of(lambda: fetch(listing, listing.weights[0], tmp_path / "none"))[0] == "unwritable"
    codes: list[str] = []

    def second(done: int, total: int) -> None:
        if not codes:
            codes.append(code_of(lambda: fetch(listing, listing.weights[0], tmp_path))[0])

    fetch(listing, listing.weights[0], tmp_path, second)
    assert codes == ["in_use"]


def test_a_proxy_is_used_if_the_environment_says_so(
    hub: HubServer, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    point_at("http://hub.invalid", monkeypatch)
    close_session()
    try:
        assert one(hub, clock, tmp_path).read_bytes() == hub.repos[REPO].files[SHARDS[0]]
    finally:
        close_session()
    assert hub.requests[0].path.startswith("http://hub.invalid/")
    (there,) = [request for request in hub.requests if request.path.startswith(hub.files_url)]
    assert "authorization" not in there.headers


# One ahead


def test_one_file_is_fetched_ahead_and_no_more(hub: HubServer, tmp_path: Path) -> None:
    listing = list_files(REPO)
    seen: list[tuple[int, int]] = []
    with closing(prefetch(listing, listing.weights, tmp_path, lambda done, total: seen.append((done, total)))) as paths:
        first = next(paths)
        arrived = wait_until(lambda: hub.sent[SHARDS[1]] == 1 << 20)
        assert (first.name, arrived, hub.sent[SHARDS[2]]) == (SHARDS[0], True, 0)
        first.unlink()
        assert next(paths).name == SHARDS[1]
    assert (1 << 20, 1 << 20) in seen
    assert not first.exists()


def wait_until(done: Callable[[], bool]) -> bool:
    """Give other threads time until `done`, or ten seconds have passed."""
    event = threading.Event()
    return any(done() or event.wait(0.005) for _ in range(2000))


def test_the_file_ahead_takes_no_more_than_there_is_room_for(hub: HubServer, tmp_path: Path) -> None:
    listing = list_files(REPO)
    room = 300_000
    ahead = tmp_path / f"{SHARDS[1]}.part"
    with closing(prefetch(listing, listing.weights[:2], tmp_path, room=lambda: room)) as paths:
        next(paths)
        assert wait_until(lambda: ahead.exists() and ahead.stat().st_size > room - CHUNK_BYTES)
        room = 600_000
        assert wait_until(lambda: ahead.stat().st_size > room - CHUNK_BYTES)
        assert ahead.stat().st_size <= room
        assert next(paths).read_bytes() == hub.repos[REPO].files[SHARDS[1]]


def test_only_what_is_asked_for_is_fetched(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    listing = list_files(REPO)
    wanted = (listing.weights[1], listing.weights[4])
    assert [path.name for path in fetch_all(listing, tmp_path, clock, wanted)] == [SHARDS[1], SHARDS[4]]
    assert set(hub.sent) == {SHARDS[1], SHARDS[4]}
    assert fetch_all(listing, tmp_path, clock, ()) != []


def test_trouble_with_the_file_ahead_comes_when_its_turn_does(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    listing = list_files(REPO)
    hub.fault(SHARDS[1], *[BROKEN] * 10)
    paths = prefetch(listing, listing.weights, tmp_path, patience=clock.patience())
    assert next(paths).name == SHARDS[0]
    assert code_of(lambda: next(paths))[0] == "hub_failing"
    assert list(paths) == []


def test_a_cancelled_or_closed_download_stops_and_keeps_what_it_has(hub: HubServer, tmp_path: Path) -> None:
    listing = list_files(REPO)
    done = 0

    def count(now: int, total: int) -> None:
        nonlocal done
        done = now

    with pytest.raises(HubError) as caught:
        fetch(listing, listing.weights[0], tmp_path, count, lambda: done > 200_000)
    assert caught.value.code == "cancelled"
    kept = (tmp_path / f"{SHARDS[0]}.part").stat().st_size
    assert kept == done > 200_000
    paths = prefetch(listing, listing.weights, tmp_path, cancelled=lambda: (tmp_path / SHARDS[1]).exists())
    assert next(paths).name == SHARDS[0]
    with pytest.raises(HubError, match="cancelled"):
        list(paths)
    paths = prefetch(listing, listing.weights, tmp_path, room=lambda: 0)
    next(paths)
    paths.close()
    assert wait_until(lambda: not any(thread.name == "fetch" for thread in threading.enumerate()))


# The cache, and no network


def test_files_in_the_cache_are_used_and_left_alone(hub: HubServer, tmp_path: Path, clock: Clock) -> None:
    snapshot_download(REPO, allow_patterns=["config.json", SHARDS[0]])
    in_cache = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    hub.sent.clear()
    for commit in ("c" * 40, "d" * 40):  # The same files after an edit of the README.
        hub.repos[REPO].commit = commit
        listing = list_files(REPO)
        missing = [file for file in listing.needed if not cached(listing, file)]
        assert missing == [file for file in listing.needed if file.name not in ("config.json", SHARDS[0])]
        for path in fetch_all(listing, tmp_path / commit, clock, (the(listing, "config.json"), listing.weights[0])):
            assert path.read_bytes() == hub.repos[REPO].files[path.name]
            path.unlink()
    assert not hub.sent
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()} == in_cache


def test_offline_takes_everything_from_the_cache_or_says_what_is_missing(
    hub: HubServer, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = list_files(REPO)
    assert code_of(lambda: list_files(REPO, offline=True))[0] == "offline"
    snapshot_download(REPO, allow_patterns=["*.json", "tokenizer.model", *SHARDS[1:]])
    assert code_of(lambda: list_files(REPO, offline=True))[0] == "hub_incomplete"
    snapshot_download(REPO, allow_patterns=SHARDS)
    hub.requests.clear()
    listing = list_files(REPO, offline=True)
    assert listing.needed == tuple(
        HubFile(file.path, file.size, file.sha256, None if file.sha256 else file.blob_id) for file in online.needed
    )
    assert len(fetch_all(listing, tmp_path / "out", clock)) == 9
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list_files(REPO) == listing
    extra = HubFile("else.bin", 5)
    assert code_of(lambda: fetch(listing, extra, tmp_path))[0] == "offline"
    assert code_of(lambda: fetch(online, extra, tmp_path))[0] == "offline"
    assert not hub.requests


# Killed


FETCH_ALL = """
import sys
from pathlib import Path
from mixtral_mlx.hub.fetch import prefetch
from mixtral_mlx.hub.listing import list_files
listing = list_files(sys.argv[1])
for path in prefetch(listing, listing.needed, Path(sys.argv[2])):
    print(path.name, flush=True)
"""


def test_a_killed_download_goes_on_to_the_same_bytes(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[REPO] = Repo(checkpoint(2 << 20))
    files = hub.repos[REPO].files
    nbytes = list_files(REPO).nbytes
    folder = tmp_path / "new"
    folder.mkdir()
    environment = {
        **{"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        **{"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "HF_HUB_DISABLE_TELEMETRY": "1"},
    }
    command = [sys.executable, "-c", FETCH_ALL, REPO, str(folder)]
    moments = sorted(random.Random(8).sample(range(nbytes), 4))
    for moment in [*moments, None]:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:

            def kill(path: str, count: int, moment: int | None = moment, victim: int = process.pid) -> None:
                if moment is not None and sum(hub.sent.values()) > moment:
                    os.kill(victim, 9)

            hub.on_sent = kill
            _, errors = process.communicate(timeout=60)
        hub.on_sent = lambda path, count: None
        assert process.returncode == (0 if moment is None else -9), errors.decode()
        for path in folder.iterdir():
            assert path.suffix == ".part" or path.read_bytes() == files[path.name]
    assert {path.name for path in folder.iterdir()} == {file.name for file in list_files(REPO).needed}
    # What a dead process had not yet read from its socket is lost with it.
    assert sum(hub.sent.values()) - nbytes <= 4 * (1 << 20)
