"""A file appears whole or not at all, and takes no other file's place on the way."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mixtral_mlx.writing import write_whole


def test_what_is_written_is_there_and_nothing_beside_it(tmp_path: Path) -> None:
    for content in ("grün", b"\x00\xff"):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_file_of_another_name_is_touched(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_text("precious")
    write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file.partial").read_text() == "precious"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


@pytest.mark.parametrize(("mode", "expected"), [(0o666, 0o640), (0o600, 0o600)])
def test_others_may_read_what_the_mode_and_the_umask_let_them(tmp_path: Path, mode: int, expected: int) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "text", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    write_whole(tmp_path / ("ä" * 127), "text")
