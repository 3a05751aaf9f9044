"""tokenizer.json: what mlx-lm and transformers split is what SentencePiece splits.

The oracles are sentencepiece for text and mistral-common for chats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral_mlx.convert import tokenizer as convert

CARRIED = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}


def carried(version: str) -> Path:
    return MistralTokenizer._data_path() / CARRIED[version]


@pytest.fixture(scope="session", params=CARRIED)
def version(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="session")
def pieces(version: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(carried(version)))


@pytest.fixture(scope="session")
def folder(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(version)
    convert.write_tokenizer_json(carried(version), folder)
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return folder


@pytest.fixture(scope="session")
def mlx_lm_tokenizer(folder: Path) -> Any:
    """As `mlx_lm.load` makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from mlx_lm.tokenizer_utils import load

        return load(folder)


def odd_texts(count: int) -> list[str]:
    pick = random.Random(0)
    common = [*"aAbe z.,1é🙂\n\t▁ﬁ漢ß\u200b\u0301\0[]/<>", "  ", " the", "Hello", "INST", "<0x0A>"]
    ranges = [(1, 128), (0, 0x3000), (0x1F000, 0x1FA00)]

    def character() -> str:
        return pick.choice(common) if pick.random() < 0.7 else chr(pick.randrange(*pick.choice(ranges)))

    texts = ["".join(character() for _ in range(pick.randrange(60))) for _ in range(count)]
    # A control piece written out is a control token to every Hugging Face tokenizer.
    return [text for text in texts if "[INST]" not in text and "[/INST]" not in text]


def repetitive_texts(count: int) -> list[str]:
    """Few letters, much repeated: where the order of joining shows."""
    pick = random.Random(2)
    alphabets = ["ab", "a ", "-= ", "01", "\n ", "\t ", "/*", "....,", "the ", "漢 "]
    return ["".join(pick.choices(pick.choice(alphabets), k=pick.randrange(120))) for _ in range(count)]


def test_2400_odd_texts_get_the_ids_of_sentencepiece(folder: Path, pieces: Any) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = odd_texts(2400)
    assert len(texts) > 2300
    runs = [f"{head}{' ' * length}{tail}" for length in range(80) for head in ("", "a") for tail in ("", "b", "\n")]
    for text in [*texts, *runs, *repetitive_texts(500), "long " * 3000, " " * 5000, "a" * 5000]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == pieces.encode(text), text[:99]


def test_mlx_lm_encodes_with_one_bos(mlx_lm_tokenizer: Any, pieces: Any) -> None:
    for text in [*odd_texts(100), "", "Hello world"]:
        assert mlx_lm_tokenizer.encode(text) == [1, *pieces.encode(text)]
        assert mlx_lm_tokenizer.encode(text, add_special_tokens=False) == pieces.encode(text)
    assert mlx_lm_tokenizer.eos_token_ids == {2}
    assert mlx_lm_tokenizer.bos_token_id == 1


def test_mlx_lm_streams_text_as_sentencepiece_decodes_it(mlx_lm_tokenizer: Any, pieces: Any) -> None:
    kind = type(mlx_lm_tokenizer.detokenizer).__name__
    assert kind == "SPMStreamingDetokenizer", "the naive one takes quadratic time"
    for text in ["Hello world", "emoji 🙂👨‍👩‍👧 and 漢字", "tabs\tand\n\nlines", "a  b   c"]:
        stream = mlx_lm_tokenizer.detokenizer
        for token in pieces.encode(text):
            stream.add_token(token)
        stream.finalize()
        assert stream.text == mlx_lm_tokenizer.decode(pieces.encode(text)) == text


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Ordinary ones: an optional system message, then user and assistant in turn."""
    pick = random.Random(1)
    words = ["Hi", "What is 2 + 3?", "multi\nline\n\n", " spaced  out ", "🙂 漢", "{{ x }} {% y %}", "1. a\n2. b", "é"]

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(pick.choices(words, k=pick.randrange(1, 6)))}

    found = []
    for number in range(count):
        system = [turn("system")] * (number % 2)
        pairs = [turn(role) for _ in range(pick.randrange(4)) for role in ("user", "assistant")]
        found.append([*system, *pairs, turn("user")])
    return found


def test_the_chat_template_gives_the_ids_of_mistral_common(version: str, mlx_lm_tokenizer: Any) -> None:
    reference = MistralTokenizer.from_file(carried(version))
    for messages in [*conversations(100), [{"role": "user", "content": ""}]]:
        request: Any = ChatCompletionRequest.model_validate({"messages": messages})
        expected = reference.encode_chat_completion(request).tokens
        assert mlx_lm_tokenizer.apply_chat_template(messages, add_generation_prompt=True) == expected
        text = mlx_lm_tokenizer.apply_chat_template(messages, tokenize=False)
        assert mlx_lm_tokenizer.encode(text, add_special_tokens=False) == expected


def test_the_chat_template_refuses_what_it_cannot_write(mlx_lm_tokenizer: Any) -> None:
    for talk, tools in [([{"role": "tool", "content": "4"}], None), ([{"role": "user", "content": "x"}], [{"a": 1}])]:
        with pytest.raises(Exception, match=r"The roles are|no tools"):
            mlx_lm_tokenizer.apply_chat_template(talk, tools=tools)


def test_the_files_are_small_and_plain_json(version: str, folder: Path) -> None:
    assert (folder / "tokenizer.json").stat().st_size < 1_600_000
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(content["model"]["vocab"]) == {"v1": 32_000, "v3": 32_768}[version]
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    (tmp_path / "tokenizer.json").write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.write_tokenizer_json(carried("v1"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "old"
