"""Steps of the whole model: decodes, prompts, and how often the host waits in a step."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from gpu_parts.cases import Case, each
from gpu_parts.device import GB
from gpu_parts.served import Served


def decodes(served: Served, ceilings: dict[str, float]) -> Iterator[Case]:
    """Each against the bandwidth of a copy; one that the memory has no room for is left out, and says so."""

    def decode(rows: int, context: int) -> Case:
        if not served.fits(rows, context):
            return {"left_out": "no memory for so many keys and values"}
        steps = served.decode(rows, context)
        in_launch, in_finish = served.waits_of_a_decode(rows, context)
        rate = served.bytes_of_a_decode(rows, steps.context_tokens) / steps.wall / GB
        return {
            "wall_ms": steps.wall * 1e3,
            "device_ms": steps.device * 1e3,
            "launch_ms": steps.launch * 1e3,
            "tokens_per_s": rows / steps.wall,
            "gb_per_s": rate,
            "of_copy": rate / ceilings["copy_gb_per_s"],
            "overhead": 1 - steps.device / steps.wall,
            "waits_in_launch": in_launch,
            "waits_in_finish": in_finish,
        }

    return each(({"rows": case[0], "context": case[1]}, partial(decode, *case)) for case in served.sizes.decodes)


def prefills(served: Served, ceilings: dict[str, float]) -> Iterator[Case]:
    """Each prompt against the speed of matrix products, causal attention counted as what it must compute."""

    def prefill(tokens: int, chunk: int) -> Case:
        served.prefill(tokens, chunk)
        seconds = statistics.median(served.prefill(tokens, chunk) for _ in range(served.sizes.repeats))
        rate = served.flop_of_a_prefill(tokens) / seconds / 1e12
        return {
            "wall_ms": seconds * 1e3,
            "tokens_per_s": tokens / seconds,
            "tflop_per_s": rate,
            "of_matmul": rate / ceilings["matmul_tflop_per_s"],
        }

    return each(({"tokens": case[0], "chunk": case[1]}, partial(prefill, *case)) for case in served.sizes.prefills)
