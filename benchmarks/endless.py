"""A stream that never ends: its speed and its memory over tens of thousands of tokens, under a bounded KV policy.

With the sinks and a window, a row keeps as many blocks at the end as when its window was first full, and a token takes
as long. Read are the seconds of every thousand tokens, the blocks in use after each, and the tokens of the rows that
the shard keeps. The ratio is the speed of the last thousand over that of the first after the window was full.

    python benchmarks/endless.py --model smollm2 --kv-policy sinks:4,1020 --tokens 50000
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from headwise.runtime import LLM, SamplingParams
from headwise.workers.kv.policy import resolve_policy

STRETCH = 1000
PROMPT = list(range(1, 33))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-policy", default="sinks:4,1020")
    parser.add_argument("--kv-dtype", default=None)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--max-model-len", type=int, default=2048)
    options = parser.parse_args()
    settings = {"kv_policy": options.kv_policy, "kv_dtype": options.kv_dtype, "max_model_len": options.max_model_len}
    with LLM(options.model, executor="local", quiet=True, **settings) as llm:
        seconds, blocks = run(llm, options.tokens)
        span = max(reach.span or 0 for reach in resolve_policy(options.kv_policy, 1, 1).reaches)
        first = -(-span // STRETCH)  # the first stretch that begins with a full window
        report = {
            "bench": "endless",
            "model": options.model,
            "kv_policy": options.kv_policy,
            "tokens": len(seconds) * STRETCH,
            "first_full_tok_s": round(STRETCH / seconds[first], 2),
            "last_tok_s": round(STRETCH / seconds[-1], 2),
            "ratio": round(seconds[first] / seconds[-1], 3),
            "blocks": blocks,
            "tok_s": [round(STRETCH / one, 2) for one in seconds],
        }
    print(json.dumps(report))


def run(llm: LLM, tokens: int) -> tuple[list[float], list[int]]:
    """Seconds of each thousand tokens, and the blocks in use after it."""
    # One more than is read, so that the blocks are still in use at the last count.
    params = SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)
    seconds: list[float] = []
    blocks: list[int] = []
    seen, began = 0, time.monotonic()
    for delta in llm.stream(PROMPT, params):
        seen += len(delta.token_ids)
        if seen < STRETCH * (len(seconds) + 1):
            continue
        now = time.monotonic()
        seconds.append(now - began)
        stats = llm.stats()
        blocks.append(stats["num_blocks"] - stats["num_free_blocks"])
        print(f"{seen:,} tokens: {STRETCH / seconds[-1]:.1f} tok/s, {blocks[-1]} blocks", file=sys.stderr)
        if seen >= tokens:
            break
        began = time.monotonic()
    return seconds, blocks


if __name__ == "__main__":
    main()
