"""The conversation behind the chat, without a terminal: what each line and command does to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mixtral_mlx import generate
from mixtral_mlx.config import MixtralError
from mixtral_mlx.engine import batch
from mixtral_mlx.engine.engine import Engine
from mixtral_mlx.engine.request import Done
from mixtral_mlx.generate import Sampling
from mixtral_mlx.opening import ModelChoice, open_engine
from mixtral_mlx.session import COMMANDS, SETTINGS, Ready, Session, Turn, parse_setting

from .checkpoints import TINY, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "v1")


@pytest.fixture(scope="module")
def v3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(TINY, vocab_size=32768)
    return write_tiny(tmp_path_factory.mktemp("model") / "v3", config, tokenizer="v3")


def session_with(folder: Path, **choice: Any) -> Session:
    def other(name: str, instead_of: Engine) -> Ready:
        return open_engine(ModelChoice(name, **choice), instead_of=instead_of)

    ready = open_engine(ModelChoice(str(folder), **choice))
    return Session(ready, other, settings={"temperature": 0.0, "max_tokens": 12})


@pytest.fixture
def session(folder: Path) -> Session:
    return session_with(folder)


def ask(session: Session, line: str, stop_after: int | None = None) -> Done:
    """Enter a line and read the reply to its end, or cancel it after some tokens; returns how it ended."""
    assert session.handle(line).answer
    seen: list[str] = []
    for text in session.reply(cancelled=lambda: stop_after is not None and len(seen) >= stop_after):
        seen.append(text)
    assert session.ended
    return session.ended


def refusal(action: Callable[[], object]) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        action()
    return caught.value


def code_of(action: Callable[[], object]) -> str:
    return refusal(action).code


def out_of_memory(*_: object) -> None:
    raise RuntimeError("[malloc] Unable to allocate")


def state(session: Session) -> object:
    return session.system, list(session.turns), session.waiting, dict(session.settings), session.ready


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_a_follow_up_reads_only_what_is_new(version: str, folder: Path, v3_folder: Path) -> None:
    session = session_with(folder if version == "v1" else v3_folder)
    session.handle("Hello there")
    first = session._prompt()
    said = session.ready.engine.complete(first, max_tokens=12).result().tokens
    session.ready.engine.forget()
    assert ask(session, "Hello there").usage.cached_tokens == 0
    held = [*first, *said[:-1]]  # Of the last token nothing has been computed yet.
    session.handle("And now?")
    prompt = session._prompt()
    common = next((n for n, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), len(held))
    usage = ask(session, "And now?").usage
    assert usage.cached_tokens == common >= len(first)
    assert usage.prompt_tokens == len(prompt)


def test_a_stopped_reply_stays_and_the_next_answer_is_that_of_a_fresh_conversation(
    session: Session, folder: Path
) -> None:
    last = ask(session, "Tell me something", stop_after=4)
    assert last.finish_reason == "cancelled"
    assert session.remark() == "[stopped]"
    assert [turn.user for turn in session.turns] == ["Tell me something"]
    fresh = session_with(folder)
    fresh.turns = list(session.turns)
    ask(session, "Go on")
    ask(fresh, "Go on")
    assert session.turns == fresh.turns


def test_a_reply_stopped_before_its_first_word_leaves_the_message_waiting(session: Session) -> None:
    ask(session, "Hello", stop_after=0)
    assert (session.turns, session.waiting) == ([], "Hello")
    assert "/regen" in session.remark()
    ask(session, "/regen")
    assert [turn.user for turn in session.turns] == ["Hello"]


@pytest.mark.parametrize("line", ["/regen", "/edit something else"])
def test_a_reply_stays_until_there_is_another(session: Session, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    ask(session, "one")
    ask(session, "two")
    before = list(session.turns)
    ask(session, line, stop_after=0)
    assert (session.turns, session.waiting) == (before, "")
    assert session.remark() == "[no reply; the earlier one stays]"
    with monkeypatch.context() as patched:
        patched.setattr(batch, "run", out_of_memory)
        assert code_of(lambda: ask(session, line)) == "out_of_memory"
    assert (session.turns, session.waiting) == (before, "")
    session.handle("/set max_tokens 3")
    ask(session, line)
    assert session.turns != before
    assert len(session.turns) == 2
    assert session.remark().startswith("[cut off")


def test_an_edit_too_long_for_the_context_leaves_the_turn_as_it_was(folder: Path) -> None:
    session = session_with(folder, context=64)
    ask(session, "Hi")
    before = list(session.turns)
    assert code_of(lambda: ask(session, f"/edit {'word ' * 90}")) == "context_full"
    assert (session.turns, session.waiting) == (before, "")


def test_a_loaded_conversation_has_no_statistics_yet(session: Session, tmp_path: Path) -> None:
    session.handle(f"/save {tmp_path / 'talk.json'}")
    ask(session, "Hi")
    session.handle(f"/load {tmp_path / 'talk.json'}")
    assert session.handle("/stats").text == "No reply yet."


def test_regen_edit_undo_drop_and_clear(session: Session) -> None:
    ask(session, "one")
    ask(session, "two")
    before = list(session.turns)
    ask(session, "/regen")
    assert session.turns == before
    assert session.handle("/edit").edit == "two"
    ask(session, "/edit three\nlines")
    assert [turn.user for turn in session.turns] == ["one", "three\nlines"]
    session.handle("/drop 1")
    assert [turn.user for turn in session.turns] == ["three\nlines"]
    session.handle("/undo")
    assert session.turns == []
    for line in ("/undo", "/regen", "/edit"):
        assert code_of(partial(session.handle, line)) == "no_turns"
    ask(session, "four")
    session.handle("/clear")
    assert session.turns == []
    assert session.ready.engine.memory().prefix_bytes == 0


@pytest.mark.parametrize(("line", "message"), [("plain", "plain"), ("//etc/hosts?", "/etc/hosts?"), ("// x", "/ x")])
def test_a_message_may_begin_with_a_slash(session: Session, line: str, message: str) -> None:
    session.handle(line)
    assert session.waiting == message


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("/hlep", "unknown_command"),
        ("/", "unknown_command"),
        ("/usr/bin/python fails", "unknown_command"),
        ("/set temperture 1", "unknown_setting"),
        ("/set temperature hot", "bad_value"),
        ("/set temperature 101", "bad_value"),
        ("/set top_p nan", "bad_value"),
        ("/set top_k 1.5", "bad_value"),
        ("/set repetition_penalty 0", "bad_sampling"),
        (r"/set stop \q", "bad_value"),
        ("/undo 3", "unexpected_argument"),
        ("/clear everything", "unexpected_argument"),
        ("/regen shorter", "unexpected_argument"),
        ("/help set", "unexpected_argument"),
        ("/exit now", "unexpected_argument"),
        ("/drop", "bad_number"),
        ("/drop 2", "bad_number"),
        ("/stats maybe", "bad_value"),
        ("/save", "no_file"),
        ("/save /nowhere/talk.json", "write_failed"),
        ("/load", "no_file"),
        ("/load /nowhere/talk.json", "unreadable"),
        ("/model /nowhere", "no_model"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(session: Session, line: str, code: str) -> None:
    ask(session, "Hello")
    before = state(session)
    assert code_of(lambda: session.handle(line)) == code
    assert state(session) == before


def test_an_unknown_command_is_refused_with_a_suggestion(session: Session) -> None:
    with pytest.raises(MixtralError) as caught:
        session.handle("/regn")
    assert "Did you mean /regen?" in caught.value.hint


def test_help_names_every_command(session: Session) -> None:
    text = session.handle("/help").text
    for name in COMMANDS:
        assert f"/{name} " in text
    assert session.handle("/exit").leave


def test_settings_are_shown_changed_and_taken_back(session: Session) -> None:
    assert session.handle("/set top-p 0.5").text == "top_p = 0.5"
    assert session.handle(r"/set stop \n###").text == r"stop = '\n###'"
    assert session.sampling().stop == ("\n###",)
    assert session.sampling().top_p == 0.5
    assert session.handle("/set top_p default").text == "top_p = 0.95"
    assert "temperature" in session.handle("/set").text
    seed = (1 << 64) - 1
    assert session.handle(f"/set seed {seed}").text == f"seed = {seed}"


def test_the_ranges_are_those_of_sampling() -> None:
    ranges = {name: (kind, low, high) for name, kind, low, high in generate._RANGES if name in SETTINGS}
    assert ranges == {name: (s.kind, s.low, s.high) for name, s in SETTINGS.items() if s.kind is not str}
    assert set(SETTINGS) < set(vars(Sampling()))


@pytest.mark.parametrize(
    ("written", "meant"), [(r"\n", "\n"), (r"a\\n\t\x21", "a\\n\t!"), (r"\u00e9", "é"), ("###", "###"), (r"\r", "\r")]
)
def test_stop_strings_understand_escapes(written: str, meant: str) -> None:
    assert parse_setting("stop", written) == meant


def test_a_system_prompt_changes_the_prompt_and_can_be_removed(session: Session) -> None:
    session.handle("hi")
    plain = session._prompt()
    session.handle("/system Be brief.\nAlways.")
    assert session.system == "Be brief.\nAlways."
    assert session._prompt() != plain
    session.handle("/system off")
    assert session._prompt() == plain


def test_a_saved_conversation_goes_on_as_if_never_left(session: Session, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a talk.json"
    session.handle("/system Be brief.")
    session.handle("/set seed 5")
    ask(session, "Hello ☃\nthere")
    session.handle(f"/save {file}")
    session.handle(f"/save {file}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a talk.json"]
    other = session_with(folder)
    other.handle(f"/load {file}")
    assert state(other)[:4] == state(session)[:4]  # type: ignore[index]
    ask(session, "more")
    ask(other, "more")
    assert other.turns == session.turns


def test_a_saved_conversation_is_its_writers_alone_and_costs_no_other_file(session: Session, tmp_path: Path) -> None:
    (tmp_path / "talk.json.partial").write_text("precious")
    session.handle(f"/save {tmp_path / 'talk.json'}")
    assert (tmp_path / "talk.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "talk.json.partial").read_text() == "precious"


def test_saving_never_replaces_a_file_that_is_no_saved_chat(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "precious.json"
    for content in ('{"a": 1}', "my notes", json.dumps({**GOOD, "mixtral_mlx_chat": 2})):
        file.write_text(content)
        refused = refusal(lambda: session.handle(f"/save {file}"))
        assert (refused.code, refused.hint) == ("exists", "Choose another name.")
        assert file.read_text() == content


def test_what_the_system_says_of_a_file_is_passed_on_without_names_that_are_ours(
    session: Session, tmp_path: Path
) -> None:
    for path in (tmp_path / "no" / "talk.json", tmp_path / ("long" * 100)):
        refused = refusal(lambda path=path: session.handle(f"/save {path}"))  # type: ignore[misc]
        assert re.fullmatch(rf"{path} cannot be (written|read): [A-Z][a-z ]+\.", str(refused))


def test_a_file_that_was_never_fetched_is_not_to_be_fetched_again(session: Session, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not JSON")
    refused = refusal(lambda: session.handle(f"/load {tmp_path / 'notes.txt'}"))
    assert (refused.code, refused.hint) == ("bad_json", "Choose a file /save has written.")


GOOD: dict[str, Any] = {
    "mixtral_mlx_chat": 1,
    "model": "m",
    "system": "s",
    "settings": {"top_p": 0.5, "stop": ["x"]},
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"mixtral_mlx_chat": 2},
        {"mixtral_mlx_chat": None},
        {"system": 1},
        {"system": "\ud800"},
        {"settings": []},
        {"settings": {"top_p": 2}},
        {"settings": {"top_p": True}},
        {"settings": {"top_p": "0.5"}},
        {"settings": {"max_tokens": 1.5}},
        {"settings": {"unknown": 1}},
        {"settings": {"repetition_penalty": 0}},
        {"settings": {"stop": "x"}},
        {"settings": {"stop": [""]}},
        {"messages": {}},
        {"messages": [1]},
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": ["a"]}]},
        {"messages": [{"role": "user", "content": " "}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": None},
    ],
)
def test_a_bad_file_changes_nothing(session: Session, tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "talk.json"
    session.turns = [Turn("x", "y")]
    before = state(session)
    file.write_text(json.dumps({**GOOD, **change}))
    assert code_of(lambda: session.handle(f"/load {file}")) in ("bad_chat", "bad_value", "bad_sampling")
    assert state(session) == before


def test_a_saved_conversation_may_end_with_a_message_that_waits(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({**GOOD, "messages": [*GOOD["messages"], {"role": "user", "content": "c"}]}))
    assert "/regen" in session.handle(f"/load {file}").text
    assert (session.turns, session.waiting) == ([Turn("a", "b")], "c")
    session.handle(f"/save {file}")
    assert json.loads(file.read_text())["messages"][-1] == {"role": "user", "content": "c"}


def test_a_full_context_is_said_with_numbers_and_the_offered_drop_makes_room(folder: Path) -> None:
    session = session_with(folder, context=96)
    question = "What is the weather like in Rome today?"
    with pytest.raises(MixtralError) as caught:
        _ = [ask(session, question) for _ in range(10)]
    assert caught.value.code == "context_full"
    assert re.search(r"1?\d\d tokens long, the context holds 96", str(caught.value))
    offer = re.search(r"/drop \d+", caught.value.hint)
    assert offer
    session.handle(offer[0])
    ask(session, "/regen")
    assert session.turns[-1].user == question


def test_a_message_longer_than_the_context_is_refused_by_its_length(folder: Path) -> None:
    session = session_with(folder, context=32)
    session.handle("word " * 50)
    with pytest.raises(MixtralError, match="context holds 32") as caught:
        session.reply()
    assert "The message alone is" in caught.value.hint


def test_a_reply_that_fills_the_context_says_so(folder: Path) -> None:
    session = session_with(folder, context=24)
    session.handle("/set max_tokens default")
    ask(session, "Hi")
    assert session.remark().startswith("[the context is full, 24 of 24 tokens")


def test_a_reply_cut_by_max_tokens_says_so(session: Session) -> None:
    ask(session, "Hi")
    assert session.remark() == "[cut off after 12 tokens, see /set max_tokens]"


def test_the_statistics_name_speed_first_token_cache_and_memory(session: Session) -> None:
    assert session.handle("/stats").text == "No reply yet."
    ask(session, "Hi")
    pattern = r"\[12 tokens, [\d.]+ tok/s · first token [\d.]+ s · prompt \d+ \(\d+ cached\) · memory peak [\d.]+ .B\]"
    assert re.fullmatch(pattern, session.handle("/stats").text)


def test_another_model_takes_the_conversation_over(session: Session, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", seed=1)
    ask(session, "Hello")
    assert session.handle(f"/model {other}").text.startswith("other · float32 · resident, ")
    ask(session, "And you?")
    assert len(session.turns) == 2


def test_another_model_has_the_whole_budget(folder: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", seed=1)
    least = open_engine(ModelChoice(str(folder))).loaded.plan.needed_bytes
    session = session_with(folder, memory_bytes=least)
    before, engine = session.ready.loaded.plan, session.ready.engine
    for model in (other, folder):
        session.handle(f"/model {model}")
        assert session.ready.loaded.plan == before
        assert engine.health().state == "closed"


def test_a_model_that_cannot_be_loaded_leaves_the_old_one_answering(
    session: Session, folder: Path, tmp_path: Path
) -> None:
    ask(session, "Hello")
    before = state(session)
    (tmp_path / "config.json").write_text("{}")
    assert code_of(lambda: session.handle(f"/model {tmp_path}")) == "not_mixtral"
    assert session.ready.engine.stats()["requests"]["loads"] == 1  # Nothing was let go of for it.
    session.open_model = lambda name, engine: open_engine(ModelChoice(name, memory_bytes=1), instead_of=engine)
    with pytest.raises(MixtralError) as caught:
        session.handle(f"/model {folder}")
    assert caught.value.code == "over_budget"
    assert "has been loaded again" in caught.value.hint
    assert session.ready.engine.health().state == "ready"
    assert state(session) == before
    assert session.handle("/model").text.startswith("v1 · ")
    ask(session, "And now?")
    assert len(session.turns) == 2


def test_a_failure_of_mlx_is_an_error_and_the_conversation_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(batch, "run", out_of_memory)
        assert code_of(lambda: ask(session, "Hello")) == "out_of_memory"
    assert session.waiting == "Hello"
    ask(session, "/regen")
    assert len(session.turns) == 1
