"""A batch from its first line to its last: many questions at the same time, each answer written as it comes."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.runtime.batch.answering import Answerer
from headwise.runtime.batch.lines import Line, read_lines
from headwise.runtime.batch.output import Output
from headwise.runtime.batch.parse import Parsed, custom_id_of, parse
from headwise.runtime.batch.question import Answer, LineError
from headwise.runtime.batch.render import render
from headwise.workers.errors import InvalidValueError

MAX_IN_FLIGHT = 256
"""Questions at the same time: twice the requests that an engine computes by default, so that one waits for each that
ends. No more lines than these, and their answers, are in memory."""

MAX_BYTES_IN_FLIGHT = 128 << 20
"""Of their lines, unless one alone is longer. What is made of a line may take some ten times as much."""
_TURN = 256
"""So many lines are read before others, such as whoever waits for Ctrl-C, have their turn."""

Warn = Callable[[str], None]
Show = Callable[[], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Summary:
    """What a batch has done so far.

    Attributes:
        lines: of the input, blank ones not counted.
        before: lines that had their answer before.
        done: lines that have their answer now, those from before included.
        failed: those of them that could not be answered.
        prompt_tokens, completion_tokens: of the answers of this run.
        seconds: of this run.
    """

    lines: int
    before: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def text(self) -> str:
        rate = self.completion_tokens / self.seconds if self.seconds else 0.0
        before = f", {self.before} of them before" if self.before else ""
        failed = f"; {self.failed} could not be answered" if self.failed else ""
        return f"{self.done} of {self.lines} lines done{before}{failed}; {rate:.0f} tokens/s"


class Batch:
    """One input and its output.

    Attributes:
        summary: is kept up to date while the batch runs.
    """

    def __init__(self, source: Path, output: Output, defaults: Mapping[str, Any], context: bytes = b"") -> None:
        """Reads the input once, to see what there is to do.

        Args:
            defaults: the sampling parameters of a line of our own form that names none.
            context: what the answers depend on beside their lines.

        Raises:
            InvalidValueError: the input cannot be read, or is not what the output's answers are to.
        """
        self._source, self._output, self._defaults, self._context = source, output, defaults, context
        count = before = last = 0
        seen = hashlib.sha256()
        for line in read_lines(source, context):
            before += output.check(line)
            count, last = count + 1, line.number
            seen.update(line.id.encode())
        output.check_length(last)
        self._last, self._seen = last, seen.digest()
        self.summary = Summary(count, before, before, output.num_failed)
        self._names: dict[int, int] = {}  # custom_id's hash: the line that has it
        self._told: set[str] = set()

    @property
    def is_done(self) -> bool:
        """Whether every line has its answer."""
        return self.summary.done == self.summary.lines

    async def run(
        self, answerer: Answerer, warn: Warn, shown: Callable[[], Coroutine[Any, Any, None]] | None = None
    ) -> None:
        """Answers every line that has no answer yet.

        Args:
            warn: is told what a user should know.
            shown: runs beside it, to show how far it is.

        Raises:
            InvalidValueError: another model gave the answers that are there, or the input changed meanwhile.
            HeadwiseError: nothing more can be answered, or written. What is done is in the output.
        """
        self._output.check_model(answerer.model)
        showing = asyncio.create_task(shown()) if shown is not None else None
        started = time.monotonic()
        slots, held, freed = asyncio.Semaphore(MAX_IN_FLIGHT), 0, asyncio.Event()

        async def one(line: Line, parsed: Parsed) -> None:
            nonlocal held
            try:
                await self._one(line, parsed, answerer)
            finally:
                held -= len(line.data)
                freed.set()
                slots.release()
                self.summary.seconds = time.monotonic() - started

        try:
            async with asyncio.TaskGroup() as group:
                for work in self._waiting(answerer.model, warn):
                    if work is None:
                        await asyncio.sleep(0)
                        continue
                    line, parsed = work
                    await slots.acquire()
                    while held and held + len(line.data) > MAX_BYTES_IN_FLIGHT:
                        freed.clear()
                        await freed.wait()
                    held += len(line.data)
                    group.create_task(one(line, parsed))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            if showing is not None:
                showing.cancel()

    def _waiting(self, model: str, warn: Warn) -> Iterator[tuple[Line, Parsed] | None]:
        """The lines that have no answer yet; now and then None, for others to have their turn.

        Raises:
            InvalidValueError: the input is not the one that was read first.
        """
        seen = hashlib.sha256()
        for line in read_lines(self._source, self._context):
            if line.number > self._last:  # added since
                break
            seen.update(line.id.encode())
            if line.number % _TURN == 0:
                yield None
            if self._output.check(line):
                self._has_name(line, custom_id_of(line))
                continue
            parsed = parse(line, self._defaults)
            name = parsed.custom_id
            if (first := self._has_name(line, name)) != line.number:
                said = f"custom_id={(name or '')[:80]!r}: line {first} has it too; give each line its own"
                parsed.question, parsed.error = None, LineError("invalid_value", said, "custom_id")
            asked = parsed.question.model if parsed.question is not None else ""
            if asked and asked != model and asked not in self._told and len(self._told) < 10:
                self._told.add(asked)
                warn(f"line {line.number} asks for the model {asked[:80]}; {model} answers")
            yield line, parsed
        if seen.digest() != self._seen:
            limit = "was changed while it was read"
            fix = "run the same command again, which says if the answers so far are not to its lines"
            raise InvalidValueError("--input", str(self._source.absolute()), limit, fix)

    def _has_name(self, line: Line, name: str | None) -> int:
        """The first line with that name, which has to be the only one."""
        return line.number if name is None else self._names.setdefault(hash(name), line.number)

    async def _one(self, line: Line, parsed: Parsed, answerer: Answerer) -> None:
        result: Answer | LineError
        if parsed.question is None:
            assert parsed.error is not None
            result = parsed.error
        else:
            try:
                result = await answerer.answer(parsed.question, line.number)
            except LineError as error:
                # A traceback holds this call, and so the line, until the garbage is collected.
                result = error.with_traceback(None)
        self._output.append(render(line, parsed, result, int(time.time())))
        summary = self.summary
        summary.done += 1
        if isinstance(result, Answer):
            summary.failed += bool(result.error)
            summary.prompt_tokens += result.prompt_tokens
            summary.completion_tokens += result.completion_tokens
        else:
            summary.failed += 1


def check_files(source: Path, output: Path) -> None:
    """
    Raises:
        InvalidValueError: there is no input, or the output is the same file.
    """
    for flag, path in (("--input", source), ("--output", output)):
        try:
            there = path.is_file()
        except OSError as error:  # a name that is too long, or a folder that is closed to this user
            raise InvalidValueError(flag, str(path.absolute()), f"cannot be used: {error.strerror}") from None
        if not there and path is source:
            raise InvalidValueError(flag, str(path.absolute()), "there is no such file")
        if there and path is output and source.samefile(output):
            raise InvalidValueError(flag, str(path.absolute()), "is the input", "give another file")
