"""Opening a model by its repository: fetched once, gone on with, refused in time, and shared with other programs."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download, try_to_load_from_cache

import mixtral_mlx
from mixtral_mlx.cli import main
from mixtral_mlx.config import MixtralError
from mixtral_mlx.hub import snapshot as snapshots
from mixtral_mlx.hub.patience import Patience
from mixtral_mlx.weights import Checkpoint, load, locate

from .checkpoints import TINY, read_arrays, write_tiny, write_weights
from .conversions import contents
from .hub_server import Fault, HubServer, Repo, hub_server
from .test_helper import started
from .test_hub import CUT, own_session, point_at, wait_until

__all__ = ["own_session"]
REPO = "org/mix"
COMMIT = "c" * 40
FLAT = replace(TINY, hidden_size=16)
SHARDS = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A checkpoint in three shards, and what other repositories have besides."""
    folder = write_tiny(tmp_path_factory.mktemp("hub") / "tiny", FLAT)
    arrays = read_arrays(folder)
    for file in folder.glob("model*"):
        file.unlink()
    names = sorted(arrays)
    write_weights(folder, *({name: arrays[name] for name in names[n::3]} for n in range(3)))
    return {**contents(folder), "README.md": b"not wanted", "pytorch_model.bin": bytes(20_000)}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the checkpoint on it, an empty cache, and nobody who waits between two tries."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    patience = Patience(sleep=lambda seconds: None)
    monkeypatch.setattr(snapshots, "snapshot", partial(snapshots.snapshot, patience=patience))
    with hub_server() as server:
        server.repos[REPO] = Repo(files)
        point_at(server.url, monkeypatch)
        yield server


@pytest.fixture
def blobs(hub: HubServer, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--org--mix" / "blobs"


def refusal(work: Callable[[], object]) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        work()
    assert caught.value.hint
    return caught.value


def sent(hub: HubServer) -> int:
    """Bytes of weights that the hub has sent."""
    return sum(hub.sent[name] for name in SHARDS)


def size(files: dict[str, bytes]) -> int:
    return sum(len(files[name]) for name in SHARDS)


# Opened


def test_a_repository_is_fetched_and_answers(hub: HubServer, files: dict[str, bytes]) -> None:
    read: list[tuple[int, int]] = []
    fetched: list[tuple[int, int]] = []
    how = {"progress": lambda *now: read.append(now), "fetching": lambda *now: fetched.append(now)}
    with mixtral_mlx.load(REPO, **how) as engine:  # type: ignore[arg-type]
        assert len(engine.complete([1, 5, 9], max_tokens=3).result().tokens) == 3
        assert engine.name == REPO
    assert fetched[0] == (0, size(files))
    assert fetched == sorted(fetched)
    assert fetched[-1] == (size(files), size(files))
    assert read[-1][0] == read[-1][1] > 0
    names = {path.name for path in locate(REPO).iterdir()}
    assert names == files.keys() - {"README.md", "pytorch_model.bin"}
    assert sent(hub) == size(files)


def test_progress_alone_is_told_of_fetching_too(hub: HubServer, files: dict[str, bytes]) -> None:
    told: list[tuple[int, int]] = []
    mixtral_mlx.load(REPO, progress=lambda *now: told.append(now)).close()
    assert told[0] == (0, size(files))
    assert (size(files), size(files)) in told


def test_a_command_says_how_much_it_fetches(
    hub: HubServer, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", REPO, "--prompt", "Hello", "--max-tokens", "2"]
    assert main(command) == 0
    assert f"Fetching {size(files) / 1e6:.1f} MB into the Hugging Face cache" in capsys.readouterr().err
    assert main(command) == 0
    assert "Fetching" not in capsys.readouterr().err


def test_weights_under_mlx_own_older_name_are_fetched(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny", FLAT)
    single = (tmp_path / "tiny" / "model-00001-of-00001.safetensors").read_bytes()
    small = {name: files[name] for name in ("config.json", "tokenizer.model")}
    hub.repos["org/old"] = Repo({**small, "weights.00.safetensors": single})
    assert Checkpoint.open(locate("org/old")).nbytes > 0


# Refused in time


def test_of_a_repository_that_is_no_mixtral_no_weights_are_asked_for(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.repos[REPO] = Repo({**files, "config.json": b'{"model_type": "llama"}'})
    error = refusal(lambda: locate(REPO))
    assert "config.json" in str(error)
    assert "llama" in str(error)
    assert not any(request.path.endswith(name) for request in hub.requests for name in SHARDS)


def test_too_little_room_is_said_before_the_weights_are_fetched(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [size(files) - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[0]))
    error = refusal(lambda: locate(REPO))
    assert error.code == "disk_full"
    megabytes = f"{size(files) / 1e6:.2f} MB"
    assert str(error).startswith(f"Fetching {REPO} takes {megabytes}, and the disk of ")
    assert str(error).endswith(f" has {megabytes} free.")
    assert "HF_HUB_CACHE" in error.hint
    assert sent(hub) == 0
    free[0] += 1
    Checkpoint.open(locate(REPO))


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["pytorch_model.bin"], REPO),
        (["consolidated.00.pth", "params.json"], REPO),
        (["consolidated.safetensors", "params.json"], REPO),
        (["mix.Q4_K_M.gguf"], REPO),
        (["mix.Q4_K_M.gguf", "mix.Q8_0.gguf"], f"{REPO}:FILE"),
    ],
)
def test_weights_in_another_form_are_to_be_converted(hub: HubServer, names: list[str], source: str) -> None:
    hub.repos[REPO] = Repo({"config.json": b"{}", **dict.fromkeys(names, b"x")})
    error = refusal(lambda: locate(REPO))
    assert error.code == "no_weights"
    assert f"mixtral-mlx convert {source} DEST" in error.hint
    assert not hub.sent


def test_a_shard_that_only_the_index_has_is_missed_before_the_others_are_fetched(
    hub: HubServer, files: dict[str, bytes]
) -> None:
    renamed = {name.replace("model-00003-of-00003", "model-3"): data for name, data in files.items()}
    hub.repos[REPO] = Repo({**renamed, "model.safetensors": b"x"})
    error = refusal(lambda: locate(REPO))
    assert (error.code, sent(hub)) == ("hub_incomplete", 0)


def test_what_the_hub_refuses_is_said_with_what_to_do(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.repos["org/gated"] = Repo(files, gated=True)
    hub.repos["org/private"] = Repo(files, private=True)
    for name in ("org/missing", "org/private", "org/ti..ny", "org/-tiny"):
        error = refusal(partial(locate, name))
        assert error.code == "no_model"
        assert f"There is no folder {name} here. " in str(error)
    assert refusal(lambda: locate("org/gated")).code == "hub_gated"
    strange = [Fault("status", status=200, body=body) for body in (b"{}", b"[]", b"<html>")]
    for fault in (Fault("status", status=418), *strange):
        hub.fault(f"api/{REPO}", fault)
        assert refusal(lambda: locate(REPO)).code == "hub_failing"


# Interrupted


def test_what_was_interrupted_goes_on_where_it_was(hub: HubServer, files: dict[str, bytes], blobs: Path) -> None:
    done: list[int] = []
    middle = len(files[SHARDS[0]]) + len(files[SHARDS[1]]) // 2
    stop = partial(locate, REPO, on_progress=lambda now, total: done.append(now))
    assert refusal(lambda: stop(cancelled=lambda: bool(done) and done[-1] > middle)).code == "cancelled"
    wait_for_fetchers()
    (part,) = blobs.glob("*.incomplete")
    kept = len(files[SHARDS[0]]) + part.stat().st_size
    assert middle < kept < size(files)
    assert refusal(lambda: locate(REPO, offline=True)).code == "no_model"
    hub.sent.clear()
    hub.requests.clear()
    done.clear()
    Checkpoint.open(stop())
    assert done[0] == kept
    assert {name: hub.sent[name] for name in SHARDS} == {
        SHARDS[0]: 0,
        SHARDS[1]: size(files) - kept - len(files[SHARDS[2]]),
        SHARDS[2]: len(files[SHARDS[2]]),
    }
    (request,) = [one for one in hub.asked("files") if SHARDS[1] in one.path and one.method == "GET"]
    assert request.headers["range"] == f"bytes={part_of(files, kept)}-{len(files[SHARDS[1]]) - 1}"
    assert not list(blobs.glob("*.incomplete"))


def part_of(files: dict[str, bytes], kept: int) -> int:
    return kept - len(files[SHARDS[0]])


def wait_for_fetchers() -> None:
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join()


FETCH = """
import sys
from mixtral_mlx.hub.snapshot import snapshot
print(snapshot(sys.argv[1], lambda folder: None))
"""


def test_a_killed_process_loses_nothing_that_was_on_the_disk(
    hub: HubServer, files: dict[str, bytes], blobs: Path, tmp_path: Path
) -> None:
    environment = {
        **{"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"},
        **{"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "HF_HUB_DISABLE_TELEMETRY": "1"},
    }
    with subprocess.Popen([sys.executable, "-c", FETCH, REPO], env=environment, stderr=subprocess.DEVNULL) as process:

        def kill(path: str, count: int) -> None:
            if sent(hub) > size(files) // 2:
                os.kill(process.pid, 9)

        hub.on_sent = kill
    assert process.returncode == -9
    hub.on_sent = lambda path, count: None
    whole = [files[name] for name in SHARDS if (blobs / hashlib.sha256(files[name]).hexdigest()).exists()]
    here = sum(map(len, whole))
    here += sum(part.stat().st_size for part in blobs.glob("*.incomplete"))
    assert here > 0
    hub.sent.clear()
    folder = locate(REPO)
    assert sent(hub) == size(files) - here
    assert {name: (folder / name).read_bytes() for name in SHARDS} == {name: files[name] for name in SHARDS}


def test_ctrl_c_stops_a_command_that_fetches_and_the_same_command_goes_on(
    hub: HubServer, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", REPO, "--prompt", "Hello", "--max-tokens", "2"]
    presses, over = count(), threading.Event()

    def press(path: str, count: int) -> None:
        if sent(hub) > size(files) // 2:
            if not next(presses):
                os.kill(os.getpid(), signal.SIGINT)
            over.wait()

    hub.on_sent = press
    assert main(command) == 130
    over.set()
    assert "Stopped. Run the same command again to go on" in capsys.readouterr().err
    wait_for_fetchers()
    assert main(command) == 0
    assert " of it here" in capsys.readouterr().err


def test_an_app_sees_how_far_fetching_is_and_can_stop_it(
    hub: HubServer, files: dict[str, bytes], blobs: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    go_on = threading.Event()

    def hold_up(path: str, count: int) -> None:
        if sent(hub) > size(files) // 2:
            go_on.wait()

    hub.on_sent = hold_up
    with started(env=environment) as app:
        app.send(type="load", id="1", model=REPO)
        assert app.until("loading")[-1]["phase"] == "fetching"
        assert wait_until(lambda: has_begun(blobs))
        app.send(type="cancel", id="2", request="1")
        assert app.until("error", id="1")[-1]["code"] == "cancelled"
        go_on.set()
        came = app.ask("3", type="load", model=REPO)
        assert came[-1]["type"] == "ready"
    phases = [one["phase"] for one in came[:-1]]
    assert phases == sorted(phases)
    assert set(phases) == {"fetching", "loading"}
    assert came[0]["total_bytes"] == size(files)
    assert came[0]["done_bytes"] > 0


def has_begun(blobs: Path) -> bool:
    with suppress(FileNotFoundError):  # It became whole in the meantime.
        return any(part.stat().st_size for part in blobs.glob("*.incomplete"))
    return False


def test_a_network_that_drops_and_lies_changes_no_bytes(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.fault(SHARDS[0], CUT, Fault("reset", at=50_000), Fault("status", status=503))
    hub.fault(SHARDS[1], Fault("flip", at=1_000))
    folder = locate(REPO)
    assert {name: (folder / name).read_bytes() for name in SHARDS} == {name: files[name] for name in SHARDS}


def test_a_hub_that_says_nothing_can_be_left_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        asked, over = threading.Event(), threading.Event()
        stopped: list[float] = []

        def listen() -> None:
            with silent.accept()[0]:
                asked.set()
                over.wait()

        thread = threading.Thread(target=listen)
        thread.start()

        def cancelled() -> bool:
            if asked.is_set() and not stopped:
                stopped.append(time.monotonic())
            return asked.is_set()

        assert refusal(lambda: locate(REPO, cancelled=cancelled)).code == "cancelled"
        assert time.monotonic() - stopped[0] < 1
        over.set()
        thread.join()
    wait_for_fetchers()


def test_two_at_once_fetch_once(hub: HubServer, files: dict[str, bytes]) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(locate, [REPO, REPO])
    assert first == second
    assert sent(hub) == size(files)


# Shared with other programs


def test_what_huggingface_hub_fetched_is_used(hub: HubServer, files: dict[str, bytes]) -> None:
    theirs = snapshot_download(REPO)
    before = {path: path.lstat().st_mtime_ns for path in Path(theirs).rglob("*")}
    hub.sent.clear()
    assert locate(REPO) == Path(theirs)
    assert not hub.sent
    assert {path: path.lstat().st_mtime_ns for path in Path(theirs).rglob("*")} == before
    assert locate(REPO, offline=True) == Path(theirs)


def test_what_it_fetched_in_part_is_completed(hub: HubServer, files: dict[str, bytes]) -> None:
    snapshot_download(REPO, allow_patterns=["*.json", SHARDS[1]])
    hub.sent.clear()
    told: list[tuple[int, int]] = []
    Checkpoint.open(locate(REPO, on_progress=lambda *now: told.append(now)))
    assert told[0] == (len(files[SHARDS[1]]), size(files))
    assert sent(hub) == size(files) - len(files[SHARDS[1]])
    assert hub.sent["config.json"] == 0


def test_huggingface_hub_finds_what_we_fetched(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    folder = locate(REPO)
    found = scan_cache_dir(tmp_path / "cache")
    assert not found.warnings
    assert not found.incomplete_files
    (repo,) = found.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (REPO, COMMIT, frozenset({"main"}))
    assert {file.file_name: file.size_on_disk for file in revision.files} == {
        name: len(files[name]) for name in files.keys() - {"README.md", "pytorch_model.bin"}
    }
    for name in ("config.json", *SHARDS):
        assert try_to_load_from_cache(REPO, name) == str(folder / name)
        assert not (folder / name).readlink().is_absolute()
    hub.sent.clear()
    wanted = ["*.json", "model*.safetensors", "tokenizer.model"]
    assert Path(snapshot_download(REPO, allow_patterns=wanted)) == folder
    assert Path(snapshot_download(REPO, allow_patterns=wanted, local_files_only=True)) == folder
    assert not hub.sent


def test_a_new_commit_brings_only_what_is_new(hub: HubServer, files: dict[str, bytes]) -> None:
    old = locate(REPO)
    hub.sent.clear()
    hub.repos[REPO] = Repo({**files, "generation_config.json": b"{}", "README.md": b"new"}, commit="d" * 40)
    new = locate(REPO)
    assert new != old
    assert dict(hub.sent) == {"generation_config.json": 2}
    assert locate(REPO, offline=True) == new
    Checkpoint.open(new)


# Without a network


def test_offline_asks_nothing(hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(lambda: locate(REPO, offline=True))
    assert (error.code, "offline" in str(error)) == ("no_model", True)
    snapshot_download(REPO, allow_patterns=["config.json", SHARDS[0]])
    hub.requests.clear()
    assert refusal(lambda: locate(REPO, offline=True)).code == "hub_incomplete"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(lambda: locate(REPO)).code == "hub_incomplete"
    assert not hub.requests


def test_a_hub_out_of_reach_hinders_nobody_who_has_everything(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = locate(REPO)
    hub.fault(f"api/{REPO}", Fault("status", status=503))
    assert locate(REPO) == folder
    assert not hub.faults[f"api/{REPO}"]
    point_at("http://127.0.0.1:9", monkeypatch)
    assert load(locate(REPO)).weights_bytes > 0
    (folder / SHARDS[2]).unlink()
    error = refusal(lambda: locate(REPO))
    assert error.code == "hub_unreachable"
    assert "Check the network" in error.hint
