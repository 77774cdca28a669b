from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.batch import lines as lines_module
from headwise.runtime.batch.lines import read_lines
from headwise.workers.errors import InvalidValueError
from tests.effort import examples


def test_blank_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\xef\xbb\xbfone\n\n  \r\ntwo\r\n three")
    assert [(line.number, line.data) for line in read_lines(path)] == [(1, b"one"), (4, b"two"), (5, b"three")]


def test_a_digest_tells_lines_and_contexts_apart(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"one\ntwo\none\n")
    one, two, again = (line.digest for line in read_lines(path))
    assert one == again != two and len(one) == 16
    assert next(read_lines(path, b"other")).digest != one


def test_a_line_that_is_too_long_is_passed_over_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 8)
    path = tmp_path / "in"
    path.write_bytes(b"x" * 30 + b"\nshort\n" + b"y" * 8 + b"\n" + b" " * 20 + b"\nlast")
    found = [(line.number, line.data, line.num_bytes > 8) for line in read_lines(path)]
    assert found == [(1, b"", True), (2, b"short", False), (3, b"", True), (4, b"", True), (5, b"last", False)]
    before = next(read_lines(path)).digest
    path.write_bytes(b"z" + b"x" * 29 + b"\n")
    assert next(read_lines(path)).digest != before


@examples(100)
@given(st.lists(st.binary(max_size=40).filter(lambda data: b"\n" not in data)))
def test_lines_are_those_of_the_file(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("lines") / "in"
    path.write_bytes(b"\n".join([b"first", *parts]))
    found = {line.number: line.data for line in read_lines(path)}
    assert found == {1: b"first"} | {n: part.strip() for n, part in enumerate(parts, 2) if part.strip()}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"--input=.*nothing.*No such file"):
        list(read_lines(tmp_path / "nothing"))
