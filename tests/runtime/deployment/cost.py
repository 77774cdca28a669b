"""What the front of a deployment costs: microseconds of processor time, with so many streams on two replicas.

Run: python -m tests.runtime.deployment.cost [STREAMS] [TOKENS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

from headwise.runtime.deployment.messages import Output, RequestDelta, decode_replica, encode
from headwise.runtime.engine.request import Request
from headwise.runtime.kv.identity import KvIdentity
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling
from tests.runtime.deployment.script import BLOCK, Script

PROMPT = 512


def cost(streams: int, tokens: int) -> tuple[float, float, float]:
    """Microseconds: to route a request and write the message; to read a token's message; to hand the token out."""
    script = Script.serving(2)
    deployment, identity = script.deployment, KvIdentity("model", "float32", BLOCK)
    requests = []
    for number in range(streams):
        prompt = [number, *range(PROMPT - 1)]
        request = Request(f"r{number}", prompt, SamplingParams(max_tokens=tokens), RowSampling(), tokens)
        request.token_blocks = identity.token_blocks(prompt)
        requests.append(request)

    def route() -> None:
        for request in requests:
            deployment.add(request, None, lambda deltas: None)
        for instruction in deployment.out:
            encode(instruction.message)  # type: ignore[union-attr]

    routing = timed(route) / streams
    sent = [(instruction.replica, instruction.message.number) for instruction in deployment.out]  # type: ignore[union-attr]
    deployment.out.clear()
    reading, handing = list[float](), list[float]()
    for token in range(tokens):
        for name in {name for name, _ in sent}:
            numbers = [number for at, number in sent if at == name]
            data = encode(Output([RequestDelta(number, [token]) for number in numbers]))
            got: list[Output] = []
            reading.append(timed(lambda: got.append(decode_replica(data))) / len(numbers))  # type: ignore[arg-type] # noqa: B023

            def hand() -> None:
                deployment.heard(name, got[0])  # noqa: B023
                for sink, deltas in deployment.take_deltas().items():
                    sink(deltas)

            handing.append(timed(hand) / len(numbers))
    assert deployment.num_waiting == 0 and deployment.status()["routing"]["requests"] == 0
    return routing, median(reading), median(handing)


def timed(function: Callable[[], object]) -> float:
    started = time.thread_time_ns()
    function()
    return (time.thread_time_ns() - started) / 1000


if __name__ == "__main__":
    streams, tokens = (int(one) for one in (sys.argv[1:] + ["64", "200"][len(sys.argv) - 1 :]))
    runs = [cost(streams, tokens) for _ in range(5)]
    for name, values in zip(
        ("route and send a request", "read a token", "hand a token out"), zip(*runs, strict=True), strict=True
    ):
        print(f"{name}: {median(values):.2f} µs")
