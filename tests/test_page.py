"""The page as people use it, in Chromium: `make test-page`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mixtral_mlx import page as the_page

from .chromium import expect
from .hostile_replies import HOSTILE
from .page_server import Comment, Failure, Hold, PageServer, Play, page_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

SCREENSHOTS = os.environ.get("SCREENSHOTS")
LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (320, 1440)]


@pytest.fixture
def server() -> Iterator[PageServer]:
    with page_server() as server:
        yield server


@dataclass
class Visit:
    """A page that is looked at, and what it must never do."""

    page: Page
    server: PageServer
    complaints: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Write down errors, dialogs, windows, and requests to anybody else."""
        page = self.page
        page.on("console", lambda said: self._complain("console", said.text if said.type == "error" else ""))
        page.on("pageerror", lambda error: self._complain("error", str(error)))
        page.on("dialog", lambda dialog: self._complain("dialog", f"{dialog.type} {dialog.message}"))
        page.on("popup", lambda popup: self._complain("window", popup.url))
        page.on("request", lambda request: self._check(request.url))

    def _check(self, url: str) -> None:
        if not url.startswith((self.server.address, f"blob:{self.server.address}")):
            self._complain("request", url)

    def _complain(self, kind: str, text: str) -> None:
        # A refused request is logged by the browser itself, whatever the page makes of it.
        if text and "Failed to load resource" not in text:
            self.complaints.append(f"{kind}: {text}")

    def ask(self, text: str) -> None:
        """Send a message, as soon as no reply is being written."""
        expect(self.button("Stop")).to_be_hidden()
        self.message.fill(text)
        self.message.press("Enter")

    @property
    def message(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def replies(self) -> Locator:
        return self.page.locator(".message.assistant")

    @property
    def texts(self) -> list[str]:
        """What the messages say, in order."""
        return self.page.locator(".message .body").all_inner_texts()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def shoot(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


@pytest.fixture
def visit(browser: Browser, server: PageServer) -> Iterator[Callable[..., Visit]]:
    """Opens the page, in a profile of its own or beside another; at the end it must have done nothing it must not."""
    visits: list[Visit] = []
    contexts: list[BrowserContext] = []

    def open_page(beside: Visit | None = None, **options: Any) -> Visit:
        context = beside.page.context if beside else browser.new_context(**{"accept_downloads": True} | options)
        contexts.append(context)
        one = Visit(context.new_page(), server)
        one.watch()
        one.page.goto(server.address)
        visits.append(one)
        return one

    yield open_page
    complaints = [complaint for one in visits for complaint in one.complaints]
    for context in contexts:
        context.close()
    assert complaints == []


# What can be said of the files without a browser.


FILES = [path for path in the_page.FOLDER.iterdir() if path.suffix in the_page.MEDIA_TYPES]


def test_what_the_page_asks_for_is_there() -> None:
    asked = {"index.html"}
    for path in FILES:
        asked |= set(re.findall(r'(?:src=|href=|from )"(?:\./)?([\w.]+)"', path.read_text()))
    assert asked == {path.name for path in FILES}


def test_the_page_asks_nobody_else_for_anything_and_parses_no_markup() -> None:
    for path in FILES:
        text = path.read_text()
        sources = re.findall(r"""(?:src|href|url|import|from)\s*[=(]?\s*["'(]([^"')]+)""", text)
        assert [source for source in sources if "//" in source and "www.w3.org" not in source] == [], path.name
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function"
        assert re.findall(forbidden, text) == [], path.name
    markup = (the_page.FOLDER / "index.html").read_text()
    assert re.findall(r"\sstyle=|\son\w+=|<script>|<style", markup) == []


def test_the_policy_allows_only_what_comes_from_the_server() -> None:
    rules = dict(rule.split(" ", 1) for rule in the_page.CONTENT_SECURITY_POLICY.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["img-src"] == "'self' data:"


# A conversation.


@pytest.mark.browser
def test_a_reply_is_shown_while_it_comes_and_a_reload_keeps_it(server: PageServer, visit: Callable[..., Visit]) -> None:
    hold = Hold()
    server.plays.append(
        Play(["Paris is ", hold, "the capital."], timings={"generation_tps": 38.25, "first_token_s": 0.5})
    )
    chat = visit()
    chat.ask("What is the capital of France?")
    expect(chat.replies.locator(".body")).to_have_text("Paris is")
    expect(chat.button("Stop")).to_be_visible()
    hold.released.set()
    expect(chat.replies.locator(".numbers")).to_have_text("38.3 tokens/sfirst after 0.50 s2 tokens")
    said = ["What is the capital of France?", "Paris is the capital."]
    assert chat.texts == said
    chat.page.reload()
    expect(chat.replies.locator(".numbers")).to_be_visible()
    assert chat.texts == said
    expect(chat.page).to_have_title("What is the capital of France? · Mixtral")
    chat.ask("And of Italy?")
    expect(chat.replies.nth(1).locator(".body")).to_have_text("Reply 2.")
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": said[0]},
        {"role": "assistant", "content": said[1]},
        {"role": "user", "content": "And of Italy?"},
    ]


@pytest.mark.browser
@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_keeps_what_had_come_and_leaves_the_server(
    way: str, server: PageServer, visit: Callable[..., Visit]
) -> None:
    hold = Hold()
    server.plays.append(Play(["Once upon", hold, " a time"]))
    chat = visit()
    chat.ask("Tell me a story.")
    expect(chat.replies.locator(".body")).to_have_text("Once upon")
    if way == "button":
        chat.button("Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    expect(chat.replies.locator(".note")).to_have_text("Stopped.")
    assert hold.client_left.wait(10)
    expect(chat.message).to_be_focused()
    chat.page.reload()
    assert chat.texts == ["Tell me a story.", "Once upon"]


@pytest.mark.browser
def test_answering_again_replaces_the_reply_and_can_be_undone(server: PageServer, visit: Callable[..., Visit]) -> None:
    chat = visit()
    chat.ask("One")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    chat.button("Answer again").click()
    expect(chat.replies.locator(".body")).to_have_text("Reply 2.")
    assert server.bodies[0]["messages"] == server.bodies[1]["messages"] == [{"role": "user", "content": "One"}]
    chat.button("Undo").click()
    expect(chat.replies.locator(".body")).to_have_text("Reply 1.")
    chat.page.reload()
    assert chat.texts == ["One", "Reply 1."]


@pytest.mark.browser
def test_an_edited_message_is_answered_anew_from_there(server: PageServer, visit: Callable[..., Visit]) -> None:
    chat = visit()
    for number, text in enumerate(["One", "Two"]):
        chat.ask(text)
        expect(chat.replies.nth(number).locator(".numbers")).to_be_visible()
    chat.button("Edit and continue from here").first.click()
    field = chat.page.get_by_label("Edit your message")
    expect(field).to_have_value("One")
    field.fill("Three")
    field.press("Enter")
    expect(chat.replies.locator(".body")).to_have_text("Reply 3.")
    assert chat.texts == ["Three", "Reply 3."]
    assert server.bodies[2]["messages"] == [{"role": "user", "content": "Three"}]
    chat.button("Undo").click()
    assert chat.texts == ["One", "Reply 1.", "Two", "Reply 2."]


@pytest.mark.browser
def test_a_reply_goes_on_while_another_conversation_is_read(server: PageServer, visit: Callable[..., Visit]) -> None:
    chat, hold = visit(), Hold()
    chat.ask("One")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    server.plays.append(Play(["begun ", hold, "and ended"]))
    chat.button("Answer again").click()
    expect(chat.replies.locator(".body")).to_have_text("begun")
    chat.button("New conversation").last.click()
    expect(chat.replies).to_have_count(0)
    hold.released.set()
    expect(chat.button("Stop")).to_be_hidden()
    chat.page.locator("#conversations").get_by_role("button", name="One", exact=True).click()
    expect(chat.replies.locator(".body")).to_have_text("begun and ended")


# Settings.


@pytest.mark.browser
def test_settings_and_the_system_prompt_are_sent_as_they_are_set(
    server: PageServer, visit: Callable[..., Visit]
) -> None:
    chat = visit()
    chat.ask("Plain")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    chat.button("Settings").click()
    values = {"Temperature": "0.7", "Top p": "0.9", "Top k": "40", "Min p": "0.05", "Seed": "7", "Max tokens": "99"}
    for label, value in values.items():
        chat.page.get_by_label(label, exact=True).fill(value)
    chat.page.get_by_label("Stop at").fill("END\n\\n\\n")
    chat.page.get_by_label("System prompt").fill("Be brief.")
    chat.ask("Set")
    expect(chat.replies.nth(1).locator(".numbers")).to_be_visible()
    always = {"model": "mixtral-8x7b-instruct-q4", "stream": True, "stream_options": {"include_usage": True}}
    asked = [{name: value for name, value in body.items() if name != "messages"} for body in server.bodies]
    assert asked == [
        always,
        always
        | {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "max_tokens": 99}
        | {"stop": ["END", "\n\n"]},
    ]
    assert server.bodies[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    chat.page.reload()
    chat.button("Settings").click()
    expect(chat.page.get_by_label("Top k")).to_have_value("40")
    expect(chat.page.get_by_label("Stop at")).to_have_value("END\n\\n\\n")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("label", "value", "said"),
    [
        ("Temperature", "9", "expected a number from 0 to 2"),
        ("Top k", "1.5", "expected a whole number from 0 to 1048576"),
        ("Max tokens", "0", "expected a whole number from 1 to 2147483648"),
        ("Stop at", "a\nb\nc\nd\ne", "at most 4 stop texts, one a line"),
    ],
)
def test_an_impossible_setting_is_refused_in_words_and_not_sent(
    label: str, value: str, said: str, server: PageServer, visit: Callable[..., Visit]
) -> None:
    chat = visit()
    chat.button("Settings").click()
    field = chat.page.get_by_label(label, exact=True)
    field.fill(value)
    expect(field).to_have_accessible_description(said)
    expect(field).to_have_attribute("aria-invalid", "true")
    chat.ask("One")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    assert set(server.bodies[0]) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.browser
def test_the_chosen_appearance_holds_after_a_reload(visit: Callable[..., Visit]) -> None:
    chat = visit(color_scheme="light")
    assert colour(chat) == "rgb(255, 255, 255)"
    chat.button("Settings").click()
    chat.page.get_by_text("Dark", exact=True).click()
    assert colour(chat) == "rgb(28, 27, 26)"
    chat.page.reload()
    assert colour(chat) == "rgb(28, 27, 26)"


def colour(chat: Visit) -> str:
    return str(chat.page.locator("#main").evaluate("main => getComputedStyle(main).backgroundColor"))


# What the page tells of the server.


@pytest.mark.browser
def test_reading_a_long_prompt_is_shown_in_tokens(server: PageServer, visit: Callable[..., Visit]) -> None:
    hold = Hold()
    server.plays.append(Play([Comment("prompt 512/4000 (cached 128)"), hold, "Read."]))
    chat = visit()
    chat.ask("Long")
    bar = chat.page.get_by_role("progressbar", name="Reading the prompt")
    expect(bar).to_have_attribute("value", "512")
    expect(chat.replies).to_contain_text("Reading 512 of 4,000 tokens, 128 of them known")
    hold.released.set()
    expect(chat.replies.locator(".body")).to_have_text("Read.")
    expect(bar).to_have_count(0)


@pytest.mark.browser
def test_memory_and_requests_are_shown_as_the_server_tells_them(visit: Callable[..., Visit]) -> None:
    chat = visit()
    expect(chat.page.locator("#memory")).to_have_text("Memory 26.3 GB of 28.0 GB")
    chat.button("Settings").click()
    expect(chat.page.locator("#server")).to_contain_text("Weights24.6 GB")
    expect(chat.page.locator("#server")).to_contain_text("Experts found in memory93 %")


@pytest.mark.browser
def test_the_experts_that_answer_are_shown_while_they_do(server: PageServer, visit: Callable[..., Visit]) -> None:
    server.routing = {"layers": 2, "experts": 4, "tokens": 10, "counts": [[5, 5, 5, 5]] * 2, "last": [[0, 1], [2, 3]]}
    chat, hold = visit(), Hold()
    chat.button("Experts").click()
    rows = chat.page.locator("#experts-table tbody tr")
    expect(rows.first).to_have_text("1––––")
    server.plays.append(Play(["Now", hold]))
    chat.ask("Which?")
    expect(chat.replies.locator(".body")).to_have_text("Now")
    server.routing = server.routing | {"tokens": 14, "counts": [[9, 8, 5, 6], [5, 5, 9, 9]]}
    expect(rows.first).to_have_text("150 %38 %0 %13 %")
    expect(rows.nth(1)).to_have_text("20 %0 %50 %50 %")
    assert rows.nth(1).locator("td").evaluate_all("cells => cells.map(cell => cell.classList.contains('chosen'))") == [
        False, False, True, True,
    ]  # fmt: skip
    chat.page.get_by_text("All watched").click()
    expect(rows.nth(1)).to_have_text("218 %18 %32 %32 %")
    hold.released.set()
    expect(rows.locator(".chosen")).to_have_count(0)
    expect(chat.page.locator("#experts-summary")).to_contain_text("14 tokens. Busiest: expert 1 of layer 1, 32 %.")


@pytest.mark.browser
def test_without_routing_there_is_no_view_of_the_experts(visit: Callable[..., Visit]) -> None:
    chat = visit()
    expect(chat.page.locator("#memory")).not_to_be_empty()
    expect(chat.button("Experts")).to_be_hidden()


@pytest.mark.browser
def test_a_model_that_still_loads_is_said_to(server: PageServer, visit: Callable[..., Visit]) -> None:
    server.loading.extend([40, 80])
    name = visit().page.locator("#model-name")
    expect(name).to_have_text("The model is being loaded: 40 %.")
    expect(name).to_have_text("The model is being loaded: 80 %.")
    expect(name).to_have_text("mixtral-8x7b-instruct-q4")


# What goes wrong, in words.


FAILURES = {
    "busy": (
        Play(status=429, error={"message": "16 requests wait already."}, headers={"Retry-After": "2"}),
        "16 requests wait already. Try again in 2 seconds.",
    ),
    "refused": (
        Play(status=400, error={"message": "top_k is -1, expected 0 or more.", "code": "invalid_value"}),
        "top_k is -1, expected 0 or more.",
    ),
    "too long": (
        Play(status=413, error={"message": "The prompt has 40,000 tokens, 32,768 fit."}),
        "The prompt has 40,000 tokens, 32,768 fit.",
    ),
    "no words": (Play(status=503), "The server answered with status 503. It is starting, stopping or full."),
    "inside the stream": (
        Play(["Begun", Failure({"message": "Memory ran short.", "code": "out_of_memory", "hint": "Free some."})]),
        "Memory ran short. Free some.",
    ),
    "cut off": (Play(["Begun"], finish=None), "The connection ended before the reply was complete."),
}


@pytest.mark.browser
@pytest.mark.parametrize("kind", FAILURES)
def test_what_went_wrong_is_said_with_what_to_do_and_can_be_tried_again(
    kind: str, server: PageServer, visit: Callable[..., Visit]
) -> None:
    play, said = FAILURES[kind]
    server.plays.append(play)
    chat = visit()
    chat.ask("One")
    expect(chat.replies.locator(".problem")).to_contain_text(said)
    if play.steps:
        expect(chat.replies.locator(".body")).to_have_text("Begun")
    chat.page.reload()
    expect(chat.replies.locator(".problem")).to_contain_text(said)
    chat.button("Try again").click()
    expect(chat.replies.locator(".body")).to_have_text("Reply 2.")
    assert chat.texts == ["One", "Reply 2."]
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "One"}]


@pytest.mark.browser
def test_a_server_that_is_gone_is_said_to_be(server: PageServer, visit: Callable[..., Visit]) -> None:
    chat = visit()
    expect(chat.page.locator("#memory")).not_to_be_empty()
    chat.page.context.set_offline(True)
    chat.ask("One")
    expect(chat.replies.locator(".problem")).to_contain_text("The server cannot be reached.")
    chat.page.context.set_offline(False)
    chat.button("Try again").click()
    expect(chat.replies.locator(".body")).to_have_text("Reply 1.")


@pytest.mark.browser
def test_a_key_is_asked_for_until_it_fits_and_kept_for_the_session(
    server: PageServer, visit: Callable[..., Visit]
) -> None:
    server.key = "right"
    chat = visit()
    field = chat.page.get_by_label("API key", exact=True)
    for wrong in ("wrong", "schlüssel"):
        field.fill(wrong)
        field.press("Enter")
        expect(chat.page.locator("#key-text")).to_contain_text("not accepted")
    field.fill("right")
    field.press("Enter")
    expect(chat.page.locator("#model-name")).to_have_text("mixtral-8x7b-instruct-q4")
    chat.page.reload()
    chat.ask("One")
    expect(chat.replies.locator(".body")).to_have_text("Reply 1.")
    assert "right" not in chat.page.evaluate("JSON.stringify(localStorage)")
    server.key = "changed"
    chat.ask("Two")
    field.fill("changed")
    field.press("Enter")
    expect(chat.replies.nth(1).locator(".body")).to_have_text("Reply 3.")


# What is kept.


@pytest.mark.browser
def test_several_conversations_are_kept_deleted_and_brought_back(visit: Callable[..., Visit]) -> None:
    chat = visit()
    names = chat.page.locator("#conversations .open")
    for number, text in enumerate(["First", "Second"]):
        chat.button("New conversation").last.click()
        chat.ask(text)
        expect(chat.replies.locator(".body")).to_have_text(f"Reply {number + 1}.")
    expect(names).to_have_text(["Second", "First"])
    chat.button("Delete Second").click()
    expect(names).to_have_text(["First"])
    assert chat.texts == ["First", "Reply 1."]
    chat.button("Undo").click()
    expect(names).to_have_text(["Second", "First"])
    chat.button("Delete First").click()
    chat.page.reload()
    expect(names).to_have_text(["Second"])
    assert chat.texts == ["Second", "Reply 2."]


@pytest.mark.browser
def test_what_is_exported_is_what_was_said_and_comes_in_again(visit: Callable[..., Visit], tmp_path: Path) -> None:
    chat = visit()
    chat.ask("What is\n*this*?")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    markdown, exported = (saved(chat, name, tmp_path / name) for name in ("Export as Markdown", "Export as JSON"))
    assert re.fullmatch(
        r"# What is\n\n\d{4}-\d\d-\d\d\n\n## You\n\nWhat is\n\*this\*\?\n\n## Mixtral\n\nReply 1\.\n",
        markdown.read_text(),
    )
    assert [message["content"] for message in json.loads(exported.read_text())["conversations"][0]["messages"]] == [
        "What is\n*this*?",
        "Reply 1.",
    ]
    other = visit()
    other.page.locator("#file").set_input_files(exported)
    expect(other.replies.locator(".body")).to_have_text("Reply 1.")
    other.page.locator("#file").set_input_files(exported)
    expect(other.page.locator("#conversations .open")).to_have_text(["What is", "What is"])
    other.page.reload()
    assert other.texts == chat.texts == ["What is\n*this*?", "Reply 1."]


def saved(chat: Visit, name: str, path: Path) -> Path:
    chat.button("This conversation").click()
    with chat.page.expect_download() as download:
        chat.button(name).click()
    download.value.save_as(path)
    return path


@pytest.mark.browser
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "The file is not JSON."),
        ("[]", "The file says no “format”"),
        ('{"format": "mixtral-mlx conversations", "version": 2, "conversations": []}', "The file is of version 2"),
        (
            '{"format": "mixtral-mlx conversations", "version": 1, "conversations": [{"messages": [{"role": "x"}]}]}',
            'Conversation 1 of the file has a message 1 whose role is "x", expected "user" or "assistant".',
        ),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_in_words(
    text: str, said: str, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    chat = visit()
    chat.page.locator("#file").set_input_files(file)
    expect(chat.page.get_by_role("alert")).to_contain_text(said)
    expect(chat.page.locator("#conversations li")).to_have_count(0)


@pytest.mark.browser
def test_full_storage_is_said_and_the_conversation_goes_on(visit: Callable[..., Visit], tmp_path: Path) -> None:
    chat = visit()
    chat.page.evaluate(
        """() => { for (let size = 1 << 22; size; size >>= 1)
                     try { localStorage.setItem("x" + size, "x".repeat(size)) } catch {} }"""
    )
    chat.ask("One")
    expect(chat.replies.locator(".body")).to_have_text("Reply 1.")
    expect(chat.page.get_by_role("alert")).to_contain_text("storage for the page is full")
    with chat.page.expect_download() as download:
        chat.page.get_by_role("alert").get_by_role("button", name="Export all").click()
    download.value.save_as(tmp_path / "all.json")
    assert "Reply 1." in (tmp_path / "all.json").read_text()
    chat.page.evaluate(
        "() => Object.keys(localStorage).filter(k => k[0] === 'x').forEach(k => localStorage.removeItem(k))"
    )
    chat.ask("Two")
    expect(chat.replies.nth(1).locator(".body")).to_have_text("Reply 2.")
    expect(chat.page.locator("#notice")).to_be_hidden()
    chat.page.reload()
    assert chat.texts == ["One", "Reply 1.", "Two", "Reply 2."]


@pytest.mark.browser
def test_what_one_tab_keeps_another_shows(visit: Callable[..., Visit]) -> None:
    one = visit()
    other = visit(beside=one)
    one.ask("One")
    expect(other.page.locator("#conversations .open")).to_have_text(["One"])
    expect(one.replies.locator(".numbers")).to_be_visible()
    other.page.locator("#conversations .open").click()
    expect(other.replies.locator(".body")).to_have_text("Reply 1.")


@pytest.mark.browser
def test_what_another_tab_keeps_while_a_reply_runs_here_is_shown_at_once_and_not_lost(
    server: PageServer, visit: Callable[..., Visit]
) -> None:
    one, hold = visit(), Hold()
    one.ask("Old")
    expect(one.replies.locator(".numbers")).to_be_visible()
    other = visit(beside=one)
    server.plays.append(Play(["begun", hold]))
    one.button("New conversation").last.click()
    one.ask("Slow")
    expect(one.replies.locator(".body")).to_have_text("begun")
    other.ask("Said beside it")
    expect(other.replies.nth(1).locator(".numbers")).to_be_visible()
    expect(names(one)).to_have_text(["Old", "Slow, answering"])
    one.page.locator("#conversations .open", has_text="Old").click()
    expect(one.replies.nth(1).locator(".numbers")).to_be_visible()
    hold.released.set()
    one.ask("Said after it")
    expect(one.replies.nth(2).locator(".numbers")).to_be_visible()
    assert said(kept(one, "Old")) == ["Old", "Said beside it", "Said after it"]
    assert kept(one, "Slow")[1]["content"] == "begun"


@pytest.mark.browser
def test_an_open_edit_stays_whatever_another_tab_keeps(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.ask("Mine")
    expect(one.replies.locator(".numbers")).to_be_visible()
    other = visit(beside=one)
    one.button("Edit and continue from here").click()
    field = one.page.get_by_label("Edit your message")
    field.fill("Mine, with care")
    other.ask("Beside it")
    expect(other.replies.nth(1).locator(".numbers")).to_be_visible()
    expect(one.replies).to_have_count(2)
    other.button("New conversation").last.click()
    other.ask("Elsewhere")
    expect(names(one)).to_have_text(["Elsewhere", "Mine"])
    expect(field).to_be_focused()
    field.press("Enter")
    expect(one.replies.locator(".numbers")).to_be_visible()
    assert said(kept(one, "Mine")) == ["Mine, with care"]
    other.page.locator("#conversations .open", has_text="Mine").click()
    expect(other.replies).to_have_count(1)


@pytest.mark.browser
def test_a_conversation_that_goes_on_in_two_tabs_at_once_is_kept_as_two(
    server: PageServer, visit: Callable[..., Visit]
) -> None:
    one, hold = visit(), Hold()
    one.ask("First")
    expect(one.replies.locator(".numbers")).to_be_visible()
    other = visit(beside=one)
    server.plays.append(Play(["begun ", hold, "and ended"]))
    one.ask("Here")
    expect(one.replies.nth(1).locator(".body")).to_have_text("begun")
    expect(other.replies).to_have_count(2)
    other.ask("There")
    expect(other.replies.nth(2).locator(".numbers")).to_be_visible()
    expect(one.page.get_by_role("alert")).to_contain_text("“First” went on in another tab as well. Both are kept")
    hold.released.set()
    expect(one.replies.nth(1).locator(".numbers")).to_be_visible()
    assert one.texts == ["First", "Reply 1.", "Here", "begun and ended"]
    one.button("Open the other").click()
    expect(one.replies.nth(2).locator(".body")).to_have_text("Reply 3.")
    expect(names(other)).to_have_text(["First", "First"])
    other.page.locator("#conversations .open:not([aria-current])").click()
    expect(other.replies.nth(1).locator(".body")).to_have_text("begun and ended")


@pytest.mark.browser
def test_a_new_title_given_in_another_tab_holds_when_the_reply_ends(
    server: PageServer, visit: Callable[..., Visit]
) -> None:
    one, hold = visit(), Hold()
    server.plays.append(Play(["begun ", hold, "and ended"]))
    one.ask("Plain")
    expect(one.replies.locator(".body")).to_have_text("begun")
    other = visit(beside=one)
    other.button("This conversation").click()
    other.button("Rename…").click()
    other.page.get_by_label("Title").fill("Better")
    other.page.keyboard.press("Enter")
    expect(one.page).to_have_title("Better · Mixtral")
    hold.released.set()
    expect(one.replies.locator(".numbers")).to_be_visible()
    expect(other.replies.locator(".body")).to_have_text("begun and ended")
    expect(names(other)).to_have_text(["Better"])


@pytest.mark.browser
def test_a_conversation_deleted_in_another_tab_can_be_brought_back_with_its_reply(
    server: PageServer, visit: Callable[..., Visit]
) -> None:
    one, hold = visit(), Hold()
    server.plays.append(Play(["begun", hold]))
    one.ask("Gone")
    expect(one.replies.locator(".body")).to_have_text("begun")
    other = visit(beside=one)
    other.button("Delete Gone").click()
    expect(names(one)).to_have_count(0)
    one.button("Undo").click()
    expect(one.replies.locator(".body")).to_have_text("begun")
    assert hold.client_left.wait(10)
    expect(names(other)).to_have_text(["Gone"])


@pytest.mark.browser
def test_taking_back_what_another_tab_went_on_from_keeps_both(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.ask("Before")
    expect(one.replies.locator(".numbers")).to_be_visible()
    one.button("Edit and continue from here").click()
    one.page.get_by_label("Edit your message").fill("Edited")
    one.page.get_by_label("Edit your message").press("Enter")
    expect(one.replies.locator(".body")).to_have_text("Reply 2.")
    expect(one.button("Stop")).to_be_hidden()
    one.button("Undo").focus()  # So long it stays.
    other = visit(beside=one)
    other.ask("Went on")
    expect(other.replies.nth(1).locator(".numbers")).to_be_visible()
    expect(one.replies.nth(1).locator(".body")).to_have_text("Reply 3.")
    one.button("Undo").click()
    expect(names(other)).to_have_count(2)
    assert one.texts == ["Before", "Reply 1."]
    assert other.texts == ["Edited", "Reply 2.", "Went on", "Reply 3."]


@pytest.mark.browser
def test_the_focus_in_the_list_stays_on_its_conversation_when_another_tab_moves_it(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.ask("First")
    expect(one.replies.locator(".numbers")).to_be_visible()
    other = visit(beside=one)
    one.button("Delete First").focus()
    other.button("New conversation").last.click()
    other.ask("Second")
    expect(names(one)).to_have_text(["Second", "First"])
    expect(one.button("Delete First")).to_be_focused()


def names(tab: Visit) -> Locator:
    return tab.page.locator("#conversations .open")


def kept(tab: Visit, title: str) -> list[dict[str, Any]]:
    """The messages of the one conversation that is kept under this title."""
    found = [one for one in tab.page.evaluate("Object.values(localStorage).map(JSON.parse)") if one["title"] == title]
    assert len(found) == 1
    return list(found[0]["messages"])


def said(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


# What the model writes is text.


TAGS = (
    "article div p h3 h4 h5 h6 hr blockquote ol ul li table thead tbody tr th td pre code em strong s a br span button"
)
ALLOWED_TAGS = {*TAGS.upper().split(), "svg", "use"}
ATTRIBUTES = "class dir role tabindex aria-label aria-busy aria-hidden title type href rel target start"
ALLOWED_ATTRIBUTES = set(ATTRIBUTES.split())
LOOK_FOR_TROUBLE = """thread => [...new Set([...thread.querySelectorAll("*")].flatMap(node => [
  `tag ${node.tagName}`,
  ...[...node.attributes].map(({name}) => `attribute ${name}`),
  ...(node.tagName === "A" ? [`link ${new URL(node.href).protocol + node.rel + node.target}`] : [])]))]
"""


@pytest.mark.browser
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_does_nothing_and_the_page_goes_on(
    kind: str, server: PageServer, visit: Callable[..., Visit]
) -> None:
    text = HOSTILE[kind]
    third = len(text) // 3
    server.plays.append(Play([text[:third], text[third : 2 * third], text[2 * third :]]))
    chat = visit(viewport={"width": 480, "height": 700})
    chat.ask("Be hostile.")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    found = {tuple(one.split(" ", 1)) for one in chat.page.locator("#thread").evaluate(LOOK_FOR_TROUBLE)}
    assert {name for what, name in found if what == "tag"} <= ALLOWED_TAGS
    assert {name for what, name in found if what == "attribute"} <= ALLOWED_ATTRIBUTES
    assert {name for what, name in found if what == "link"} <= {
        f"{scheme}:noopener noreferrer nofollow_blank" for scheme in ("http", "https", "mailto")
    }
    assert chat.page.locator("#main").evaluate("main => main.scrollWidth") <= 480
    chat.page.reload()
    chat.ask("Still there?")
    expect(chat.replies.nth(1).locator(".body")).to_have_text("Reply 2.")
    assert server.bodies[1]["messages"][1]["content"] == text.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )


@pytest.mark.browser
def test_markdown_becomes_what_it_means_and_all_else_is_text(visit: Callable[..., Visit]) -> None:
    chat = visit()
    for source, expected in MARKDOWN.items():
        assert outline(chat, source) == expected, source


def outline(chat: Visit, source: str) -> str:
    """The elements and texts that `source` becomes, with links' targets and lists' starts."""
    return str(
        chat.page.evaluate(
            """async source => {
              const { Markdown } = await import("/markdown.js");
              const box = document.createElement("div");
              new Markdown(box).show(source);
              const kept = node => [...node.attributes].filter(({name}) => name === "href" || name === "start");
              const show = node => {
                if (node.nodeType === Node.TEXT_NODE) return node.data;
                if (node.className === "code-bar") return "";
                const inside = [...node.childNodes].map(show).join("");
                const name = node.tagName.toLowerCase();
                if (name === "div" || name === "span") return inside;
                return `<${name}${kept(node).map(a => ` ${a.name}=${a.value}`).join("")}>${inside}</${name}>`;
              };
              return [...box.childNodes].map(show).join("");
            }""",
            source,
        )
    )


MARKDOWN = {
    "One\ntwo\n\nthree": "<p>One<br></br>two</p><p>three</p>",
    "# One\n### Three ###\n####### seven": "<h3>One</h3><h5>Three</h5><p>####### seven</p>",
    "**bold** *italic* ***both*** ~~gone~~": (
        "<p><strong>bold</strong> <em>italic</em> <em><strong>both</strong></em> <s>gone</s></p>"
    ),
    "snake_case_name 2*3*4 and a * b * c": "<p>snake_case_name 2<em>3</em>4 and a * b * c</p>",
    "_a **b_ c**": "<p><em>a **b</em> c**</p>",
    r"\*not\* \<this\>": "<p>*not* <this></p>",
    "`a*b*` ``c`d`` `open": "<p><code>a*b*</code> <code>c`d</code> `open</p>",
    "- a\n- b\n  - c\n\n    still c\n- d": (
        "<ul><li>a</li><li>b<ul><li><p>c</p><p>still c</p></li></ul></li><li>d</li></ul>"
    ),
    "3. a\n4. b": "<ol start=3><li>a</li><li>b</li></ol>",
    "1. a\n\n   ```\n   x\n   ```\n2. b": "<ol><li><p>a</p><pre><code>x</code></pre></li><li><p>b</p></li></ol>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "```py\n<b> *x*\n\n  y\n```\nafter": "<pre><code><b> *x*\n\n  y</code></pre><p>after</p>",
    "```\nopen": "<pre><code>open</code></pre>",
    "a\n***\nb": "<p>a</p><hr></hr><p>b</p>",
    "|a|b|\n|-|:-:|\n|1|`x`|\n|2|": (
        "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td><code>x</code></td></tr><tr><td>2</td><td></td></tr></tbody></table>"
    ),
    "[a *b*](https://x.org/p?q=1)": "<p><a href=https://x.org/p?q=1>a <em>b</em></a> (x.org)</p>",
    "[a](https://good.org@bad.org)": "<p><a href=https://good.org@bad.org/>a</a> (bad.org)</p>",
    "see https://x.org/a_b_c.": "<p>see <a href=https://x.org/a_b_c>https://x.org/a_b_c</a>.</p>",
    "(https://x.org/a)": "<p>(<a href=https://x.org/a>https://x.org/a</a>)</p>",
    "<mailto:a@x.org>": "<p><a href=mailto:a@x.org>mailto:a@x.org</a></p>",
    "[a](javascript:x) [b](/c)": "<p>[a](javascript:x) [b](/c)</p>",
    "![map](https://x.org/m.png)": "<p><a href=https://x.org/m.png>map</a> (x.org)</p>",
    "a &amp; b <i>c</i>": "<p>a &amp; b <i>c</i></p>",
    "x\u202ey": "<p>xU+202Ey</p>",
}


@pytest.mark.browser
def test_text_that_comes_in_pieces_ends_up_as_if_it_had_come_at_once(visit: Callable[..., Visit]) -> None:
    # A fence without an end takes all that follows.
    source = "\n\n".join(sorted(MARKDOWN, key=lambda text: text == "```\nopen"))
    chat = visit()
    whole, pieces = chat.page.evaluate(
        """async source => {
          const { Markdown } = await import("/markdown.js");
          const [one, other] = [document.createElement("div"), document.createElement("div")];
          new Markdown(one).show(source);
          const growing = new Markdown(other);
          for (let end = 0; end <= source.length; end++) growing.show(source.slice(0, end));
          return [one, other].map(box => new XMLSerializer().serializeToString(box));
        }""",
        source,
    )
    assert pieces == whole
    assert "<table>" in whole


@pytest.mark.browser
def test_a_stream_cut_anywhere_is_read_the_same(visit: Callable[..., Visit]) -> None:
    stream = (
        ': prompt 1/2\r\n\r\ndata: {"a": "é\u4e2d\U0001f600"}\n\n'
        "event: x\ndata: one\ndata:two\n\r\n: end\n\ndata: [DONE]\n\n"
    )
    read = visit().page.evaluate(
        """async text => {
          const { events } = await import("/api.js");
          const bytes = new TextEncoder().encode(text);
          const seen = new Set();
          for (let cut = 0; cut <= bytes.length; cut++) {
            const parts = [bytes.slice(0, cut), bytes.slice(cut)];
            const found = [];
            const stream = new ReadableStream({
              start(sink) { parts.forEach(part => sink.enqueue(part)); sink.close(); },
            });
            for await (const event of events(stream)) found.push(event);
            seen.add(JSON.stringify(found));
          }
          return [...seen];
        }""",
        stream,
    )
    assert [json.loads(one) for one in read] == [
        [
            {"comment": "prompt 1/2"},
            {"data": '{"a": "é\u4e2d\U0001f600"}'},
            {"data": "one\ntwo"},
            {"comment": "end"},
            {"data": "[DONE]"},
        ]
    ]


@pytest.mark.browser
def test_code_is_copied_as_it_was_written(server: PageServer, visit: Callable[..., Visit]) -> None:
    code = "if x:\n    print('<b>\u202e')"
    server.plays.append(Play([f"```python\n{code}\n```"]))
    chat = visit(permissions=["clipboard-read", "clipboard-write"])
    chat.ask("Code")
    chat.button("Copy code").click()
    expect(chat.page.locator("#announcer")).to_have_text("Copied.")
    assert chat.page.evaluate("navigator.clipboard.readText()") == code


# For everybody.


SHOWN = """Experts are **small networks** inside each layer; a *router* sends every token to two of eight.

## How a token travels

1. The router scores the experts with one small matrix.
2. The best two are asked:
   - their answers are weighed by the scores
   - ~~all~~ the rest is not computed, see [the paper](https://arxiv.org/abs/2401.04088)
3. The sum goes on to the next layer.

```python
def route(hidden, gate, experts):
    scores = softmax(hidden @ gate.T)
    return sum(scores[chosen] * experts[chosen](hidden) for chosen in top_k(scores, 2))  # of all eight
```

| model | layers | active |
|---|---:|---:|
| 8x7B | 32 | 12.9 B |
| 8x22B | 56 | 39 B |

> The name says 8x7B, but attention is shared: `46.7 B` in all. \u202eNot\u202c hidden.
"""


def full_of_life(server: PageServer, chat: Visit) -> None:
    """A conversation with one of everything."""
    server.plays.append(Play([SHOWN], timings={"generation_tps": 38.2, "first_token_s": 0.4}))
    chat.ask("Show me what you can write.")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    server.plays.append(Play(["Begun", Failure({"message": "Memory ran short.", "hint": "Free some."})]))
    chat.ask("And what can go wrong?")
    expect(chat.button("Try again")).to_be_visible()


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_no_look_has_a_serious_barrier_or_is_wider_than_the_window(
    scheme: str, width: int, server: PageServer, visit: Callable[..., Visit]
) -> None:
    counts = [[(layer * 7 + expert * 5) % 13 for expert in range(8)] for layer in range(32)]
    server.routing = {"layers": 32, "experts": 8, "tokens": 40, "counts": counts, "last": [[0, 1]] * 32}
    chat = visit(color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    expect(chat.button("Experts")).to_be_visible()
    look = f"{scheme}-{width}"
    check_barriers(chat, f"{look}-empty")
    full_of_life(server, chat)
    check_barriers(chat, f"{look}-conversation")
    for name in ("Settings", "Experts"):
        chat.button(name).click()
        if name == "Experts":
            chat.page.get_by_text("All watched").click()
        check_barriers(chat, f"{look}-{name.lower()}")
        chat.button(f"Close {name.lower()}").click()
    chat.button("Edit and continue from here").last.click()
    check_barriers(chat, f"{look}-edit")
    chat.button("Cancel").click()
    chat.button("This conversation").click()
    check_barriers(chat, f"{look}-menu")
    chat.button("Rename…").click()
    check_barriers(chat, f"{look}-rename")
    chat.button("Cancel").click()
    if width == 320:
        chat.button("Show conversations").click()
        check_barriers(chat, f"{look}-conversations")


def check_barriers(chat: Visit, name: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    chat.shoot(name)
    found = Axe().run(chat.page).response["violations"]
    serious = {
        violation["id"]: [node["html"][:200] for node in violation["nodes"]]
        for violation in found
        if violation["impact"] in ("serious", "critical")
    }
    assert serious == {}, name
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= chat.page.viewport_size["width"]


@pytest.mark.browser
def test_everything_can_be_done_with_the_keyboard(server: PageServer, visit: Callable[..., Visit]) -> None:
    chat = visit()
    press = chat.page.keyboard.press
    expect(chat.message).to_be_focused()
    chat.page.keyboard.type("One")
    press("Shift+Enter")
    chat.page.keyboard.type("more")
    press("Enter")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    assert server.bodies[0]["messages"][0]["content"] == "One\nmore"

    press("ArrowUp")
    expect(chat.page.get_by_label("Edit your message")).to_be_focused()
    press("Escape")
    expect(chat.page.get_by_label("Edit your message")).to_have_count(0)

    tab_to(chat, "Answer again")
    press("Enter")
    expect(chat.replies.locator(".body")).to_have_text("Reply 2.")

    tab_to(chat, "Settings")
    press("Enter")
    expect(chat.button("Close settings")).to_be_focused()
    press("Enter")
    expect(chat.button("Settings")).to_be_focused()

    tab_to(chat, "This conversation")
    press("Enter")
    tab_to(chat, "Rename…")
    press("Enter")
    chat.page.keyboard.type("New name")
    press("Enter")
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("New name")

    hold = Hold()
    server.plays.append(Play(["Begun", hold]))
    tab_to(chat, "Answer again")
    press("Space")
    expect(chat.replies.locator(".body")).to_have_text("Begun")
    press("Escape")
    expect(chat.replies.locator(".note")).to_have_text("Stopped.")

    press("Control+Shift+O")
    expect(chat.message).to_be_focused()
    expect(chat.replies).to_have_count(0)
    tab_to(chat, "Delete New name")
    press("Enter")
    expect(chat.page.locator("#conversations li")).to_have_count(0)


@pytest.mark.browser
def test_a_reply_that_ends_takes_the_focus_from_nobody(server: PageServer, visit: Callable[..., Visit]) -> None:
    chat, hold = visit(), Hold()
    chat.ask("One")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    server.plays.append(Play(["Begun", hold]))
    chat.ask("Two")
    expect(chat.replies.nth(1).locator(".body")).to_have_text("Begun")
    chat.button("Edit and continue from here").first.click()
    chat.page.keyboard.type("!")
    hold.released.set()
    expect(chat.replies.nth(1).locator(".numbers")).to_be_visible()
    expect(chat.page.get_by_label("Edit your message")).to_be_focused()
    expect(chat.page.get_by_label("Edit your message")).to_have_value("One!")


def tab_to(chat: Visit, name: str) -> None:
    """Press Tab until the button of that name has the focus."""
    for _ in range(60):
        chat.page.keyboard.press("Tab")
        if name == chat.page.evaluate(
            "(document.activeElement.ariaLabel ?? document.activeElement.textContent).trim()"
        ):
            return
    pytest.fail(f"Tab never reached {name}")


@pytest.mark.browser
def test_the_skip_link_comes_first_and_leads_to_the_message_field(visit: Callable[..., Visit]) -> None:
    chat = visit()
    chat.button("Hide conversations").focus()
    chat.page.keyboard.press("Shift+Tab")
    expect(chat.page.get_by_text("Skip to the message field")).to_be_focused()
    chat.page.keyboard.press("Enter")
    expect(chat.message).to_be_focused()


@pytest.mark.browser
def test_a_screen_reader_hears_the_finished_reply_and_not_each_token(
    server: PageServer, visit: Callable[..., Visit]
) -> None:
    chat = visit()
    chat.page.evaluate(
        """() => { window.heard = [];
          new MutationObserver(() => heard.push(document.getElementById("announcer").textContent))
            .observe(document.getElementById("announcer"), {childList: true}); }"""
    )
    server.plays.append(Play([f"word{number} " for number in range(50)]))
    chat.ask("Speak.")
    expect(chat.replies.locator(".numbers")).to_be_visible()
    words = "".join(f"word{number} " for number in range(50))
    assert chat.page.evaluate("heard") == ["Mixtral is answering.", f"Mixtral said: {words}"]
    assert chat.page.locator("#thread").evaluate("thread => thread.closest('[aria-live], [role=log]')") is None


@pytest.mark.browser
def test_the_enter_that_ends_a_composition_sends_nothing(server: PageServer, visit: Callable[..., Visit]) -> None:
    chat = visit()
    chat.message.fill("にほん")
    chat.message.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True})
    expect(chat.message).to_have_value("にほん")
    chat.message.press("Enter")
    expect(chat.replies.locator(".body")).to_have_text("Reply 1.")
    assert len(server.bodies) == 1


@pytest.mark.browser
def test_reading_further_up_is_not_disturbed_by_what_comes(server: PageServer, visit: Callable[..., Visit]) -> None:
    hold = Hold()
    server.plays.append(Play(["line\n\n" * 100, hold, "line\n\n" * 100]))
    chat = visit(viewport={"width": 900, "height": 600})
    chat.ask("Many lines")
    expect(chat.replies.locator("p")).to_have_count(100)
    scroller = chat.page.get_by_role("region", name="Messages")
    scroller.evaluate("region => region.scrollTop = 50")
    expect(chat.button("Latest")).to_be_visible()
    hold.released.set()
    expect(chat.replies.locator(".body p")).to_have_count(200)
    assert scroller.evaluate("region => region.scrollTop") == 50
    chat.button("Latest").click()
    expect(chat.button("Latest")).to_be_hidden()
