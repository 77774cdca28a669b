"""An answerer without a model, and what its answers look like in the output."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwise.runtime.batch.answering import Answerer
from headwise.runtime.batch.output import Output
from headwise.runtime.batch.question import Answer, Question, Sample
from headwise.runtime.batch.run import Batch, Summary


class Echo(Answerer):
    """Answers with the prompt.

    Attributes:
        asked: the numbers of the lines that were asked.
        most: of them at the same time.
    """

    model = "echo"

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        """Args: ``before``: is called with a line's number before its answer; what it raises comes of the line."""
        super().__init__()
        self.asked: list[int] = []
        self.most = self._now = 0
        self._before = before

    async def _answer(self, question: Question, number: int) -> Answer:
        self.asked.append(number)
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._now -= 1
        self._before(number)
        text = question.prompt if isinstance(question.prompt, str) else json.dumps(question.prompt)
        lines = range(question.params.n)
        logprobs = [] if question.params.logprobs is None else [(-0.5, 1, [(7, -0.5), (8, -1.0)])]
        return Answer(self.model, [Sample(i, text, [7], list(logprobs), "stop") for i in lines], 3, 1)

    async def _decode(self, token: int) -> str:
        return f"<{token}>"


def run(
    source: Path, target: Path, answerer: Answerer, defaults: dict[str, Any] | None = None, context: bytes = b""
) -> tuple[Summary, list[str]]:
    """Its summary, and its warnings."""
    warnings: list[str] = []
    with Output(target) as output:
        batch = Batch(source, output, defaults or {}, context)
        asyncio.run(batch.run(answerer, warnings.append))
    return batch.summary, warnings


def write(path: Path, *lines: object) -> Path:
    """Each line as JSON, but bytes as they are."""
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def answers(path: Path) -> dict[int, dict[str, Any]]:
    """By the number of the line that they are to; each once."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    by_line = {int(one["id"].split("_")[2]): one for one in found}
    assert len(by_line) == len(found)
    return by_line
