"""The command `routes`: the figures are right, and the pictures show what was chosen."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixtral_mlx import cli
from mixtral_mlx.generate import Conversation, Sampling, stream_generate
from mixtral_mlx.opening import ModelChoice, open_model
from mixtral_mlx.prompt import Message, Tokenizer
from mixtral_mlx.routes import commands, page, picture, view
from mixtral_mlx.routes.report import MEASURED, Figures, Report, Token, by_chance, figures, table
from mixtral_mlx.routing import Choices
from mixtral_mlx.terminal import CtrlC
from mixtral_mlx.weights import load, locate
from mixtral_mlx.writing import WriteError, write_output

from .checkpoints import TINY, streamed, write_tiny
from .test_cli import COMMON, error_code
from .test_routing import assert_greatest, router_logits


def report_of(experts: list[list[list[int]]], *, weights: tuple[float, ...] = (0.75, 0.25), prompt: int = 1) -> Report:
    """A report of made-up choices (N, L, K) of eight experts; each token is named by a letter."""
    chosen = np.array(experts)
    return Report(
        model="made up",
        dtype="float32",
        mode="resident",
        experts=8,
        tokens=tuple(Token(n, f"▁{chr(97 + n % 26)}", n >= prompt) for n in range(len(chosen))),
        choices=Choices(chosen, np.broadcast_to(np.array(weights), chosen.shape)),
        text="",
        finish_reason="length",
    )


def random_report(tokens: int, layers: int = 4, seed: int = 0) -> Report:
    drawn = np.random.default_rng(seed).random((tokens, layers, 8)).argsort(axis=-1)[..., :2]
    return report_of(drawn.tolist(), prompt=tokens // 2)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5))


# The figures.


def test_figures_are_those_worked_out_by_hand() -> None:
    """Three tokens in one layer with four experts: loads 2, 2, 1, 1 of 6."""
    (one,) = figures(Choices(np.array([[[0, 1]], [[0, 2]], [[1, 3]]]), np.ones((3, 1, 2))), 4)
    entropy = -(2 * (2 / 6) * np.log2(2 / 6) + 2 * (1 / 6) * np.log2(1 / 6)) / 2  # Of log2(4) = 2 bits.
    assert one.evenness == pytest.approx(entropy)
    assert one.busiest == pytest.approx((2 / 6) * 4)
    assert one.same_first == 1 / 2  # 0 then 0, 0 then 1
    assert one.again == 1 / 4  # of 0 2 1 3 only the 0 was there before


def test_extremes_of_load_are_one_and_all_in_one() -> None:
    every = np.array([[[n, n + 1]] for n in range(0, 8, 2)])
    same = np.zeros((4, 1, 1), int)
    (even,) = figures(Choices(every, np.ones(every.shape)), 8)
    (odd,) = figures(Choices(same, np.ones(same.shape)), 8)
    assert even.evenness == pytest.approx(1)
    assert (even.busiest, even.same_first, even.again) == (1, 0, 0)
    assert odd == Figures(0, 8, 1, 1)


def test_a_single_token_repeats_nothing() -> None:
    (one,) = figures(Choices(np.array([[[0, 1]]]), np.ones((1, 1, 2))), 8)
    assert one.same_first is None
    assert one.again is None
    assert "–" in table(report_of([[[0, 1]]]))[1]


def test_chance_over_a_long_text_is_even_and_over_a_short_one_is_not() -> None:
    long, short = by_chance(20_000, 8, 2), by_chance(4, 8, 2)
    assert long.evenness > 0.999
    assert short.evenness < 0.95
    # Four tokens make eight choices: at best one each. The exact mean of the busiest is between 1 and 4.
    assert 1.5 < short.busiest < 3
    assert (long.same_first, long.again) == (1 / 8, 2 / 8)
    measured = figures(random_report(3000).choices, 8)
    assert np.mean([one.again for one in measured]) == pytest.approx(long.again, abs=0.01)


def test_what_others_measured_stands_beside_it() -> None:
    names = [row[0] for row in table(random_report(9))]
    assert names == ["", "this text", "by chance", *MEASURED]


# What both pictures show.

# How the eyes of people without one kind of cones see: Machado, Oliveira and Fernandes 2009, severity 1.
SIGHT = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, sight: Any) -> np.ndarray:
    """A colour in CIE Lab, as it is seen."""
    channels = np.array(rgb(colour)) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(np.array(sight) @ linear, 0, 1) / [0.9505, 1, 1.0888], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_experts_are_told_apart_by_every_kind_of_eye(sight: str) -> None:
    papers = [lab(colour, SIGHT[sight]) for colour in (picture.PAPER, "#161618")]
    seen = [lab(colour, SIGHT[sight]) for colour in view.PALETTE]
    # 2.3 is a difference that can just be noticed.
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 20
    assert min(np.linalg.norm(one - paper) for one, paper in itertools.product(seen, papers)) > 15


def test_a_cell_is_shared_by_weight_and_hides_no_expert() -> None:
    assert view.shares([0.5, 0.5]) == [(0, 11), (11, 11)]
    assert view.shares([0.999, 0.001]) == [(0, 18), (18, 4)]
    assert [width for _, width in view.shares([0.5, 0.3, 0.2])] == [11, 7, 4]


def test_long_texts_show_their_beginning_and_end_and_say_so() -> None:
    bands = view.Bands.of(random_report(100), 72)
    shown = [n for row in bands.rows for n in row]
    assert shown == [*range(36), None, *range(65, 100)]
    assert bands.left_out == 29
    assert bands.note.startswith("29 tokens in the middle are left out")
    assert {len(row) for row in bands.rows} == {36}
    whole = view.Bands.of(random_report(72), 72)
    assert whole.left_out == 0
    assert whole.note == ""


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("▁the", "·the"),
        ("<0x0A>", "\\n"),
        ("<0xE4>", "<E4>"),
        ("[INST]", "[INST]"),
        ("a\u202eb", "ab"),
        ("x" * 40, "x" * 15 + "…"),
    ],
)
def test_labels_show_what_cannot_be_seen(piece: str, shown: str) -> None:
    assert view.label(piece) == shown


# The PNG.


def test_the_colours_in_the_picture_are_the_choices() -> None:
    report = random_report(150, layers=5)
    layout, image = picture.Layout(report), Image.open(io.BytesIO(picture.png(report))).convert("RGB")
    assert image.size == (layout.width, layout.height)
    assert len(layout.bands.rows) > 1
    for band, row in enumerate(layout.bands.rows):
        for column, number in enumerate(row):
            assert number is not None
            for layer in range(5):
                first, second = report.choices.experts[number, layer].tolist()
                x, y = layout.cell(band, column, layer)
                # Weights 3 : 1 share 22 pixels as 16 and 6.
                assert image.getpixel((x + 1, y + 1)) == image.getpixel((x + 15, y + 1)) == rgb(view.PALETTE[first])
                assert image.getpixel((x + 16, y + 1)) == image.getpixel((x + 21, y + 1)) == rgb(view.PALETTE[second])
                assert image.getpixel((x + 23, y + 1)) == rgb(picture.PAPER)


def test_the_bars_in_the_picture_are_the_loads() -> None:
    """Expert 0 has half of all choices of layer 0, experts 1 and 2 a quarter; in layer 1 all experts have the same."""
    tokens = [[[0, 1 + n % 2], [2 * n % 8, (2 * n + 1) % 8]] for n in range(8)]
    report = report_of(tokens)
    layout, image = picture.Layout(report), picture.draw(report)

    def length(layer: int, expert: int) -> int:
        x, y = layout.bar(layer, expert)
        return sum(image.getpixel((x + n, y + 2)) == rgb(view.PALETTE[expert]) for n in range(34))

    full = length(0, 0) + 3  # The mark of an even share covers three pixels.
    assert [length(0, expert) for expert in range(3, 8)] == [0] * 5
    assert abs(length(0, 1) + 3 - full / 2) <= 1
    assert length(0, 1) == length(0, 2)
    assert {length(1, expert) for expert in range(8)} == {length(1, 0)}
    x, y = layout.bar(1, 3)
    even = round(full / 4)
    assert image.getpixel((x + even, y + 2)) == rgb(picture.INK)


def test_prompt_and_answer_are_told_apart() -> None:
    report = report_of([[[0, 1]]] * 6, prompt=2)
    layout, image = picture.Layout(report), picture.draw(report)
    below = layout.top(0) + layout.row + 4
    lines = [image.getpixel((layout.left + n * view.COLUMN + 5, below)) for n in range(6)]
    assert lines == [rgb(picture.DIM)] * 2 + [rgb(picture.ANSWER)] * 4


def test_letters_no_font_has_are_written_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "FALLBACKS", ())
    text, _ = picture.typeset("·中é", 13)
    assert text == "·U+4E2D U+00E9"
    text, _ = picture.typeset("plain 1.2 ×", 13)
    assert text == "plain 1.2 x"


def test_a_font_that_is_not_there_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "FALLBACKS", ("no such font.ttf",))
    assert picture.typeset("é", 13)[0] == "U+00E9"


def test_a_picture_of_a_long_text_of_a_large_model_is_no_larger_than_can_be_looked_at() -> None:
    layout = picture.Layout(random_report(3000, layers=32))
    assert layout.height < 8200
    assert layout.bands.left_out > 2000


# The page.


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_the_page_draws_the_choices_and_says_them() -> None:
    report = random_report(60)
    text = page.html(report)
    drawn: dict[tuple[int, int], set[int]] = {}
    for svg in svgs(text):
        numbers = json.loads(svg.attrib["data-tokens"])
        for path in svg.iter("path"):
            expert = int(path.attrib["class"].removeprefix("e"))
            for x, y in re.findall(r"M(\d+) (\d+)", path.attrib["d"]):
                column, layer = (int(x) - 38) // view.COLUMN, (int(y) - 116) // view.row_height(4)
                drawn.setdefault((numbers[column], layer), set()).add(expert)
    expected = {(n, layer): set(report.choices.experts[n, layer].tolist()) for n in range(60) for layer in range(4)}
    assert drawn == expected
    data = json.loads(re.findall(r'<script type="application/json" id="routes">(.*?)</script>', text)[0])
    assert data["tokens"]["7"] == ["·h", "prompt", report.choices.experts[7].tolist(), [[75, 25]] * 4]


def test_the_page_asks_nobody_for_anything_and_runs_no_text() -> None:
    report = random_report(2)
    hostile = replace(report, tokens=tuple(Token(1, text, False) for text in ("</script><b>", '"><img src=x>')))
    text = page.html(hostile)
    assert not re.findall(
        r"https?:|src=|@import|url\(|href", text.replace("img src=x&gt;", "").replace("img src=x>", "")
    )
    assert "<b>" not in re.sub(r"<b style", "", text)
    assert "<img" not in re.sub(r'<script type="application/json".*?</script>', "", text)
    assert text.count("</script>") == 2
    assert len(svgs(text)) == 1


# The command.


@pytest.fixture(autouse=True)
def _no_model_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXTRAL_MLX_MODEL", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["routes", "--json", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def choices_in(answer: dict[str, Any]) -> Choices:
    return Choices(np.array(answer["choices"]), np.array(answer["weights"]))


def test_json_has_the_routers_choices_for_prompt_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "--model", "demo", "--chat", "--prompt", "What do cats eat?", "--max-tokens", "9")
    loaded, tokenizer = load(locate(None)), Tokenizer.read(locate(None))
    prompt = tokenizer.encode_chat([Message("user", "What do cats eat?")])
    chunks = list(stream_generate(loaded.model, tokenizer, prompt, Sampling(max_tokens=9)))
    ids = [*prompt, *(chunk.token for chunk in chunks if chunk.token is not None)][:-1]
    assert [token["id"] for token in answer["tokens"]] == ids
    assert answer["prompt_tokens"] == len(prompt) == sum(not token["is_answer"] for token in answer["tokens"])
    assert answer["text"] == "".join(chunk.text for chunk in chunks)
    assert_greatest(choices_in(answer), router_logits(loaded.model, ids))
    assert np.array(answer["counts"]).sum(axis=1).tolist() == [2 * len(ids)] * 4
    assert answer["by_layer"][1]["busiest"] == pytest.approx(max(answer["counts"][1]) / (2 * len(ids) / 8), abs=1e-4)


def test_streamed_and_resident_show_the_same_routes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", replace(TINY, head_dim=32))
    request = commands.Request(
        ModelChoice(name=str(folder), quiet=True), "My dog is", False, "", {"max_tokens": 6}, None
    )
    resident = commands.routes(request).objects[0]
    with streamed(folder, 2) as loaded:
        ready = open_model(request.choice)
        report = commands._run(request, replace(ready, loaded=loaded, conversation=Conversation(loaded.model)))
    assert report.mode == "streamed"
    assert report.to_dict()["tokens"] == resident["tokens"]
    assert report.choices.experts.tolist() == resident["choices"]


def test_a_prompt_read_in_parts_has_the_same_routes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    request = commands.Request(
        ModelChoice(name=str(folder), quiet=True),
        "My dog is a good dog and",
        False,
        "",
        {"max_tokens": 1},
        None,
    )
    ready = open_model(request.choice)
    whole = commands._run(request, ready)
    ready.conversation.clear()
    ready.conversation.chunk_tokens = 3
    assert (commands._run(request, ready).choices.experts == whole.choices.experts).all()
    assert len(whole.tokens) == whole.prompt_tokens > 6


@pytest.mark.parametrize("suffix", ["png", "html", "PNG"])
def test_the_picture_appears_whole_and_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"routes.{suffix}"
    line = ["routes", "--model", "demo", "--prompt", "My dog", "--max-tokens", "4", "--output", str(file)]
    assert cli.main(line) == 0
    out, _ = capsys.readouterr()
    assert f"The picture is in {file}" in out
    assert list(tmp_path.iterdir()) == [file]
    if suffix == "html":
        assert file.read_text().startswith("<!doctype html>")
    else:
        assert Image.open(io.BytesIO(file.read_bytes())).format == "PNG"


def test_a_picture_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "routes.png"
    file.write_bytes(b"before")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        write_output(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_ctrl_c_shows_what_there_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()

    class Pressed(CtrlC):
        def __call__(self) -> bool:
            return next(asked) > 4

    monkeypatch.setattr(commands, "CtrlC", Pressed)
    file = tmp_path / "routes.png"
    assert cli.main(["routes", "--model", "demo", "--prompt", "My dog", "--output", str(file), "--json"]) == 130
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish_reason"] == "cancelled"
    assert len(answer["tokens"]) > answer["prompt_tokens"]
    assert file.exists()
    asked = itertools.count(5)
    assert cli.main(["routes", "--model", "demo", "--prompt", "My dog"]) == 130


ROUTES = [
    ("--prompt x", 2, "no_model", "No model was given"),
    ("--model demo --prompt x --system y", 2, "bad_option", "--system goes with --chat"),
    (
        "--model demo --prompt x --output a.gif",
        2,
        "bad_option",
        "--output is 'a.gif', expected a name that ends in .png or",
    ),
    ("--model demo --prompt x --output png", 2, "bad_option", "--output is 'png'"),
    ("--model demo --prompt x --output /nowhere/a.png", 1, "write_failed", "/nowhere/a.png is in no folder"),
    ("--model /nowhere --prompt x", 1, "no_model", "/nowhere"),
    ("--model demo --prompt x --context 9999", 2, "bad_context", "9,999"),
]


@pytest.mark.parametrize(
    ("line", "status", "code", "said"), [*((line, 2, code, said) for line, code, said in COMMON), *ROUTES]
)
def test_wrong_usage_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], line: str, status: int, code: str, said: str
) -> None:
    assert cli.main(["routes", *line.split(" ")]) == status
    out, err = capsys.readouterr()
    assert error_code(err) == code
    assert said in err
    assert out == ""


def test_a_folder_is_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert cli.main(["routes", "--model", "demo", "--prompt", "x", "--output", str(tmp_path / "a.png")]) == 1
    assert "is a folder, expected a file to write" in capsys.readouterr().err


def test_the_prompt_may_come_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"My dog\n")))
    answer = run(capsys, "--model", "demo", "--max-tokens", "2")
    assert [token["piece"] for token in answer["tokens"]][:3] == ["<s>", "▁My", "▁dog"]


def test_a_budget_too_small_is_said_as_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["routes", "--model", "demo", "--prompt", "x", "--memory", "1MB"]) == 1
    assert error_code(capsys.readouterr().err)
