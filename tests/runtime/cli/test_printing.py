from __future__ import annotations

import io
import json
import sys

import pytest

from headwise.runtime.cli.printing import print_json, write


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_what_an_encoding_has_not_ends_nothing(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a model or of a job, and the name of a file, may be anything."""
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding))
    write("caf\u00e9 \u4e16 \udcff\n")
    print_json({"input": "\u4e16 \udcff"})
    sys.stdout.flush()
    text, value = data.getvalue().decode(encoding).splitlines()
    assert text.endswith("\\udcff") and text.startswith("caf")
    assert json.loads(value) == {"input": "\u4e16 \udcff"}


def test_text_that_an_encoding_has_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    write("caf\u00e9")
    print_json({"a": "\u4e16"})
    assert capsys.readouterr().out == 'caf\u00e9{"a": "\u4e16"}\n'
