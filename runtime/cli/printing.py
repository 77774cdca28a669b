"""What commands print: text as it comes, JSON, and the error of a request that failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from headwise.workers.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.runtime.llm import OutputDelta


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
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))
