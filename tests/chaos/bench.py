"""An engine with failpoints, what it answers undisturbed, and the check that a fault changes nothing of that."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from headwise.runtime import LLM, SamplingParams, StructuredOutputsParams
from headwise.runtime.chaos.books import check_engine
from headwise.runtime.chaos.workload import SCHEMA
from headwise.runtime.output import CompletionOutput
from headwise.workers import failpoints
from headwise.workers.failpoints import Action, Fault, Point
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint

DEADLINE_S = 60.0
STEP_TIMEOUT_S = 3.0

PROMPTS = [[3 + (7 * i + j) % 200 for j in range(length)] for i, length in enumerate((40, 5, 64, 33, 18, 70))]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, max_tokens=32, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=6, top_p=0.9, max_tokens=24, n=2, frequency_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(json=SCHEMA)),
    SamplingParams(temperature=1.2, seed=7, max_tokens=40, structured_outputs=StructuredOutputsParams(json=SCHEMA)),
]

Answers = list[list[tuple[list[int], str | None, Any]]]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def speaking_model(directory: Path) -> Path:
    """A small random model with a tokenizer of bytes."""
    write_byte_tokenizer(write_checkpoint(directory, 8, 4, vocab_size=VOCAB))
    return directory


class ChaosBench:
    """
    Attributes:
        folder: of the failpoints.
    """

    def __init__(self, llm: LLM, folder: Path) -> None:
        self.llm, self.folder = llm, folder
        self._numbers = itertools.count()
        self.answers = self.ask()

    def ask(self) -> Answers:
        """All questions at once, computed anew."""
        outputs = self.llm.generate(PROMPTS, PARAMS, cache_salt=f"{next(self._numbers)}", use_tqdm=False)
        assert [output.error for output in outputs] == [None] * len(PROMPTS)
        return [[_answer(one) for one in output.outputs] for output in outputs]

    def stream(self) -> tuple[list[int], list[int]]:
        """The first question's tokens, as they come; and what they had to be."""
        salt = f"{next(self._numbers)}"
        tokens = [t for delta in self.llm.stream(PROMPTS[0], PARAMS[0], cache_salt=salt) for t in delta.token_ids]
        return tokens, self.answers[0][0][0]

    def survives(self, act: Callable[[], None], recovers: bool = True) -> None:
        """Asks while something is done to the engine: the answers are as always, and so are the books after it."""
        before = self.recoveries
        act()
        assert self.ask_until(lambda: not failpoints.armed(self.folder) and self.recoveries >= before + recovers)
        assert check_engine(self.llm, DEADLINE_S) == []

    def ask_until(self, done: Callable[[], bool]) -> bool:
        """Asks again and again, by streams and in whole."""
        deadline = time.monotonic() + DEADLINE_S
        streamed: list[tuple[list[int], list[int]]] = []
        while True:
            stream = threading.Thread(target=lambda: streamed.append(self.stream()))
            stream.start()
            assert self.ask() == self.answers
            stream.join(DEADLINE_S)
            got, want = streamed[-1]
            assert got == want
            if done():
                return True
            assert time.monotonic() < deadline, failpoints.armed(self.folder)

    def arm(self, point: Point, action: Action, rank: int | None = None, **more: Any) -> None:
        failpoints.arm(self.folder, point, Fault(action, **more), rank)

    def kill(self, *ranks: int) -> None:
        pids = self.llm.stats()["shard_pids"]
        for rank in ranks:
            psutil.Process(pids[rank]).kill()

    @property
    def recoveries(self) -> int:
        count: int = self.llm._loop.engine.recoveries()["count"]
        return count


@contextmanager
def failpoint_folder(parent: Path) -> Iterator[Path]:
    """Failpoints are on, and off again."""
    folder = parent / "failpoints"
    folder.mkdir(mode=0o700)
    failpoints.use(folder)
    try:
        yield folder
    finally:
        failpoints.leave()


def _answer(output: CompletionOutput) -> tuple[list[int], str | None, Any]:
    return output.token_ids, output.text, output.finish_reason
