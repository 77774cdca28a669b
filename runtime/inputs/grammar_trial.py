"""``python -m headwise.runtime.inputs.grammar_trial``: compiles strangers' grammars where nothing can be broken.

A grammar of a few hundred bytes can overflow the compiler's stack, which ends its process, or take minutes and
gigabytes (``{"multipleOf": 9000001}``). Here each is compiled in a process of its own, forked from one that has the
tokenizer, with little stack, memory and time. What passes has the same limits on the shards, and so compiles there too.

Frames go in and out: a 4-byte little-endian length, then JSON. In goes one of the fields of StructuredOutputsParams;
out comes ``{"grammar": …}``, for the shards, ``{"error": …}``, or ``{"starved": …}`` where the host and not the grammar
is to blame. The first one out is ``{}`` if there is a tokenizer.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from headwise.runtime.inputs.grammar_forms import convert
from headwise.workers.sampling.grammar import GrammarError, allowed, compile_grammar, load_tokenizer, shorten

if TYPE_CHECKING:
    from llguidance import LLTokenizer

CPU_SECONDS, WALL_SECONDS = 0.1, 5.0
"""A schema of 1,000 properties takes 40 ms. The second is for what waits instead of computing, or gets no core."""
MEMORY_BYTES = 64 << 20
"""More than the process has already."""
STACK_BYTES = 1 << 20
"""Less than any thread of a shard has."""

_TOO_MUCH = "is nested too deep, or takes too much memory to compile"

# Comments, strings, regexes and special tokens of Lark.
_LARK_PART = re.compile(r'(?:#|//)[^\n]*|"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])+/|(<[^<>\s]+>)', re.DOTALL)


def read_frame(stream: IO[bytes]) -> str | None:
    """None at the end."""
    header = stream.read(4)
    return stream.read(struct.unpack("<I", header)[0]).decode() if len(header) == 4 else None


def write_frame(stream: IO[bytes], text: str) -> None:
    data = text.encode()
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def try_out(tokenizer: LLTokenizer, vocab_size: int, eos_token_ids: Sequence[int], question: str) -> str:
    """The answer to a frame, found in a process that is ended should it take too much."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            _confine()
            with os.fdopen(write_end, "w") as stream:
                json.dump(_answer(tokenizer, vocab_size, eos_token_ids, question), stream)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        answer = stream.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return answer or json.dumps({"error": "takes too much memory to compile"})
    if os.WTERMSIG(status) == signal.SIGALRM:
        return json.dumps({"starved": f"it got less than {CPU_SECONDS:g} s of a core within {WALL_SECONDS:g} s"})
    if os.WTERMSIG(status) == signal.SIGPROF:
        return json.dumps({"error": f"takes more than {CPU_SECONDS:g} s to compile"})
    return json.dumps({"error": _TOO_MUCH})


def _answer(tokenizer: LLTokenizer, vocab_size: int, eos_token_ids: Sequence[int], question: str) -> dict[str, str]:
    [(kind, value)] = json.loads(question).items()
    try:
        grammar = convert(kind, value)
        matcher = compile_grammar(tokenizer, grammar)
        mask_V = allowed(matcher, vocab_size, eos_token_ids)
        ending = kind == "grammar" and _names_an_end(tokenizer, vocab_size, eos_token_ids, value)
    except (MemoryError, RecursionError):
        return {"error": _TOO_MUCH}
    except BaseException as error:  # a panic of llguidance is no Exception
        return {"error": shorten(str(error)) or f"fails with {type(error).__name__}"}
    if ending:
        return {"error": f"names {ending}, an end of sequence, which ends the output wherever it stands"}
    if problem := matcher.get_error():
        return {"error": shorten(problem)}
    return {"grammar": grammar} if mask_V.any() else {"error": "allows no token of the model's vocabulary"}


def _names_an_end(tokenizer: LLTokenizer, vocab_size: int, eos_token_ids: Sequence[int], text: str) -> str:
    """The first special token in a Lark grammar, as <name> or by id, that is an end of sequence."""
    for name in dict.fromkeys(filter(None, _LARK_PART.findall(text))):
        with suppress(GrammarError):  # in GBNF, which has none
            if allowed(compile_grammar(tokenizer, f"start: {name}"), vocab_size)[list(eos_token_ids)].any():
                return shorten(name)
    return ""


def _confine() -> None:
    """In the child: what it may use; more ends it by a signal."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    limits = ((resource.RLIMIT_AS, memory), (resource.RLIMIT_STACK, STACK_BYTES), (resource.RLIMIT_CORE, 0))
    for which, limit in limits:
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)


def main(model_dir: str, vocab_size: str, eos_token_ids: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipe when it is time
    for ending in (signal.SIGPROF, signal.SIGALRM):  # a trial, even where the parent ignores or blocks them
        signal.signal(ending, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {ending})
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    ends = [int(i) for i in eos_token_ids.split(",")]
    try:
        tokenizer = load_tokenizer(Path(model_dir), int(vocab_size), ends)
    except (OSError, ValueError) as error:
        write_frame(stdout, json.dumps({"error": f"the model's tokenizer.json is of no use: {shorten(str(error))}"}))
        return
    write_frame(stdout, "{}")
    while (question := read_frame(stdin)) is not None:
        write_frame(stdout, try_out(tokenizer, int(vocab_size), ends, question))


if __name__ == "__main__":
    main(*sys.argv[1:])
