"""The rows of a shard and the step over them: applies a plan, builds the tensors, runs the model, samples."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.collectives import Collectives
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.model.model import Model, StepInput
from headwise.workers.plan import RowAdmit, StepOutput, StepPlan
from headwise.workers.sampling.sampler import Sampler, greedy

Ints = NDArray[np.int64]


class Runner:
    """One shard's rows. Every rank applies the same plans in the same order, so their rows are always alike.

    Attributes:
        seconds: wall time of building and sampling since the start; the model knows its own.
    """

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        sampler: Sampler,
        collectives: Collectives,
        *,
        vocab_sizes: list[int],
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """Args: ``vocab_sizes``: how many vocabulary rows each rank owns, in rank order."""
        self._model, self._attention, self._sampler, self._collectives = model, attention, sampler, collectives
        self._vocab_sizes, self._vocab_start = vocab_sizes, sum(vocab_sizes[: collectives.rank])
        self._block_size, self._device = block_size, device
        self._next_step = 0
        self.seconds = {"build": 0.0, "sample": 0.0}
        # A token more than the model's length: the last one sampled is stored, never computed.
        self._tokens_RL = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int64, device=device)
        self._block_table_RN = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks_R = np.zeros(max_num_seqs, np.int64)
        self._length_R = np.zeros(max_num_seqs, np.int64)
        self._computed_R = np.zeros(max_num_seqs, np.int64)
        self._prompt_len_R = np.zeros(max_num_seqs, np.int64)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepOutput:
        """Applies a plan; see :class:`~headwise.workers.plan.StepPlan` for the order.

        Raises:
            RuntimeError: the plan is out of order or asks for tokens that are not there: the engine and this shard
                disagree, and going on would compute wrong text.
        """
        started = time.perf_counter()
        if plan.step != self._next_step:
            raise RuntimeError(f"step {plan.step} arrived where step {self._next_step} was due")
        self._next_step += 1
        self._apply(plan)
        output = StepOutput(plan.step)
        if plan.computes:
            self._compute(plan, output)
        output.seconds = time.perf_counter() - started
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

    def _compute(self, plan: StepPlan, output: StepOutput) -> None:
        rows_B = np.array([row for row, _ in plan.computes], np.int64)
        counts_B = np.array([count for _, count in plan.computes], np.int64)
        started = time.perf_counter()
        built = self._build(rows_B, counts_B)
        self.seconds["build"] += time.perf_counter() - started
        logits_BV = self._model.forward(built.step, self._attention)
        self._computed_R[rows_B] += counts_B
        sampled_B = rows_B[built.samples_B]
        started = time.perf_counter()
        if sampled_B.size:
            self._sample(logits_BV, sampled_B, output)
        self.seconds["sample"] += time.perf_counter() - started

    def _build(self, rows_B: Ints, counts_B: Ints) -> _Built:
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
        samples_B = context_B == self._length_R[rows_B]
        positions_T = self._to_device(position_T)
        attention = AttentionBatch(
            query_starts_B1=self._to_device(np.concatenate(([0], stops_B)).astype(np.int32)),
            context_lens_B=self._to_device(context_B.astype(np.int32)),
            block_tables_BN=self._to_device(self._block_table_RN[rows_B, : needed_B.max()]),
            slots_T=self._to_device(slot_T),
            max_query_len=int(counts_B.max()),
            max_context_len=int(context_B.max()),
        )
        token_ids_T = self._tokens_RL[self._to_device(row_T), positions_T]
        wanted = self._to_device(stops_B[samples_B] - 1)
        return _Built(StepInput(token_ids_T, positions_T, wanted, attention), samples_B)

    def _sample(self, logits_BV: Tensor, rows_B: Ints, output: StepOutput) -> None:
        """Samples one token for each of the rows and stores it on the device."""
        lengths_B = self._length_R[rows_B]
        rows: list[int] = rows_B.tolist()
        generated = (lengths_B - self._prompt_len_R[rows_B]).tolist()
        why: dict[int, str] = {}
        if self._sampler.greedy_only(rows, generated):
            tokens_B, finite_B = self._greedy(logits_BV)
        else:
            tokens_B, finite_B, why = self._draw(logits_BV, rows, lengths_B.tolist(), generated, output)
        self._tokens_RL[self._to_device(rows_B), self._to_device(lengths_B)] = tokens_B
        self._length_R[rows_B] += 1
        tokens: list[int] = tokens_B.tolist()
        self._sampler.observe(rows, tokens_B)
        for row, token, finite in zip(rows, tokens, finite_B.tolist(), strict=True):
            if finite:
                self._sampler.accept(row, token)
                output.tokens.append((row, token))
            else:
                output.logprobs.pop(row, None)
                output.failed.append((row, why.get(row, "the model's logits are not finite")))

    def _greedy(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The best token of each row; ranks exchange their best (value, id) instead of their logits."""
        values_B, ids_B, finite_B = greedy(logits_BV, self._attention.num_threads)
        if self._collectives.world_size == 1:
            return ids_B, finite_B
        # float64 holds a token id and a float32 logit exactly.
        local_B2 = torch.stack((values_B.double(), ids_B.double() + self._vocab_start), dim=1)
        all_BN2 = self._collectives.all_gather(local_B2, [2] * self._collectives.world_size).view(len(ids_B), -1, 2)
        # Ranks hold ascending ids: of equal values the first rank's is the lowest. NaN counts as the largest of all.
        best_B1 = _first_argmax(all_BN2[..., 0]).unsqueeze(1)
        return all_BN2[..., 1].gather(1, best_B1).squeeze(1).long(), all_BN2[..., 0].amax(dim=1).isfinite()

    def _draw(
        self, logits_BV: Tensor, rows: list[int], positions: list[int], generated: list[int], output: StepOutput
    ) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Rank 0 samples from all logits; the others take its word, so that ranks can never disagree."""
        single = self._collectives.world_size == 1
        all_BV = logits_BV if single else self._collectives.all_gather(logits_BV, self._vocab_sizes)
        chosen_2B = torch.zeros((2, len(rows)), dtype=torch.int64, device=self._device)
        failed: dict[int, str] = {}
        if self._collectives.rank == 0:
            result = self._sampler.sample(all_BV, rows, positions, generated)
            chosen_2B[0], chosen_2B[1], failed = result.tokens_B, result.finite_B, result.failed
            output.logprobs.update(result.logprobs())
        if not single:
            self._collectives.broadcast_(chosen_2B, 0)
        return chosen_2B[0], chosen_2B[1].bool(), failed

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


class _Built(NamedTuple):
    step: StepInput
    samples_B: NDArray[np.bool_]
    """Which of the plan's computes sample a token."""


def _first_argmax(values_BN: Tensor) -> Tensor:
    """The index of each row's largest value, the first among equals (torch.argmax promises no order)."""
    ranks_N = torch.arange(values_BN.shape[1], device=values_BN.device)
    best_BN = values_BN == values_BN.amax(dim=1, keepdim=True)
    return torch.where(best_BN, ranks_N, len(ranks_N) - 1).amin(dim=1)
