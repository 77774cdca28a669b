"""``headwise generate --input … --output …``: a file of prompts, and the answers in another file."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from headwise.runtime.cli.printing import print_json

if TYPE_CHECKING:
    from headwise.runtime.batch.answering import Answerer
    from headwise.runtime.batch.run import Batch
    from headwise.runtime.sampling_params import SamplingParams

_DEFAULTS = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "structured_outputs")
"""The sampling parameters that the command has flags for."""


def run_batch(
    source: Path, target: Path, params: SamplingParams, answer: Callable[[Batch], None], as_json: bool
) -> NoReturn:
    """Answers each line of ``source`` that has no answer in ``target`` yet, and ends the program.

    Args:
        params: of lines of our own form that do not say otherwise.
        answer: runs the batch; called if there is something left to answer.
        as_json: print a summary as JSON on stdout.

    Raises:
        InvalidValueError: a file cannot be used.
        OutputBusyError: another job writes ``target``.
        HeadwiseError: nothing more can be answered. What is done is in ``target``.
    """
    from headwise.runtime.batch.output import Output
    from headwise.runtime.batch.run import Batch, check_files

    check_files(source, target)
    defaults = {name: getattr(params, name) for name in _DEFAULTS}
    form = params.structured_outputs
    context = json.dumps(defaults | {"structured_outputs": form and form.given}, sort_keys=True).encode()
    with Output(target) as output:
        batch = Batch(source, output, defaults, context)
        summary = batch.summary
        if not batch.is_done:
            try:
                with _terminable():
                    answer(batch)
            except BaseException:
                _say(f"{summary.text()}; the same command goes on from there")
                raise
    _say(f"{summary.text()}; the answers are in {target.absolute()}")
    if as_json:
        print_json({"input": str(source.absolute()), "output": str(target.absolute())} | asdict(summary))
    sys.exit(1 if summary.failed else 0)


def answer_here(batch: Batch, model: str, settings: dict[str, Any]) -> None:
    """By a model that is loaded here."""
    from headwise.runtime.aio import AsyncLLM
    from headwise.runtime.batch.answering import EngineAnswerer
    from headwise.runtime.batch.run import MAX_IN_FLIGHT
    from headwise.runtime.config import engine_config
    from headwise.runtime.sampling_params import MAX_N

    # Every line in flight may have so many samples, each of which waits as a request.
    llm = AsyncLLM(engine_config(model=model, **settings), max_queued_requests=MAX_IN_FLIGHT * MAX_N)
    try:
        with _terminable():  # again: Ray has a handler of its own since it was joined
            asyncio.run(_run(batch, EngineAnswerer(llm, Path(model).resolve().name)))
    finally:
        llm.shutdown()


def answer_by_server(batch: Batch, server: str, **options: Any) -> None:
    """
    Args:
        options: of the client.
    """
    from headwise.runtime.batch.answering import ServerAnswerer
    from headwise.runtime.client import AsyncClient

    async def ask() -> None:
        async with AsyncClient(server, **options) as client:
            await _run(batch, await ServerAnswerer.connect(client))

    asyncio.run(ask())


async def _run(batch: Batch, answerer: Answerer) -> None:
    from headwise.runtime.batch.showing import show

    await batch.run(answerer, _say, lambda: show(batch.summary))


def _say(text: str) -> None:
    print(f"headwise: {text}", file=sys.stderr, flush=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, by which Ray stops a job, ends it as Ctrl-C does: what is done is kept."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
