"""What commands print: text as it comes, JSON, and the error of a request that failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from headwise.workers.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.runtime.output import OutputDelta


def take(deltas: Iterable[OutputDelta], show: bool) -> tuple[str, OutputDelta]:
    """The text of a stream of one sample, shown as it comes, and its last increment."""
    text = ""
    for delta in deltas:
        text += delta.text or ""
        if show:
            write(delta.text or "")
    if show:
        write("\n")
    return text, delta


def raise_if_failed(finish_reason: str | None, error: str | None) -> None:
    """
    Raises:
        HeadwiseError: the request failed.
    """
    if finish_reason == "error":
        raise HeadwiseError(error or "the request failed")


def write(text: str) -> None:
    """To stdout at once; characters that its encoding has not as Python writes them: ``\\xe9``."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError as error:
        sys.stdout.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    sys.stdout.flush()


def print_json(value: Any) -> None:
    try:
        print(json.dumps(value, ensure_ascii=False, default=str))
    except UnicodeEncodeError:  # another encoding's terminal, or a file's name that is no text
        print(json.dumps(value, default=str))
