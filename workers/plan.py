"""The messages a shard understands, and their msgpack codec.

A request keeps one *row* on every shard: its tokens, its block tables and how it is sampled. A
:class:`StepPlan` is a delta against those rows, so that a steady decode step costs a few bytes a row.

A row has a block table for each group of the KV policy (see :class:`~headwise.workers.kv.policy.KvPolicy`). Group 0,
which is the only one of most policies, has fields of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import msgpack

MAX_MESSAGE_BYTES = 64 << 20
"""The largest message either side accepts; a plan that admits 32 prompts of 100,000 tokens is 16 MiB."""

MAX_ADMIT_BYTES = 32 << 20
"""What the rows a plan admits may take by :func:`admit_bytes`, unless it admits just one; the rest waits a step."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row's next token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.  top_p: 1 is off.  min_p: 0 is off.
        repetition_penalty: over prompt and generated tokens, 1 is off.
        presence_penalty, frequency_penalty: over generated tokens, 0 is off.
        logit_bias: (token id, value added to its logit) pairs.
        num_logprobs: how many of the most likely tokens to report beside the chosen one, 0 to 20; -1 reports nothing.
        min_tokens: until so many tokens are generated, ``stop_token_ids`` cannot be chosen.
        stop_token_ids: the tokens that would end the request, end-of-sequence among them.
        seed: the generator's key; the random number of a token is a function of (seed, position) only.
        grammar: what the output has to match, as :mod:`headwise.workers.sampling.grammar` says; empty is anything.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int = -1
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class RowAdmit:
    """A request takes a row.

    Attributes:
        row: which, in [0, max_num_seqs).
        token_ids: every token known so far: the prompt and, after a preemption, what was generated.
        prompt_len: how many of them are the prompt.
        num_computed: how many of them already have their KV in the row's blocks.
        block_ids: the row's first blocks in group 0, in the order of the text; -1 where the row has none, for no token
            that it has still to compute attends to it.
        other_block_ids: the same of groups 1, 2, ...
    """

    row: int
    token_ids: list[int]
    prompt_len: int
    num_computed: int
    block_ids: list[int]
    sampling: RowSampling
    other_block_ids: tuple[list[int], ...] = ()


@dataclass(slots=True)
class StepPlan:
    """What a shard does in one step, in this order: drop rows, admit rows, append blocks, compute.

    Attributes:
        step: counts up by one from 0 in each group; a shard refuses any other.
        drops: rows that are free again.
        admits: rows that are taken.
        appends: (row, block) pairs; each block becomes the last of its row's block table in group 0.
        computes: (row, number of tokens) pairs: compute so many tokens from the first one without KV. A row whose
            last known token is computed also samples the next one, which is appended to the row on the shard.
        bucket: on a GPU, how many rows the step is padded to, so that one graph serves every batch up to that size, and
            all ranks the same; every compute is of one token then. 0 pads nothing.
        capture: a bucket whose graph is made before the rest of the step, unless it cannot be; 0 makes none.
        group_appends: (group, row, block), the appends of groups 1, 2, ...
    """

    step: int
    drops: list[int] = field(default_factory=list)
    admits: list[RowAdmit] = field(default_factory=list)
    appends: list[tuple[int, int]] = field(default_factory=list)
    computes: list[tuple[int, int]] = field(default_factory=list)
    bucket: int = 0
    capture: int = 0
    group_appends: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the distribution before temperature and truncation.

    Attributes:
        chosen: of the sampled token.  rank: its rank, 1 is the most likely.
        top_ids, top: the most likely tokens, most likely first.
    """

    chosen: float
    rank: int
    top_ids: tuple[int, ...]
    top: tuple[float, ...]


@dataclass(slots=True)
class StepOutput:
    """What came of a step.

    Attributes:
        step: the plan's.
        tokens: (row, sampled token) pairs, in the order of the plan's computes.
        logprobs: by row, for those that asked.
        failed: (row, why) of the rows that have no token.
        verified: of the failed rows, those whose logits were finite, such as rows whose grammar came to no end.
        seconds: wall time of the step on rank 0.
    """

    step: int
    tokens: list[tuple[int, int]] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    failed: list[tuple[int, str]] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    seconds: float = 0.0


def admit_bytes(num_tokens: int, sampling: RowSampling, num_groups: int = 1) -> int:
    """No less than what a row's admission takes in a plan, whatever its block tables."""
    numbers = (1 + num_groups) * (num_tokens + 1) + len(sampling.stop_token_ids) + 3 * len(sampling.logit_bias)
    return 5 * numbers + 4 * len(sampling.grammar) + 256


def encode_plan(plan: StepPlan) -> bytes:
    """The plan as msgpack; pairs are flattened, a run of one-token computes is a list of rows, and a grammar that
    many rows have is there once."""
    grammars: dict[str, int] = {}
    admits = []
    for a in plan.admits:
        *fields, grammar = astuple(a.sampling)
        fields.append(grammars.setdefault(grammar, len(grammars)))
        admits.append((a.row, a.token_ids, a.prompt_len, a.num_computed, [a.block_ids, *a.other_block_ids], fields))
    decodes = [row for row, count in plan.computes if count == 1]
    chunks = [] if len(decodes) == len(plan.computes) else _flatten([c for c in plan.computes if c[1] != 1])
    appends = (_flatten(plan.appends), _flatten(plan.group_appends))
    graphs = (plan.bucket, plan.capture)
    return pack((plan.step, plan.drops, list(grammars), admits, *appends, decodes, chunks, *graphs))


def decode_plan(data: bytes) -> StepPlan:
    """The inverse of :func:`encode_plan`, but for the order of computes: one-token rows come first.

    Raises:
        ValueError: not a plan, or larger than MAX_MESSAGE_BYTES.
    """
    with foreign_is_value_error():
        step, drops, grammars, admits, appends, group_appends, decodes, chunks, bucket, capture = unpack(data)
        rows = [
            RowAdmit(row, tokens, prompt_len, computed, blocks, _sampling(fields, grammars), tuple(others))
            for row, tokens, prompt_len, computed, (blocks, *others), fields in admits
        ]
        computes = [(row, 1) for row in decodes] + _pairs(chunks)
        return StepPlan(step, drops, rows, _pairs(appends), computes, bucket, capture, _triples(group_appends))


def encode_output(output: StepOutput) -> bytes:
    logprobs = [(row, astuple(lp)) for row, lp in output.logprobs.items()]
    return pack((output.step, _flatten(output.tokens), logprobs, output.failed, output.verified, output.seconds))


def decode_output(data: bytes) -> StepOutput:
    """The inverse of :func:`encode_output`.

    Raises:
        ValueError: not an output, or larger than MAX_MESSAGE_BYTES.
    """
    with foreign_is_value_error():
        step, tokens, logprobs, failed, verified, seconds = unpack(data)
        parsed = {
            row: TokenLogprobs(chosen, rank, tuple(ids), tuple(top)) for row, (chosen, rank, ids, top) in logprobs
        }
        return StepOutput(step, _pairs(tokens), parsed, [(row, why) for row, why in failed], verified, seconds)


@contextmanager
def foreign_is_value_error() -> Iterator[None]:
    """Parsing a message of another form than expected raises ValueError, whatever it stumbles over."""
    try:
        yield
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"a message is not of the expected form: {error}") from error


def _sampling(fields: list[Any], grammars: list[str]) -> RowSampling:
    *others, grammar = fields
    sampling = RowSampling(*[*others, grammars[grammar]])
    object.__setattr__(sampling, "logit_bias", tuple((t, b) for t, b in sampling.logit_bias))
    object.__setattr__(sampling, "stop_token_ids", tuple(sampling.stop_token_ids))
    return sampling


def _flatten(tuples: Sequence[tuple[int, ...]]) -> list[int]:
    return [value for each in tuples for value in each]


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _triples(flat: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def pack(message: tuple[Any, ...]) -> bytes:
    """A message as msgpack.

    Raises:
        ValueError: it is larger than MAX_MESSAGE_BYTES.
    """
    data: bytes = msgpack.packb(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return data


def unpack(data: bytes) -> list[Any]:
    """The inverse of :func:`pack`.

    Raises:
        ValueError: no msgpack array, or larger than MAX_MESSAGE_BYTES.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    message = msgpack.unpackb(data, strict_map_key=True)
    if not isinstance(message, list):
        raise ValueError(f"a message must be an array, not {type(message).__name__}")
    return message
