"""The rows of a shard and the step over them: applies a plan, builds the step, runs the model, samples."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.collectives import Collectives
from headwise.workers.cuda import gpu
from headwise.workers.failpoints import Point
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.model import Model, StepInput
from headwise.workers.plan import RowAdmit, StepOutput, StepPlan
from headwise.workers.sampling.grammar import Constraint
from headwise.workers.sampling.sampler import Sampler, SampleResult, greedy
from headwise.workers.upload import upload

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A step whose work the device may not have done yet.

    Attributes:
        started: when :meth:`Runner.launch` was called, by ``time.perf_counter``.
        rows: those that sample a token.
        result: their tokens on the device, None if there are no such rows.
        constraints: of these rows, or None; not looked up later, when another request may have the row.
        computed: tells where there is no result when the device has done the work; None on a CPU.
    """

    step: int
    started: float
    rows: list[int]
    result: SampleResult | None
    constraints: list[Constraint | None]
    computed: torch.cuda.Event | None = None


class Runner:
    """One shard's rows. Every rank applies the same plans in the same order, so their rows are always alike.

    Attributes:
        seconds: wall time of building and sampling since the start; the model knows its own.
        collected: on a GPU, the event after the work of the last finished step, if it has one. Read by other threads.
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
        num_threads: int,
    ) -> None:
        """
        Args:
            vocab_sizes: how many vocabulary rows each rank owns, in rank order.
            num_threads: CPU threads that look for the best token.
        """
        self._model, self._sampler, self._collectives = model, sampler, collectives
        self._vocab_sizes, self._vocab_start = vocab_sizes, sum(vocab_sizes[: collectives.rank])
        self._block_size, self._device, self._num_threads = block_size, device, num_threads
        self._next_step = 0
        self.collected: gpu.Event | None = None
        self.seconds = {"build": 0.0, "sample": 0.0}
        # A token more than the model's length: the last one sampled is stored, never computed.
        self._tokens_RL = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int64, device=device)
        self._block_table_RN = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks_R = np.zeros(max_num_seqs, np.int64)
        self._length_R = np.zeros(max_num_seqs, np.int64)
        self._computed_R = np.zeros(max_num_seqs, np.int64)
        self._prompt_len_R = np.zeros(max_num_seqs, np.int64)

    def step(self, plan: StepPlan) -> StepOutput:
        """:meth:`launch`, then :meth:`finish`."""
        return self.finish(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Applies a plan (see :class:`~headwise.workers.plan.StepPlan` for the order), computes and samples. Reads
        nothing back from the device, so that it may still be at work. Steps are finished in the order of their launch;
        a row with a grammar is computed again only after that, because the grammar follows the tokens read back.

        Raises:
            RuntimeError: the plan is out of order or asks for tokens that are not there: the engine and this shard
                disagree, and going on would compute wrong text.
        """
        started = time.perf_counter()
        if plan.step != self._next_step:
            raise RuntimeError(f"step {plan.step} arrived where step {self._next_step} was due")
        self._next_step += 1
        self._apply(plan)
        if plan.capture:
            self._model.capture(plan.capture, self._tokens_RL)
        rows, result = self._compute(plan) if plan.computes else ([], None)
        computed = None
        if result is None and self._device.type == "cuda":
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            computed.record(torch.cuda.current_stream(self._device))
        return Launched(plan.step, started, rows, result, [self._sampler.constraint(row) for row in rows], computed)

    def finish(self, launched: Launched) -> StepOutput:
        """Waits until a step is computed, and takes note of its tokens. Its keys and values are in the memory of every
        rank then, for all ranks have met after the last of them."""
        output = StepOutput(launched.step)
        if launched.computed is not None:
            launched.computed.synchronize()
            self.collected = launched.computed
        if launched.result is not None:
            started = time.perf_counter()
            self._collect(launched, launched.result, output)
            self.seconds["sample"] += time.perf_counter() - started
        output.seconds = time.perf_counter() - launched.started
        return output

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.drops:
            self._sampler.drop(row)
            self._length_R[row] = 0
        for admit in plan.admits:
            self._admit(admit)
        for row, block in plan.appends:
            self._block_table_RN[row, self._num_blocks_R[row]] = block
            self._num_blocks_R[row] += 1

    def _admit(self, admit: RowAdmit) -> None:
        row, length = admit.row, len(admit.token_ids)
        if self._length_R[row]:
            raise RuntimeError(f"row {row} is taken")
        self._tokens_RL[row, :length] = torch.tensor(admit.token_ids, dtype=torch.int64)
        self._block_table_RN[row, : len(admit.block_ids)] = admit.block_ids
        self._num_blocks_R[row] = len(admit.block_ids)
        self._length_R[row], self._computed_R[row] = length, admit.num_computed
        self._prompt_len_R[row] = admit.prompt_len
        prompt, generated = admit.token_ids[: admit.prompt_len], admit.token_ids[admit.prompt_len :]
        self._sampler.admit(row, admit.sampling, prompt, generated)

    def _compute(self, plan: StepPlan) -> tuple[list[int], SampleResult | None]:
        rows_B = np.array([row for row, _ in plan.computes], np.int64)
        counts_B = np.array([count for _, count in plan.computes], np.int64)
        started = time.perf_counter()
        step = self._build(rows_B, counts_B, plan.bucket)
        self.seconds["build"] += time.perf_counter() - started
        if failpoints.ENABLED:
            failpoints.hit(Point.STEP_TOKEN, self._collectives.rank, lambda token: self._holds(rows_B, token))
        logits_BV = self._model.forward(step)
        started = time.perf_counter()
        self._computed_R[rows_B] += counts_B
        sampled_B = rows_B[self._computed_R[rows_B] == self._length_R[rows_B]]
        rows: list[int] = sampled_B.tolist()
        result = self._sample(logits_BV, sampled_B, rows) if rows else None
        self.seconds["sample"] += time.perf_counter() - started
        return rows, result

    def _holds(self, rows_B: Ints, token: int) -> bool:
        return any(bool((self._tokens_RL[row, : self._length_R[row]] == token).any()) for row in rows_B)

    def _build(self, rows_B: Ints, counts_B: Ints, bucket: int) -> StepInput:
        context_B = self._computed_R[rows_B] + counts_B
        if (context_B > self._length_R[rows_B]).any() or (counts_B < 1).any():
            raise RuntimeError(f"rows {rows_B.tolist()} cannot compute {counts_B.tolist()} tokens")
        needed_B = -(-context_B // self._block_size)
        if (needed_B > self._num_blocks_R[rows_B]).any():
            raise RuntimeError(f"rows {rows_B.tolist()} lack blocks for {context_B.tolist()} tokens")
        stops_B = np.cumsum(counts_B)
        starts_B = stops_B - counts_B
        row_T = np.repeat(rows_B, counts_B)
        position_T = np.arange(stops_B[-1]) + np.repeat(self._computed_R[rows_B] - starts_B, counts_B)
        slot_T = self._block_table_RN[row_T, position_T // self._block_size] * np.int64(self._block_size)
        slot_T += position_T % self._block_size
        return StepInput(
            tokens_RL=self._tokens_RL,
            rows_T=row_T,
            positions_T=position_T,
            slots_T=slot_T,
            logit_tokens_B=stops_B[context_B == self._length_R[rows_B]] - 1,
            attention=AttentionBatch(
                query_starts_B1=np.concatenate(([0], stops_B)).astype(np.int32),
                context_lens_B=context_B.astype(np.int32),
                block_tables_BN=self._block_table_RN[rows_B, : needed_B.max()],
            ),
            bucket=bucket,
        )

    def _sample(self, logits_BV: Tensor, rows_B: Ints, rows: list[int]) -> SampleResult:
        """Samples one token for each of the rows and stores it on the device."""
        lengths_B = self._length_R[rows_B]
        generated = (lengths_B - self._prompt_len_R[rows_B]).tolist()
        if self._sampler.greedy_only(rows, generated):
            result = self._greedy(logits_BV)
        else:
            result = self._draw(logits_BV, rows, lengths_B.tolist(), generated)
        self._tokens_RL[upload(rows_B, self._device), upload(lengths_B, self._device)] = result.tokens_B
        self._length_R[rows_B] += 1
        self._sampler.observe(rows, result.tokens_B)
        return result

    def _collect(self, launched: Launched, result: SampleResult, output: StepOutput) -> None:
        output.logprobs.update(result.logprobs())
        read = (launched.rows, launched.constraints, result.tokens_B.tolist(), result.finite_B.tolist())
        for row, constraint, token, finite in zip(*read, strict=True):
            if finite:
                if constraint is not None:
                    constraint.accept(token)
                output.tokens.append((row, token))
            else:
                output.logprobs.pop(row, None)
                output.failed.append((row, result.failed.get(row, "the model's logits are not finite")))
                if row in result.failed:
                    output.verified.append(row)

    def _greedy(self, logits_BV: Tensor) -> SampleResult:
        """The best token of each row; ranks exchange their best (value, id) instead of their logits."""
        values_B, ids_B, finite_B = greedy(logits_BV, self._num_threads)
        if self._collectives.world_size == 1:
            return SampleResult(ids_B, finite_B)
        # float64 holds a token id and a float32 logit exactly.
        local_B2 = torch.stack((values_B.double(), ids_B.double() + self._vocab_start), dim=1)
        all_BN2 = self._collectives.all_gather(local_B2, [2] * self._collectives.world_size).view(len(ids_B), -1, 2)
        # Ranks hold ascending ids: of equal values the first rank's is the lowest. NaN counts as the largest of all.
        best_B1 = _first_argmax(all_BN2[..., 0]).unsqueeze(1)
        tokens_B = all_BN2[..., 1].gather(1, best_B1).squeeze(1).long()
        return SampleResult(tokens_B, all_BN2[..., 0].amax(dim=1).isfinite())

    def _draw(self, logits_BV: Tensor, rows: list[int], positions: list[int], generated: list[int]) -> SampleResult:
        """Rank 0 samples from all logits; the others take its word, so that ranks can never disagree."""
        if self._collectives.world_size == 1:
            return self._sampler.sample(logits_BV, rows, positions, generated)
        all_BV = self._collectives.all_gather(logits_BV, self._vocab_sizes)
        chosen_2B = torch.zeros((2, len(rows)), dtype=torch.int64, device=self._device)
        result = SampleResult(chosen_2B[0], chosen_2B[1])  # finite where not 0
        if self._collectives.rank == 0:
            result = self._sampler.sample(all_BV, rows, positions, generated)
            chosen_2B[0], chosen_2B[1] = result.tokens_B, result.finite_B
        self._collectives.broadcast_(chosen_2B, 0)
        return result


def _first_argmax(values_BN: Tensor) -> Tensor:
    """The index of each row's largest value, the first among equals (torch.argmax promises no order)."""
    ranks_N = torch.arange(values_BN.shape[1], device=values_BN.device)
    best_BN = values_BN == values_BN.amax(dim=1, keepdim=True)
    return torch.where(best_BN, ranks_N, len(ranks_N) - 1).amin(dim=1)
