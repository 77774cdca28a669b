"""The step of a shard: applies a plan to the rows, runs the model, samples, and tells the host what came of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.collectives import Collectives
from headwise.workers.cuda import gpu
from headwise.workers.failpoints import Point
from headwise.workers.kv.policy import Reach
from headwise.workers.model.model import Model
from headwise.workers.plan import StepOutput, StepPlan
from headwise.workers.rows import Rows
from headwise.workers.sampling.best import best_keys, greedy, read_keys
from headwise.workers.sampling.grammar import Constraint
from headwise.workers.sampling.sampler import ResultCopy, Sampler, SampleResult

Ints: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A step whose work the device may not have done yet.

    Attributes:
        started: when :meth:`Runner.launch` was called, by ``time.perf_counter``.
        rows: those that sample a token.
        result: their tokens on the way to the host, None if there are no such rows.
        constraints: of these rows; not looked up later, when another request may have the row.
        constrained: the rows that have a grammar now, whichever step they are in.
        span: on a GPU, the points in its work before and after the step.
    """

    step: int
    started: float
    rows: list[int]
    result: ResultCopy | None
    constraints: dict[int, Constraint]
    constrained: Collection[int]
    span: tuple[gpu.Event, gpu.Event] | None

    @property
    def computed(self) -> bool:
        """Whether :meth:`Runner.finish` has nothing to wait for."""
        return self.span is None or self.span[1].query()

    def precedes(self, plan: StepPlan) -> bool:
        """Whether the step must be finished before that plan is launched: where that takes long, the tokens would be
        late. On a CPU to launch is to compute; a graph takes seconds to capture; and a grammar may have to be compiled,
        or follows the tokens that are read back."""
        if self.span is None or plan.capture or any(admit.sampling.grammar for admit in plan.admits):
            return True
        return bool(self.constrained) and any(row in self.constrained for row, _ in plan.computes)


class Runner:
    """One shard's rows and their steps.

    Attributes:
        seconds: wall time of building and sampling since the start; the model knows its own.
        collected: on a GPU, the event after the work of the last finished step. Read by other threads.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        collectives: Collectives,
        *,
        vocab_sizes: list[int],
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        max_num_batched_tokens: int,
        reaches: Sequence[Reach],
        num_threads: int,
    ) -> None:
        """
        Args:
            vocab_sizes: how many vocabulary rows each rank owns, in rank order.
            max_num_batched_tokens: most tokens of a step.
            reaches: of the groups of the KV policy.
            num_threads: CPU threads that look for the best token.
        """
        self._model, self._sampler, self._collectives = model, sampler, collectives
        self._vocab_sizes, self._vocab_start = vocab_sizes, sum(vocab_sizes[: collectives.rank])
        self._rows = Rows(block_size, max_num_seqs, max_model_len, device, reaches, max_num_batched_tokens)
        self._device, self._gpu, self._num_threads = device, gpu.of(device), num_threads
        self._next_step = 0
        self.collected: gpu.Event | None = None
        self.seconds = {"build": 0.0, "sample": 0.0}

    def step(self, plan: StepPlan) -> StepOutput:
        """:meth:`launch`, then :meth:`finish`."""
        return self.finish(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Applies a plan (see :class:`~headwise.workers.plan.StepPlan` for the order), computes and samples. Does
        not wait for a GPU, which may still be at work on earlier steps: those that do not precede the plan (see
        :meth:`Launched.precedes`). Steps are finished in the order of their launch.

        Raises:
            RuntimeError: the plan is out of order or asks for tokens that are not there: the engine and this shard
                disagree, and going on would compute wrong text.
        """
        started, begun = time.perf_counter(), self._event()
        if plan.step != self._next_step:
            raise RuntimeError(f"step {plan.step} arrived where step {self._next_step} was due")
        self._next_step += 1
        self._apply(plan)
        if plan.capture:
            self._model.capture(plan.capture, self._rows.tokens_RL)
        sampled_B, result = self._compute(plan) if plan.computes else (np.empty(0, np.int64), None)
        rows = sampled_B.tolist()
        # Queued before the end of the step, and before the step that comes next.
        copy = ResultCopy(result, rows, self._gpu) if result is not None else None
        ended = self._event()
        span = (begun, ended) if begun is not None and ended is not None else None
        sampler = self._sampler
        return Launched(plan.step, started, rows, copy, sampler.constraints(sampled_B), sampler.constrained, span)

    def finish(self, launched: Launched) -> StepOutput:
        """Waits until a step is computed, though not for steps launched after it, and takes note of its tokens. Its
        keys and values are in the memory of every rank then, for all ranks have met after the last of them."""
        output = StepOutput(launched.step)
        if launched.span is not None:
            launched.span[1].synchronize()
            self.collected = launched.span[1]
        if launched.result is not None:
            started = time.perf_counter()
            self._collect(launched, launched.result, output)
            self.seconds["sample"] += time.perf_counter() - started
        output.seconds = _seconds(launched)
        return output

    def _event(self) -> gpu.Event | None:
        """A point in the work of a GPU, after what it was given so far."""
        if self._gpu is None:
            return None
        event = self._gpu.new_event(timed=True)
        event.record(self._gpu.current_stream())
        return event

    def _apply(self, plan: StepPlan) -> None:
        self._rows.apply(plan)
        for row in plan.drops:
            self._sampler.drop(row)
        for admit in plan.admits:
            prompt, generated = admit.token_ids[: admit.prompt_len], admit.token_ids[admit.prompt_len :]
            self._sampler.admit(admit.row, admit.sampling, prompt, generated)

    def _compute(self, plan: StepPlan) -> tuple[Ints, SampleResult | None]:
        started = time.perf_counter()
        pairs = np.fromiter(chain.from_iterable(plan.computes), np.int64, 2 * len(plan.computes))
        rows_B, counts_B = pairs[::2].copy(), pairs[1::2].copy()
        step = self._rows.build(rows_B, counts_B, plan.bucket)
        self.seconds["build"] += time.perf_counter() - started
        if failpoints.ENABLED:
            failpoints.hit(Point.STEP_TOKEN, self._collectives.rank, lambda token: self._rows.holds(rows_B, token))
        logits_BV = self._model.forward(step)
        started = time.perf_counter()
        sampled_B = self._rows.whole(rows_B)
        result = self._sample(logits_BV, sampled_B) if len(sampled_B) else None
        self.seconds["sample"] += time.perf_counter() - started
        return sampled_B, result

    def _sample(self, logits_BV: Tensor, rows_B: Ints) -> SampleResult:
        """Samples one token for each of the rows and stores it on the device."""
        lengths_B, generated_B = self._rows.lengths(rows_B)
        if self._sampler.greedy_only(rows_B, generated_B):
            result = self._greedy(logits_BV)
        else:
            result = self._draw(logits_BV, rows_B, lengths_B, generated_B)
        self._rows.store(rows_B, result.tokens_B)
        self._sampler.observe(rows_B, result.tokens_B)
        return result

    def _collect(self, launched: Launched, result: ResultCopy, output: StepOutput) -> None:
        sampled = result.read()
        output.tokens = list(zip(launched.rows, sampled.tokens, strict=True))
        output.logprobs = sampled.logprobs
        if sampled.failed:
            output.tokens = [(row, token) for row, token in output.tokens if row not in sampled.failed]
            output.failed, output.verified = list(sampled.failed.items()), sampled.verified
        if launched.constraints:
            for row, token in output.tokens:
                if row in launched.constraints:
                    launched.constraints[row].accept(token)

    def _greedy(self, logits_BV: Tensor) -> SampleResult:
        """The best token of each row; ranks exchange the key of their best token instead of their logits."""
        ranks = self._collectives.world_size
        if ranks == 1:
            return SampleResult(*greedy(logits_BV, self._num_threads))
        keys_B = best_keys(logits_BV, self._vocab_start, self._num_threads)
        return SampleResult(*read_keys(self._collectives.all_gather(keys_B.unsqueeze(1), [1] * ranks).amax(dim=1)))

    def _draw(self, logits_BV: Tensor, rows_B: Ints, positions_B: Ints, generated_B: Ints) -> SampleResult:
        """Rank 0 samples from all logits; the others take its word, so that ranks can never disagree."""
        if self._collectives.world_size == 1:
            return self._sampler.sample(logits_BV, rows_B, positions_B, generated_B)
        all_BV = self._collectives.gather(logits_BV, self._vocab_sizes)
        if all_BV is None:  # Why a row has no token, rank 0 alone knows and tells.
            tokens_B = torch.empty(len(rows_B), dtype=torch.int64, device=self._device)
            result = SampleResult(tokens_B, torch.ones_like(tokens_B, dtype=torch.bool))
        else:
            result = self._sampler.sample(all_BV, rows_B, positions_B, generated_B)
        self._collectives.broadcast_(result.tokens_B, 0)
        return result


def _seconds(launched: Launched) -> float:
    """How long a step took: on a GPU, for its own work."""
    if launched.span is None:
        return time.perf_counter() - launched.started
    begun, ended = launched.span
    return begun.elapsed_time(ended) / 1000
