"""What structured outputs cost: the throughput of rows with a grammar over that of rows without, in one sitting.

    python benchmarks/structured_outputs.py [--model smollm2] [--batches 1,8,32] [--tokens 96] [--repeats 3]

Greedy, 16 random prompt tokens, one rank in this process, the forms in turns. The schema and the regex are such that
no output ends before its last token. "sampled" has no grammar, but like rows with one it cannot take the argmax that
each rank makes of its own slice of the vocabulary. Prints a table and, as its last line, the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from headwise.runtime import LLM, SamplingParams, StructuredOutputsParams
from headwise.runtime.bench.workload import prompts
from headwise.workers.machine import usable_cores

FIELDS = {f"field{i}": {"type": "string", "minLength": 50, "maxLength": 99} for i in range(40)}
SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS), "additionalProperties": False}


def forms(tokens: int) -> dict[str, SamplingParams]:
    plain = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    bounded = SamplingParams(temperature=0, max_tokens=tokens)
    return {
        "plain": plain,
        "sampled": plain.clone(logit_bias={0: -100}),
        "json": bounded.clone(structured_outputs=StructuredOutputsParams(json=SCHEMA)),
        "regex": bounded.clone(structured_outputs=StructuredOutputsParams(regex="[a-z ]{5000,}")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    with LLM(arguments.model, executor="local", max_model_len=1024, enable_prefix_caching=False, quiet=True) as llm:
        results = measure(llm, batches, forms(arguments.tokens), arguments.tokens, arguments.repeats)
    table = Table("batch", "form", "tokens a second", "over plain", title="structured outputs")
    for r in results:
        table.add_row(str(r["batch"]), str(r["form"]), f"{r['tok_s']:.1f}", f"{r['over_plain']:.2f}")
    Console().print(table)
    machine = {"cores": usable_cores(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "structured_outputs", "results": results, **machine}))


def measure(
    llm: LLM, batches: list[int], params: dict[str, SamplingParams], tokens: int, repeats: int
) -> list[dict[str, float | str]]:
    """Medians of the repeats; a round before them is not counted, since it compiles the grammars."""
    results: list[dict[str, float | str]] = []
    with tqdm(total=len(batches) * (repeats + 1), unit="round", file=sys.stderr) as bar:
        for batch in batches:
            rates: dict[str, list[float]] = {form: [] for form in params}
            for _ in range(repeats + 1):
                for form, param in params.items():
                    started = time.perf_counter()
                    outputs = llm.generate(prompts(batch, 16, 49_152), param, use_tqdm=False)
                    assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
                    rates[form].append(batch * tokens / (time.perf_counter() - started))
                bar.update()
            medians = {form: statistics.median(rate[1:]) for form, rate in rates.items()}
            results += [
                {"batch": batch, "form": form, "tok_s": round(rate, 1), "over_plain": round(rate / medians["plain"], 3)}
                for form, rate in medians.items()
            ]
    return results


if __name__ == "__main__":
    main()
