"""The command line: what it refuses, how it fails, what it prints, and what it leaves alone."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mixtral_mlx import __version__, cli, generate, memory, weights
from mixtral_mlx.budget import BudgetError
from mixtral_mlx.weights import load, locate

from .checkpoints import TINY, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _no_model_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXTRAL_MLX_MODEL", raising=False)


def with_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def error_code(stderr: str) -> str:
    found = re.match(r"error\[(\w+)\]: \S.*", stderr)
    assert found, stderr
    return found[1]


COMMON = [
    ("--memory lots", "bad_option", "--memory is 'lots', expected a number and a unit, as 12GB"),
    ("--wired all", "bad_option", "--wired is 'all', expected one of off, fit"),
    ("--modle x", "unknown_option", "Did you mean --model?"),
    ("--temp 1", "unknown_option", "Did you mean --temperature?"),
    ("--top 1", "unknown_option", "--top"),
    ("extra", "unexpected_argument", "'extra'"),
    ("--dtype int8", "bad_option", "--dtype is 'int8', expected one of auto, bfloat16"),
    ("--context 1", "bad_option", "--context is '1', expected a whole number of at least 2"),
    ("--kv-bits 3", "bad_option", "--kv-bits is '3', expected one of 4, 8"),
    ("--temperature -1", "bad_option", "--temperature is '-1', expected a number from 0 to 100"),
    ("--temperature nan", "bad_option", "--temperature is 'nan'"),
    ("--temperature=hot", "bad_option", "--temperature is 'hot'"),
    ("--top-p 1.1", "bad_option", "--top-p is '1.1', expected a number from 0 to 1"),
    ("--top-k 1.5", "bad_option", "--top-k is '1.5', expected a whole number"),
    ("--min-p 2", "bad_option", "--min-p is '2'"),
    ("--repetition-penalty -1", "bad_option", "--repetition-penalty is '-1'"),
    ("--presence-penalty 101", "bad_option", "--presence-penalty is '101'"),
    ("--frequency-penalty x", "bad_option", "--frequency-penalty is 'x'"),
    ("--seed -1", "bad_option", "--seed is '-1', expected a whole number from 0 to 18446744073709551615"),
    ("--max-tokens 0", "bad_option", "--max-tokens is '0', expected a whole number from 1"),
    (r"--stop \q", "bad_option", "--stop holds"),
    ("--stop=", "bad_option", "--stop is empty"),
    ("--model", "bad_option", "--model expected one argument"),
]
GENERATE = [
    ("--prompt x", "no_model", "No model was given"),
    ("--model demo --prompt x --prompt-ids 1", "bad_option", "Both --prompt and --prompt-ids"),
    ("--model demo --prompt-ids 1,,2", "bad_option", "--prompt-ids is '1,,2', expected whole numbers"),
    ("--model demo --prompt-ids 1 --chat", "bad_option", "--chat needs text"),
    ("--model demo --prompt x --system y", "bad_option", "--system goes with --chat"),
    ("--model demo --prompt -x", "bad_option", "--option=VALUE"),
    ("--logprobs 5", "unknown_option", "--logprobs"),
]
TOP = [
    ("", "no_command", "mixtral-mlx --help"),
    ("cht", "unknown_command", "Did you mean chat?"),
    ("--model x chat", "no_command", "--model stands before the command"),
]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        *TOP,
        *((f"chat {line}", code, said) for line, code, said in COMMON),
        *((f"generate {line}", code, said) for line, code, said in COMMON + GENERATE),
        ("chat --json", "unknown_option", "--json"),
    ],
)
def test_wrong_usage_is_refused_by_name(capsys: pytest.CaptureFixture[str], line: str, code: str, said: str) -> None:
    assert cli.main(line.split(" ") if line else []) == 2
    out, err = capsys.readouterr()
    assert error_code(err) == code
    assert said in err
    if "--json" not in line:
        assert out == ""


def test_with_json_errors_are_an_object_on_stdout_too(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for line, status, code in [
        ("generate --json --bogus", 2, "unknown_option"),
        ("generate --json --model /nowhere --prompt x", 1, "no_model"),
        (f"generate --json --model {folder} --prompt-ids 99999", 2, "bad_token"),
        (f"generate --json --model {folder} --prompt x --context 9999", 2, "bad_context"),
    ]:
        assert cli.main(line.split()) == status
        out, err = capsys.readouterr()
        error = json.loads(out)["error"]
        assert error.keys() == {"code", "message", "hint"}
        assert error["code"] == error_code(err) == code
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("generate --model demo --prompt x --repetition-penalty 0", "bad_sampling"),
        ("chat --parallel expert", "not_launched"),
        ("chat --split 64,0", "bad_option"),
        ("serve --host 0.0.0.0", "key_required"),
        ("serve --api-key k --host ..", "bad_host"),
        ("serve --allow-origin nonsense", "bad_option"),
        ("plan --hosts 64GB,64GB --link fast", "bad_option"),
        ("convert demo dest --recipe keep --recipe q4", "bad_recipe"),
    ],
)
def test_wrong_usage_is_that_wherever_it_is_found_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MIXTRAL_MLX_API_KEY", raising=False)
    assert cli.main(line.split()) == 2
    assert error_code(capsys.readouterr().err) == code


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "-h",
        "chat --help",
        "generate --help",
        "convert --help",
        "verify --help",
        "perplexity --help",
        "bench --help",
        "plan --help",
        "--version",
    ],
)
def test_help_and_version_go_to_stdout(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.main(line.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"mixtral-mlx {__version__}\n" == out if line == "--version" else "usage: mixtral-mlx" in out


@pytest.mark.parametrize("command", ["generate", "routes", "bench", "perplexity"])
def test_help_says_where_a_model_that_has_to_be_named_may_be_named(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "MIXTRAL_MLX_MODEL names it too (required)" in " ".join(capsys.readouterr().out.split())


def test_generate_streams_text_that_ends_with_a_new_line(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert cli.main(["generate", "--model", str(folder), "--prompt", "Hello", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert len(out) > 5
    assert err == ""


def generate_json(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> dict[str, Any]:
    line = ["generate", "--model", str(folder), "--json", "--max-tokens", "5", *more]
    assert cli.main(line) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_generate_json_has_the_promised_names(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    report = generate_json(capsys, folder, "--prompt", "Hello")
    assert {key: set(value) if isinstance(value, dict) else None for key, value in report.items()} == {
        "text": None,
        "tokens": None,
        "finish_reason": None,
        "usage": {"prompt_tokens", "completion_tokens", "cached_tokens"},
        "timings": {"load_s", "first_token_s", "prompt_tps", "generation_tps"},
        "memory": {
            *("mode", "budget_bytes", "peak_bytes", "slots_per_layer"),
            *("expert_hits", "expert_misses", "bytes_read"),
        },
    }
    assert report["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "cached_tokens": 0}
    assert len(report["tokens"]) == 5
    assert report["finish_reason"] == "length"
    assert report["memory"]["mode"] == "resident"
    assert report["memory"]["slots_per_layer"] == TINY.num_local_experts
    assert report["memory"]["peak_bytes"] > report["memory"]["bytes_read"] > 0
    assert all(value >= 0 for value in report["timings"].values())


def test_within_a_budget_the_demo_is_streamed_to_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "--model", "demo", "--prompt", "Hello", "--max-tokens", "8", "--json", "--memory"]
    with pytest.raises(BudgetError) as refused:
        load(locate(None), memory=1 << 20)
    least = refused.value.need_bytes
    reports = []
    for size in ("64GB", f"{least}B"):
        assert cli.main([*line, size]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    resident, streamed = (report["memory"] for report in reports)
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert (resident["mode"], streamed["mode"]) == ("resident", "streamed")
    assert streamed["slots_per_layer"] < resident["slots_per_layer"] == 8
    assert streamed["budget_bytes"] <= least
    assert streamed["expert_misses"] > 0
    assert streamed["expert_hits"] + streamed["expert_misses"] > 8
    assert streamed["bytes_read"] > 0
    assert streamed.keys() - resident.keys() >= {"ahead_reads", "ahead_used", "hidden_bytes", "io_s", "stall_s"}


def test_a_budget_too_small_even_to_stream_is_refused_with_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", "demo", "--prompt", "x", "--memory", "100MB"]) == 1
    err = capsys.readouterr().err
    assert error_code(err) == "over_budget"
    assert "the budget is 100.0 MB" in err


COMMANDS = ["generate --model demo --prompt x --max-tokens 1 --quiet", "chat --quiet"]


@pytest.mark.parametrize("line", COMMANDS)
def test_memory_that_cannot_be_wired_is_refused_before_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main([*line.split(), "--wired", "fit"]) == 1
    assert error_code(capsys.readouterr().err) == "not_available"


@pytest.mark.parametrize("line", COMMANDS)
def test_memory_is_wired_for_as_long_as_a_model_is_used_and_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    events: list[object] = []

    @contextmanager
    def wire(*asked: object) -> Iterator[int]:
        events.append(asked)
        yield 0
        events.append("unwired")

    sample = generate.Sampler.sample

    def sampled(*how: Any) -> Any:
        events.append("used")
        return sample(*how)

    monkeypatch.setattr(memory, "wire", wire)
    monkeypatch.setattr(generate.Sampler, "sample", sampled)
    for more, expected in (
        ([], ["used"]),
        (["--wired", "off"], ["used"]),
        (["--wired", "fit", "--memory", "1GB"], [("fit", 10**9), "used", "unwired"]),
    ):
        events.clear()
        with_stdin(monkeypatch, b"Hello\n")
        assert cli.main([*line.split(), *more]) == 0
        assert [event for event, _ in itertools.groupby(events)] == expected


def test_prompts_from_text_ids_and_stdin_agree(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = generate_json(capsys, folder, "--prompt", "Hello world")["tokens"]
    assert generate_json(capsys, folder, "--prompt-ids", "1, 22557,1526")["tokens"] == text
    with_stdin(monkeypatch, b"Hello world\n")
    assert generate_json(capsys, folder)["tokens"] == text
    monkeypatch.setenv("MIXTRAL_MLX_MODEL", str(folder))
    assert cli.main(["generate", "--json", "--max-tokens", "5", "--prompt", "Hello world"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == text


def test_chat_and_system_lay_the_prompt_out_as_a_conversation(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    plain = generate_json(capsys, folder, "--prompt", "Hi")["usage"]["prompt_tokens"]
    chat = generate_json(capsys, folder, "--prompt", "Hi", "--chat")["usage"]["prompt_tokens"]
    system = generate_json(capsys, folder, "--prompt", "Hi", "--chat", "--system", "Be brief.")["usage"]
    assert plain < chat < system["prompt_tokens"]


def test_settings_take_effect(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    greedy = generate_json(capsys, folder, "--prompt", "Hello")
    hot = ("--prompt", "Hello", "--temperature", "2", "--seed")
    seeded = [generate_json(capsys, folder, *hot, seed)["text"] for seed in ("7", "7", "8")]
    assert seeded[0] == seeded[1]
    assert len({*seeded, greedy["text"]}) == 3
    stop = greedy["text"][3:6]
    stopped = generate_json(capsys, folder, "--prompt", "Hello", "--stop", "never there", "--stop", stop)
    assert (stopped["text"], stopped["finish_reason"]) == (greedy["text"].split(stop)[0], "stop")
    assert generate_json(capsys, folder, "--prompt", "Hello", "--dtype", "float32")["text"] == greedy["text"]


def test_input_that_is_no_text_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stdin(monkeypatch, b"\xff\xfe")
    assert cli.main(["generate", "--model", str(folder)]) == 2
    assert error_code(capsys.readouterr().err) == "not_text"


def run(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, **how)


PYTHON_M = (sys.executable, "-m", "mixtral_mlx")


def test_help_and_usage_errors_import_neither_mlx_nor_anything_else_slow() -> None:
    program = """
import sys
from mixtral_mlx.cli import main
assert main(["chat", "--help"]) == 0 and main(["generate", "--bogus"]) == 2
assert main(["convert", "--help"]) == 0 and main(["verify", "--help"]) == 0 and main(["perplexity", "--help"]) == 0
assert main(["plan", "--help"]) == 0 and main(["plan", "--memory", "lots"]) == 2
assert main(["bench", "--help"]) == 0 and main(["bench", "--rows", "speed"]) == 2
slow = "mlx mlx_lm rich prompt_toolkit numpy transformers mistral_common huggingface_hub sentencepiece"
print([name for name in slow.split() if name in sys.modules], file=sys.stderr)
"""
    assert run(sys.executable, "-c", program).stderr.splitlines()[-1] == "[]"


def test_importing_the_package_and_running_changes_no_limit_and_no_environment(folder: Path) -> None:
    program = f"""
import os, resource, signal
def state():
    return resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), signal.getsignal(signal.SIGINT)
before = state()
import mixtral_mlx
assert state() == before
from mixtral_mlx.cli import main
main(["generate", "--model", {str(folder)!r}, "--prompt", "x", "--max-tokens", "1", "--json"])
assert state()[0] == before[0] and state()[2] == before[2]
print("unchanged")
"""
    done = run(sys.executable, "-c", program)
    assert done.stdout.endswith("unchanged\n"), done.stderr


def test_a_reader_that_has_enough_is_no_error(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*PYTHON_M, "generate", "--model", str(folder), "--prompt", "x"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


ROOT = Path(__file__).parents[1]
SCRIPT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mixtral-mlx"]


@pytest.mark.parametrize(
    "start",
    [
        "runpy.run_module('mixtral_mlx', run_name='__main__')",
        "runpy.run_module('mixtral_mlx.chat', run_name='__main__')",
        f"runpy.run_path({str(ROOT / 'convert.py')!r}, run_name='__main__')",
        f"sys.exit(pkgutil.resolve_name({SCRIPT!r})())",
    ],
)
def test_ctrl_c_while_the_program_is_still_being_imported_ends_it_quietly(start: str) -> None:
    program = f"""
import pkgutil, runpy, sys
class Pressed:
    def find_spec(self, name, *_):
        if name == "mixtral_mlx.session":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Pressed())
sys.argv = ["mixtral-mlx", "chat"]
{start}
"""
    done = run(sys.executable, "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_ends_a_generation_with_what_is_there(folder: Path) -> None:
    process = subprocess.Popen(
        [*PYTHON_M, "generate", "--model", str(folder), "--prompt", "x", "--max-tokens", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert err == b""
