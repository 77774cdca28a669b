"""The parts by name, each within its budget of time."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import triton

from gpu_parts import attention, ceilings, copies, kernels, model, peer
from gpu_parts.cases import Case, OutOfTimeError
from gpu_parts.device import Device
from gpu_parts.served import Served
from gpu_parts.sizes import FULL, TINY, Sizes

BUDGETS_S = {
    "ceilings": 30,
    "decode": 120,
    "prefill": 40,
    "attention": 40,
    "copies": 20,
    "kernels": 130,
    "transformers": 160,
}
"""After so many seconds on a GPU a part is ended. Together they are less than ten minutes."""
_CPU_TIMES_AS_LONG = 10
"""Who waits for the interpreter has no GPU to give back."""


def measure(tiny: bool, names: Sequence[str]) -> dict[str, Any]:
    """What comes of the parts of these names, by part.

    `errors` has the parts that failed, `warnings` what headwise warned of, such as steps that are no graphs, and
    `seconds` how long each part took.
    """
    device = Device(torch.device("cpu" if tiny else "cuda:0"))
    parts = _Parts(device, TINY if tiny else FULL)
    results = parts.results
    with device.here(), _warnings_into(results["warnings"]):
        for name in names:
            started = time.monotonic()
            try:
                with _ended_after(parts.budget_s(name)):
                    for found in parts.run(name):
                        if isinstance(results[name], list):
                            results[name].append(found)
                        else:
                            results[name] |= found
            except (Exception, OutOfTimeError) as error:  # whatever it is, it must not cost the other parts
                traceback.print_exc()
                results["errors"][name] = f"{type(error).__name__}: {error}"[:500]
            results["seconds"][name] = time.monotonic() - started
            print(json.dumps({name: results[name], "seconds": results["seconds"][name]}), file=sys.stderr, flush=True)
    return results


class _Parts:
    def __init__(self, device: Device, sizes: Sizes) -> None:
        self._device, self._sizes = device, sizes
        self.results: dict[str, Any] = {
            **{"benchmark": "gpu", "device": device.name, "measured": device.is_gpu},
            **{"torch": torch.__version__, "triton": triton.__version__},
            **{"ceilings": {}, "decode": [], "prefill": [], "attention": [], "copies": {}, "kernels": []},
            **{"transformers": {}, "goals": [], "errors": {}, "warnings": [], "seconds": {}},
        }

    def budget_s(self, name: str) -> int:
        return BUDGETS_S[name] * (1 if self._device.is_gpu else _CPU_TIMES_AS_LONG)

    @cached_property
    def _served(self) -> Served:
        return Served(self._device, self._sizes)

    def run(self, name: str) -> Iterator[Case]:
        """What comes of a part: cases for a list, and else pieces of its result."""
        limits = self.results["ceilings"]
        match name:
            case "ceilings":
                return ceilings.measure(self._device, self._sizes)
            case "decode":
                return model.decodes(self._served, limits)
            case "prefill":
                return model.prefills(self._served, limits)
            case "attention":
                return attention.measure(self._served, limits)
            case "copies":
                return copies.measure(self._served, limits)
            case "kernels":
                return kernels.measure(self._device, self._sizes, time.monotonic() + 0.8 * self.budget_s(name))
            case _:
                return peer.measure(self._served, self._decoded())

    def _decoded(self) -> float | None:
        """Our tokens a second in the case that transformers is measured in."""
        rows, prompt, _ = self._sizes.peer
        found = [case for case in self.results["decode"] if (case["rows"], case["context"]) == (rows, prompt)]
        return found[0].get("tokens_per_s") if found else None


@contextmanager
def _warnings_into(found: list[str]) -> Iterator[None]:
    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, keep = logging.getLogger("headwise"), Keep(logging.WARNING)
    logger.addHandler(keep)
    try:
        yield
    finally:
        logger.removeHandler(keep)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in here after so many seconds, once Python has its turn."""

    def end(*_: object) -> None:
        raise OutOfTimeError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
