"""How a rank shares out its GPU's memory: first weights, then what steps need, and KV gets the rest.

What steps need is measured, by computing the largest one that there can be before there is any KV memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from headwise.workers.cuda.buckets import buckets_of
from headwise.workers.cuda.gpu import Gpu
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.spec import ShardSpec

NUM_LANES, STAGING_BYTES = 2, 16 << 20
"""What moves KV blocks has two lanes, each with staging memory at both ends: of that size, unless one block has more.
It is enough to keep the bus busy, and little beside a cache."""

T = TypeVar("T")
Step = Callable[[StepPlan], object]
"""Computes a plan."""

_DEMANDING = RowSampling(
    temperature=1.0,
    top_p=0.5,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias=((0, 0.0),),
    num_logprobs=20,
)
"""What needs the most memory to sample: float32 logits of the whole vocabulary, sorted and summed up as int64."""


class LargestStep(NamedTuple):
    """The most that a step may be.

    Attributes:
        rows: of the step; each samples a token.
        tokens: that it computes.
        row_tokens: of each row, those before the step included: rows may share the blocks of a long beginning.
        groups: of the KV policy.
    """

    rows: int
    tokens: int
    row_tokens: int
    groups: int = 1

    def plans(self, block_size: int) -> list[StepPlan]:
        """The first plans, which compute it in a cache of one block. All blocks of all rows are that one, so what comes
        out means nothing. There are two ways to share out the tokens: the reference needs the most for a row with as
        many as possible, and Triton's attention for the sums of many rows with a few each."""
        in_few, left = [1] * self.rows, min(self.tokens, self.rows * self.row_tokens) - self.rows
        in_all = [1 + left // self.rows + (row < left % self.rows) for row in range(self.rows)]
        for row in range(self.rows):
            more = min(left, self.row_tokens - 1)
            in_few[row], left = in_few[row] + more, left - more
        first, second = (self._plan(step, counts, block_size) for step, counts in enumerate((in_few, in_all)))
        second.drops = list(range(self.rows))
        return [first, second]

    def _plan(self, step: int, counts: list[int], block_size: int) -> StepPlan:
        length, plan = self.row_tokens, StepPlan(step)
        blocks = [0] * -(-length // block_size)
        others = (blocks,) * (self.groups - 1)
        for row, count in enumerate(counts):
            plan.admits.append(RowAdmit(row, [0] * length, length, length - count, blocks, _DEMANDING, others))
            plan.computes.append((row, count))
        return plan


class GpuMemory:
    """Call in this order: :meth:`hold_weights`, :meth:`measure_steps`, :meth:`for_kv`."""

    def __init__(self, gpu: Gpu, spec: ShardSpec, rank: int) -> None:
        self._gpu, self._spec, self._rank = gpu, spec, rank
        self.for_steps = 0

    @property
    def free(self) -> int:
        """Bytes, of which steps and KV are to have their parts."""
        return self._gpu.free_memory()

    def hold_weights(self, load: Callable[[], T]) -> T:
        """What ``load`` returns.

        Raises:
            InvalidValueError: the GPU has no memory for it.
        """
        free = self.free

        def refusal() -> InvalidValueError:
            limit = f"the weights of rank {self._rank} do not fit in the {free} bytes of GPU memory that were free"
            fix = "raise tensor_parallel_size (--tp), or take a smaller dtype (--dtype)"
            return InvalidValueError("tensor_parallel_size", self._spec.tensor_parallel_size, limit, fix)

        return or_refuse(load, refusal)

    def measure_steps(self, largest: LargestStep, start: Callable[[], Step], end: Callable[[], None]) -> None:
        """Finds out what steps need besides weights and KV; every rank of the group calls it.

        Args:
            start: makes what computes steps, on a cache of one block. What that takes counts, too.
            end: gives all of that up.

        Raises:
            InvalidValueError: the GPU has no memory for the largest step.
        """
        free = self.free
        plans = largest.plans(self._spec.block_size)

        def measure() -> None:
            try:
                self.for_steps = self._measure(plans, start)
            finally:
                end()

        or_refuse(measure, lambda: self._no_steps("more than it can have", free))

    def reserve(self, num_bytes: int) -> None:
        """So much is taken later by what moves KV blocks, and counts to what steps need."""
        self.for_steps += num_bytes

    def for_kv(self) -> int:
        """Bytes that KV may take now.

        Raises:
            InvalidValueError: steps need all that is free.
        """
        free = self.free
        if free <= self.for_steps:
            raise self._no_steps(f"{self.for_steps} bytes", free)
        return free - self.for_steps

    def _measure(self, plans: list[StepPlan], start: Callable[[], Step]) -> int:
        steps: list[Step] = []

        def compute() -> None:
            steps.append(start())
            for plan in plans:
                steps[0](plan)

        peak = self._gpu.peak_memory(compute)
        buckets = buckets_of(len(plans[0].computes))
        shared = self._taken(lambda: steps[0](StepPlan(len(plans), capture=buckets[-1])))
        if len(buckets) == 1:
            return peak + shared
        # The memory that graphs share is the largest one's; every other takes what the smallest does.
        own = self._taken(lambda: steps[0](StepPlan(len(plans) + 1, capture=buckets[0])))
        return peak + shared + own * (len(buckets) - 1)

    def _taken(self, run: Callable[[], object]) -> int:
        """Bytes that ``run`` has left less free: part of a graph is the driver's, and torch does not count it."""
        before = self._gpu.free_memory()
        run()
        return max(0, before - self._gpu.free_memory())

    def _no_steps(self, needed: str, free: int) -> InvalidValueError:
        spec = self._spec
        limit = (
            f"a step of so many tokens with max_num_seqs={spec.max_num_seqs} and max_model_len={spec.max_model_len} "
            f"needs {needed}, and rank {self._rank} has {free} bytes of GPU memory beside its weights"
        )
        fix = "lower one of them (--max-num-batched-tokens, --max-num-seqs, --max-model-len)"
        return InvalidValueError("max_num_batched_tokens", spec.max_num_batched_tokens, limit, fix)


def staging_bytes(block_bytes: int) -> int:
    """What moving KV blocks takes of a GPU's memory, of blocks of such a size."""
    return NUM_LANES * max(block_bytes, STAGING_BYTES)


def or_refuse(compute: Callable[[], T], refusal: Callable[[], InvalidValueError]) -> T:
    """What ``compute`` returns.

    Raises:
        InvalidValueError: that of ``refusal``, where there is no memory. It keeps nothing of what was computed so far.
    """
    try:
        return compute()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    raise refusal()  # out here, for an error keeps the one in whose handling it is raised, and all that its calls held


def _is_out_of_memory(error: BaseException) -> bool:
    """Some libraries allocate by themselves, and have errors of their own for it."""
    said = str(error)
    own = "CUDA error: out of memory" in said or "ALLOC_FAILED" in said
    return own or isinstance(error, (MemoryError, torch.OutOfMemoryError))
