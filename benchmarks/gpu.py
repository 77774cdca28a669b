"""Serving's steps on a GPU against what the GPU can do, and the numbers of its kernels; less than ten minutes.

    python benchmarks/gpu.py [--only PART ...]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny      # every part on a CPU; its times mean nothing

It needs torch, triton, transformers, msgpack, numba, safetensors and NumPy, and nothing else of what headwise depends
on, so a machine with those and a checkout will do:

    mkdir -p .typing && ln -sfn .. .typing/headwise && PYTHONPATH=.typing python benchmarks/gpu.py

The model has the shape of Llama 3.1 8B; its random weights are made on the GPU. One rank serves it as with
executor="local": this script takes the place of the engine and hands plans to the rank, two of them in flight. So what
the scheduler costs is not in these times (`headwise bench step` measures it, on any machine).

- ceilings: a copy within the device (bytes read and written), a product of bfloat16 matrices, copies from and to pinned
  host memory. All else is compared with those of the same call.
- decode: wall time from one step's end to the next one's. Bytes are the weights and the keys and values of the context,
  each once. `overhead` is the part of the wall time in which the device does nothing for the step, by its own events;
  `waits` are how often the host waits for the device in a step.
- prefill: from the first launch to the first token.
- attention: the kernel alone, at decode, all layers as one graph.
- transformers: the same weights; its own `generate` with a static cache, compiled where that works.
- copies: KV blocks to host memory (export) and back (import).
- kernels: each against float64.

Prints tables and, as its last line, the same as JSON; progress and each part's JSON go to stderr. A part that fails or
takes longer than it may is in the table of errors, the others are measured, and the exit code is 1. The exit code is 2
where there is no GPU, or no interpreter for --tiny.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys

import torch

PARTS = ("ceilings", "decode", "prefill", "attention", "copies", "kernels", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    arguments = parser.parse_args()
    if why := obstacle(arguments.tiny):
        print(why, file=sys.stderr)
        return 2
    from gpu_parts import parts, report  # they import Triton

    results = parts.measure(arguments.tiny, [part for part in PARTS if part in {"ceilings", *arguments.only}])
    results["goals"] = report.goals(results)
    for line in report.tables(results):
        print(line)
    print(json.dumps(results))
    return 1 if results["errors"] else 0


def obstacle(tiny: bool) -> str:
    """Why nothing can be measured here, and what to do; empty if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.8'"
    if tiny and not interpreted:
        return "--tiny runs in Triton's interpreter: TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny"
    if not tiny and (interpreted or not torch.cuda.is_available()):
        return (
            "no GPU here: run it where there is one, or TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny without one"
        )
    return ""


if __name__ == "__main__":
    sys.exit(main())
