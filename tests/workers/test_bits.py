"""A row's logits have the same bits in any company, chunks and number of threads, and after it was computed again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from torch import Tensor

from headwise.workers import collectives
from headwise.workers.cpu import attention_plan
from headwise.workers.model.attention import PART_KEYS
from headwise.workers.model.model import StepInput
from headwise.workers.plan import RowAdmit, RowSampling, StepOutput, StepPlan, TokenLogprobs
from headwise.workers.shard import Shard
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import SHAPES, small_spec, write_checkpoint
from tests.effort import examples, thorough

BLOCK, ROWS, MAX_LEN, BLOCKS = 16, 4, 2 * PART_KEYS + 100, 1000
GENERATED = 4
LETTERS = LLMatcher.grammar_from_regex("[a-z ]{500,}")

Seen = tuple[bytes, int, TokenLogprobs | None]
"""The bits of a token's logits, the token, and its log-probabilities."""


class BitsGroup:
    """A group whose ranks are threads of this process, and what their logits are."""

    def __init__(self, model_dir: Path, ranks: int, threads: int) -> None:
        self._pool, self._next_step = ThreadPoolExecutor(ranks), 0
        spec = small_spec(model_dir, tensor_parallel_size=ranks, max_model_len=MAX_LEN, kv_memory="64MiB")
        rendezvous = collectives.open_rendezvous("solo" if ranks == 1 else "shared_memory", ranks)
        self._logits: list[Tensor] = [torch.empty(0)] * ranks

        def make(rank: int) -> Shard:
            shard = Shard(spec, collectives.connect(rendezvous, rank, ranks), threads)
            shard.load()
            shard.allocate(BLOCKS)
            assert shard._model is not None
            forward = shard._model.forward

            def record(step: StepInput) -> Tensor:
                self._logits[rank] = forward(step).clone()
                return self._logits[rank]

            shard._model.forward = record  # type: ignore[method-assign]
            return shard

        self._shards = list(self._pool.map(make, range(ranks)))

    def step(self, plan: StepPlan) -> dict[int, Seen]:
        """By row that got a token."""
        plan.step, self._next_step = self._next_step, self._next_step + 1
        outputs: list[StepOutput] = list(self._pool.map(lambda shard: shard.step(plan), self._shards))
        if not plan.computes:
            return {}
        logits_BV = torch.cat(self._logits, dim=1)
        assert not outputs[0].failed and len(logits_BV) == len(outputs[0].tokens)
        return {
            row: (logits_V.numpy().tobytes(), token, outputs[0].logprobs.get(row))
            for (row, token), logits_V in zip(outputs[0].tokens, logits_BV, strict=True)
        }

    def close(self) -> None:
        list(self._pool.map(Shard.close, self._shards))
        self._pool.shutdown()


@dataclass
class Request:
    """A request that has a row, or had one."""

    prompt: list[int]
    sampling: RowSampling
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    seen: list[Seen] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + [token for _, token, _ in self.seen]

    @property
    def left(self) -> int:
        """Tokens whose KV is not computed yet."""
        return len(self.tokens) - self.computed


class Bench:
    """Admits requests to a group's rows and computes with them; no block is used twice."""

    def __init__(self, group: BitsGroup) -> None:
        self._group = group
        self._unused = random.Random(0).sample(range(BLOCKS), BLOCKS)
        self.running: list[Request] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.step({}, drop=list(self.running))

    def step(
        self,
        computes: dict[int, int],
        drop: list[Request] | None = None,
        admit: Request | None = None,
        shared: list[int] | None = None,
    ) -> None:
        """One step.

        Args:
            computes: how many tokens of which row, in this order.
            admit: a request to seat first, behind ``shared``, blocks in which its first tokens are computed already.
        """
        plan = StepPlan(0)
        for request in drop or []:
            plan.drops.append(request.row)
            self.running.remove(request)
        if admit is not None:
            admit.row = min(set(range(ROWS)) - {request.row for request in self.running})
            shared = shared or []
            fresh = -(-(len(admit.prompt) + GENERATED) // BLOCK) - len(shared)
            admit.blocks = shared + [self._unused.pop() for _ in range(fresh)]
            admit.computed = len(shared) * BLOCK
            self.running.append(admit)
            tokens, prompt_len = admit.tokens, len(admit.prompt)
            plan.admits.append(RowAdmit(admit.row, tokens, prompt_len, admit.computed, admit.blocks, admit.sampling))
        plan.computes = list(computes.items())
        seen = self._group.step(plan)
        for request in self.running:
            request.computed += computes.get(request.row, 0)
            if request.row in seen:
                request.seen.append(seen[request.row])


def run_alone(group: BitsGroup, prompt: list[int], sampling: RowSampling) -> list[Seen]:
    """Computed by itself: the prompt as a whole, then token by token."""
    request = Request(prompt, sampling)
    with Bench(group) as bench:
        bench.step({0: len(prompt)}, admit=request)
        while len(request.seen) < GENERATED:
            bench.step({0: 1})
    return request.seen


def run_in_company(group: BitsGroup, prompt: list[int], sampling: RowSampling, chance: random.Random) -> list[Seen]:
    """Computed in chunks beside others that come and go, and preempted at times, also onto another's blocks."""
    request, preemptions = Request(prompt, sampling), 0
    with Bench(group) as bench:
        while len(request.seen) < GENERATED:
            admit, drop, shared = None, [], []
            gone = [other for other in bench.running if len(other.seen) == GENERATED or chance.random() < 0.1]
            if request in gone and preemptions < 3:
                preemptions += 1
                drop.append(request)
            drop += [other for other in gone if other is not request]
            if request not in bench.running:
                admit = request
                # Another's blocks, with the keys and values that came of its chunks and company.
                alike = [other for other in bench.running if other.prompt == prompt and other not in drop]
                if alike and (whole := min(alike[0].computed, len(prompt) - 1) // BLOCK):
                    shared = alike[0].blocks[: chance.randint(0, whole)]
            elif len(bench.running) < ROWS and chance.random() < 0.5 and request not in drop:
                length = chance.choice([1, 5, 70, 300])
                other_prompt = prompt if chance.random() < 0.4 else [chance.randrange(3, 200) for _ in range(length)]
                admit = Request(other_prompt, draw_sampling(chance))
            bench.step({}, drop, admit, shared)
            rows = [other for other in bench.running if other.left and (other is request or chance.random() < 0.8)]
            chance.shuffle(rows)
            computes = {}
            for other in rows:
                computes[other.row] = other.left if chance.random() < 0.3 else chance.randint(1, other.left)
            if computes:
                bench.step(computes)
    return request.seen


def draw_sampling(chance: random.Random) -> RowSampling:
    kinds = [
        RowSampling(),
        RowSampling(num_logprobs=chance.randrange(21)),
        RowSampling(temperature=0.9, seed=chance.randrange(99), num_logprobs=3),
        RowSampling(1.3, top_k=50, top_p=0.9, min_p=0.01, seed=chance.randrange(99), num_logprobs=0),
        RowSampling(0.7, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, num_logprobs=5),
        RowSampling(1.0, seed=chance.randrange(99), grammar=LETTERS, num_logprobs=2),
    ]
    return chance.choice(kinds)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("bits"), *SHAPES["uneven"], vocab_size=VOCAB)
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def groups(model_dir: Path) -> Iterator[Callable[[int, int], BitsGroup]]:
    """Groups of so many ranks and threads a rank."""
    made: dict[tuple[int, int], BitsGroup] = {}
    with ExitStack() as closing:

        def get(ranks: int, threads: int) -> BitsGroup:
            if (ranks, threads) not in made:
                made[ranks, threads] = BitsGroup(model_dir, ranks, threads)
                closing.callback(made[ranks, threads].close)
            return made[ranks, threads]

        yield get


lengths = st.sampled_from([n * PART_KEYS + d for n in (1, 2) for d in (-3, -1, 0, 1)]) | st.integers(
    1, 2 * PART_KEYS + 80
)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("threads", [1, thorough(2)])
@examples(20)
@given(length=lengths, seed=st.integers(0, 2**31))
def test_logits_have_the_same_bits_in_any_company(
    groups: Callable[[int, int], BitsGroup], ranks: int, threads: int, length: int, seed: int
) -> None:
    chance = random.Random(seed)
    prompt = [chance.randrange(3, 200) for _ in range(length)]
    sampling = draw_sampling(chance)
    expected = run_alone(groups(ranks, 1), prompt, sampling)
    with mock.patch.object(attention_plan, "_PARALLEL_COST", 0):
        found = run_in_company(groups(ranks, threads), prompt, sampling, chance)
    assert [token for _, token, _ in found] == [token for _, token, _ in expected]
    assert found == expected
