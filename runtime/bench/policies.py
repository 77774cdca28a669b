"""``headwise bench policies``: what KV policies, and forms of keys and values, cost in quality and save in memory."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headwise.runtime.bench import figures, kv_errors, perplexity, policy_pictures, report
from headwise.runtime.bench.kv_errors import KvError
from headwise.runtime.bench.perplexity import DECODED, Reading
from headwise.runtime.bench.scorer import BLOCK_SIZE, ScoredModel, policy_of
from headwise.runtime.inputs.text_file import tokens_of_file
from headwise.runtime.models import resolve
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import kv_format
from headwise.workers.model.model_config import ModelConfig, load_model_config

KV_ERROR_TOKENS = 2048
"""Of the text, at most: what the errors of kv_dtypes are measured on."""

_RECOMPUTE = re.compile(r"recompute:([1-9]\d{0,8})")


@dataclass(frozen=True, slots=True)
class Load:
    """What is read.

    Attributes:
        policies: those of an engine, and ``recompute:L``: each position from the last L tokens alone.
        tokens: of the text; a policy that keeps everything reads no more than the model's length.
        stretches: of the text, whose perplexities are told one by one.
        samples: positions in each stretch at which ``recompute:L`` is read, as every one of them takes L tokens.
        kv_dtypes: whose errors are measured.
        prompts: pieces of the text that are continued for this.
    """

    policies: tuple[str, ...]
    tokens: int
    stretches: int
    samples: int
    kv_dtypes: tuple[str, ...]
    prompts: int

    @property
    def stretch(self) -> int:
        """Tokens of each but the last, which may have fewer."""
        return -(-self.tokens // self.stretches)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        starts = range(0, self.tokens, self.stretch)
        return [(start, min(start + self.stretch, self.tokens)) for start in starts]

    @property
    def sampled(self) -> list[int]:
        """The positions at which ``recompute:L`` is read: in the middles of equal parts of each stretch."""
        return [
            max(1, start + (stop - start) * (2 * index + 1) // (2 * self.samples))
            for start, stop in self.bounds
            for index in range(self.samples)
        ]


def run(
    model: str,
    text: Path,
    load: Load,
    device: str,
    attention: str | None,
    threads: int | None,
    *,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Reads the text under each policy and in each form, and prints what came of it.

    Args:
        device, attention, threads: as of :class:`~headwise.runtime.bench.scorer.ScoredModel`.

    Raises:
        InvalidValueError: a policy or dtype does not go with the model; or the text is too short.
    """
    figures.check_plot(plot)
    path = resolve(model)
    config = load_model_config(path)
    check(load, config)
    token_ids = tokens_of_file(text, path, load.tokens)[: load.tokens]
    scored = ScoredModel(path, device, attention, threads)
    readings = read_policies(scored, load, token_ids)
    errors = read_kv_dtypes(scored, load, token_ids)
    results = [_policy_result(name, load, readings) for name in readings]
    results += [{"kv_dtype": name} | _rounded(error.result()) for name, error in errors.items()]
    results += shapes(config, load.kv_dtypes or (kv_errors.EXACT,))
    tables = policy_pictures.tables(results)
    settings = asdict(load) | {"text": text.name, "device": device, "attention": attention, "threads": threads}
    report.emit("policies", model, settings, results, tables, as_json=as_json)
    if plot is not None:
        policy_pictures.draw(Path(model).name, text.name, results).savefig(plot)


def check(load: Load, config: ModelConfig) -> None:
    """
    Raises:
        InvalidValueError: a policy or dtype does not go with the model, or a stretch is too short to be measured.
    """
    most = config.max_position_embeddings
    if not load.policies:
        raise InvalidValueError("--policies", "", "names no policy", "leave it out, or name one, such as dense")
    for policy in load.policies:
        if not (last := _RECOMPUTE.fullmatch(policy)):
            policy_of(policy, config)
        elif int(last[1]) > most:
            raise InvalidValueError("--policies", policy, f"reads more tokens at once than the model can, {most}")
    for name in load.kv_dtypes:
        kv_format(name, config.head_dim)
    needed = kv_errors.PROMPT_TOKENS + kv_errors.NEW_TOKENS
    if load.kv_dtypes and load.prompts and (load.tokens < kv_errors.PROMPT_TOKENS or most < needed):
        limit = (
            f"takes {kv_errors.PROMPT_TOKENS} tokens of the text for each, of --tokens {load.tokens}, and continues "
        )
        limit += f"them to {needed}, of the model's {most}"
        raise InvalidValueError("--prompts", load.prompts, limit, "raise --tokens, or compare without: --prompts 0")
    if load.stretch <= DECODED:
        limit = f"makes stretches of {load.stretch} tokens, of which {DECODED} are timed; more are needed"
        raise InvalidValueError("--stretches", load.stretches, limit)


def read_policies(model: ScoredModel, load: Load, token_ids: Sequence[int]) -> dict[str, Reading]:
    """By policy."""
    lengths = {policy: _length(policy, load, model.config) for policy in load.policies}
    last = {policy: int(found[1]) for policy in lengths if (found := _RECOMPUTE.fullmatch(policy))}
    total = sum(length for policy, length in lengths.items() if policy not in last)
    total += sum(min(position, most) for most in last.values() for position in load.sampled)
    readings: dict[str, Reading] = {}
    with tqdm(total=total, desc="reading", unit="token", file=sys.stderr) as bar:
        for policy, length in lengths.items():
            if policy in last:
                readings[policy] = perplexity.recompute(
                    model, last[policy], kv_errors.EXACT, token_ids, load.sampled, bar.update
                )
            else:
                readings[policy] = perplexity.read(
                    model, policy, kv_errors.EXACT, token_ids[:length], load.stretch, bar.update
                )
    return readings


def read_kv_dtypes(model: ScoredModel, load: Load, token_ids: Sequence[int]) -> dict[str, KvError]:
    """By kv_dtype."""
    if not load.kv_dtypes:
        return {}
    some = token_ids[: min(KV_ERROR_TOKENS, model.config.max_position_embeddings)]
    total = kv_errors.work(len(load.kv_dtypes), len(some), load.prompts)
    with tqdm(total=total, desc="comparing", unit="token", file=sys.stderr) as bar:
        return kv_errors.kv_errors(model, load.kv_dtypes, some, load.prompts, bar.update)


def shapes(config: ModelConfig, kv_dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Bytes a token that is kept takes, of models that differ from this one in their KV heads only."""
    of_heads = {"MHA": config.num_heads, "GQA": config.num_kv_heads, "MQA": 1}
    if config.num_kv_heads in (1, config.num_heads):
        del of_heads["GQA"]
    return [
        {
            "shape": name,
            "kv_heads": heads,
            "of_this_model": heads == config.num_kv_heads,
            "bytes_per_token": {
                dtype: kv_format(dtype, config.head_dim).block_bytes(BLOCK_SIZE, config.head_dim)
                * config.num_layers
                * heads
                // BLOCK_SIZE
                for dtype in kv_dtypes
            },
        }
        for name, heads in of_heads.items()
    ]


def _length(policy: str, load: Load, config: ModelConfig) -> int:
    """How many tokens of the text a policy reads."""
    if _RECOMPUTE.fullmatch(policy) or policy_of(policy, config).bounded:
        return load.tokens
    return min(load.tokens, config.max_position_embeddings)


def _policy_result(policy: str, load: Load, readings: Mapping[str, Reading]) -> dict[str, Any]:
    reading = readings[policy]
    common = [position for position in load.sampled if all(position in one.losses for one in readings.values())]
    control = _control(policy, readings)
    by = readings[control] if control is not None else None
    return _rounded(
        {
            "policy": policy,
            "read_tokens": len(reading.losses),
            "perplexity": reading.perplexity(range(load.tokens), by),
            "perplexity_of_sample": reading.perplexity(common),
            "sample": len(common),
            "control": control,
            "stretches": [[start, stop, reading.perplexity(range(start, stop), by)] for start, stop in load.bounds],
            "most_kv_bytes": max(reading.kv_bytes.values()),
            "kv_bytes": [*map(list, reading.kv_bytes.items())],
            "token_ms": [*map(list, reading.token_ms.items())],
            "bytes_per_token": reading.bytes_per_token,
        }
    )


def _control(policy: str, readings: Mapping[str, Reading]) -> str | None:
    """For a policy that is read at a sample, the policy that is read everywhere and differs from it the least."""
    if not _RECOMPUTE.fullmatch(policy):
        return None
    others = {name: one for name, one in readings.items() if not _RECOMPUTE.fullmatch(name)}
    best = min(others, key=lambda name: readings[policy].distance(others[name]), default=None)
    return best if best is not None and readings[policy].distance(others[best]) < math.inf else None


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    """The same with six digits of each number that is not whole."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(one) for one in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {name: short(value) for name, value in result.items()}
