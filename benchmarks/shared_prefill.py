"""What requests that share a prompt wait for the one that computes it.

Blocks are shared once they are verified: once the request that computes them has its first token. So the others wait
for the last step of its prompt to be done, the part of it that they do not share included. Here 16 requests share
1,024 tokens, and each has a tail of its own; what is read is the time to first token of the 15 that wait, by the length
of the first one's tail.

    python benchmarks/shared_prefill.py --model smollm2 --tails 16 512 2048
"""

from __future__ import annotations

import argparse
import json
import random
import statistics

from headwise.runtime import LLM, SamplingParams

REQUESTS, SHARED, TAIL = 16, 1024, 16


def waiters_ttft_ms(llm: LLM, chance: random.Random, first_tail: int) -> float:
    """Median time to first token, in milliseconds, of the requests that wait."""
    vocabulary = 1000
    shared = [chance.randrange(vocabulary) for _ in range(SHARED)]
    prompts = [
        shared + [chance.randrange(vocabulary) for _ in range(TAIL if index else first_tail)]
        for index in range(REQUESTS)
    ]
    llm.reset_prefix_cache()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True), use_tqdm=False)
    assert all(output.num_cached_tokens == SHARED for output in outputs[1:])
    return 1000 * statistics.median(output.metrics.time_to_first_token for output in outputs[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tails", type=int, nargs="+", default=[16, 512, 2048], help="tokens of the first one's tail")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    chance = random.Random(0)
    with LLM(options.model, executor="local", max_model_len=4096, quiet=True) as llm:
        waiters_ttft_ms(llm, chance, TAIL)
        for tail in options.tails:
            read = [waiters_ttft_ms(llm, chance, tail) for _ in range(options.repeats)]
            print(json.dumps({"first_tail": tail, "ttft_ms": round(statistics.median(read), 1), "all": read}))


if __name__ == "__main__":
    main()
