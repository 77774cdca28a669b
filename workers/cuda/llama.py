"""One shard of a Llama model on a GPU: steps that decode are graphs, and all others are launched kernel by kernel."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from headwise.workers.collectives import Collectives
from headwise.workers.cuda import gpu
from headwise.workers.cuda.attention import TritonAttention
from headwise.workers.cuda.flashinfer import FlashInferAttention
from headwise.workers.cuda.graphs import DecodeGraphs
from headwise.workers.cuda.ops import TritonOps
from headwise.workers.cuda.self_check import check_kernels
from headwise.workers.cuda.step_pack import pack_step, token_places
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.checkpoint import ShardWeights
from headwise.workers.model.model import StepInput
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import ShardPartition
from headwise.workers.reference.llama import Inputs, Llama


class CudaLlama:
    """See :class:`~headwise.workers.model.model.Model`.

    The host waits for nothing in a step: what the kernels have to know goes to the GPU in one copy from page-locked
    memory, and logits stay there.
    """

    def __init__(
        self,
        config: ModelConfig,
        partition: ShardPartition,
        weights: ShardWeights,
        collectives: Collectives,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        parts = (config, partition, weights, collectives, max_model_len)
        self._llama = Llama(*parts, TritonOps(), TritonAttention)
        self._max_model_len, self._width = max_model_len, config.hidden_size
        self._device = weights.embed_VE.device
        self._gpu = gpu.of(self._device)
        self._graphs: DecodeGraphs | None = None  # until attach()
        self._is_checked = False
        self._seconds = 0.0
        self.nbytes = self._llama.nbytes

    @property
    def seconds(self) -> dict[str, float]:
        return {"forward": self._seconds}

    @torch.inference_mode()
    def attach(self, cache: KVCache) -> None:
        self._llama.attach(cache)
        if self._gpu is not None and not self._is_checked:
            check_kernels(cache, self._attention.q_starts, self._attention.scale, self._width)
            self._is_checked = True
        self._graphs = DecodeGraphs(self._attention, self._max_model_len, self._gpu)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Tensor:
        started = time.perf_counter()
        assert self._graphs is not None, "attach() comes first"
        small, large = self._attention.cut(step.attention)
        pack = pack_step(step, small, large)
        host_I = self._host_memory(pack.size)
        pack.write(host_I.numpy())
        graph = self._graphs.find(step.bucket, pack.size, max(small.num_slots, large.num_slots))
        if graph is not None:
            logits_BV = graph.replay(host_I)
            logits_BV = _wanted(step, graph.step_I, logits_BV)
        else:
            step_I = host_I.to(self._device, non_blocking=True)
            self._attention.begin_packed(step_I, small, large)
            logits_BV = _wanted(step, step_I, self._compute(step_I, step))
        self._seconds += time.perf_counter() - started
        return logits_BV

    @torch.inference_mode()
    def capture(self, bucket: int, tokens_RL: Tensor) -> None:
        assert self._graphs is not None, "attach() comes first"

        def compute(step_I: Tensor, alone: bool) -> Tensor:
            return self._llama.compute(_inputs(step_I, tokens_RL, bucket, None), alone)

        self._graphs.capture(bucket, compute)

    def detach(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self._graphs = None
        self._llama.detach()

    @property
    def _attention(self) -> TritonAttention:
        attention = self._llama.attention
        assert isinstance(attention, TritonAttention)
        return attention

    def _host_memory(self, size: int) -> Tensor:
        """Of so many int32s."""
        if self._gpu is None:
            return torch.empty(size, dtype=torch.int32)
        return self._gpu.pinned(size * 4).view(torch.int32)

    def _compute(self, step_I: Tensor, step: StepInput) -> Tensor:
        num_tokens = step.bucket or len(step.rows_T)
        num_logits = None if step.bucket else len(step.logit_tokens_B)
        return self._llama.compute(_inputs(step_I, step.tokens_RL, num_tokens, num_logits))


class FlashInferLlama(Llama):
    """With FlashInfer's attention. It is planned anew for each step, so there are no graphs."""

    def __init__(
        self,
        config: ModelConfig,
        partition: ShardPartition,
        weights: ShardWeights,
        collectives: Collectives,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        super().__init__(config, partition, weights, collectives, max_model_len, TritonOps(), FlashInferAttention)
        self._width = config.hidden_size

    @torch.inference_mode()
    def attach(self, cache: KVCache) -> None:
        super().attach(cache)
        parts = (cache, self.attention.q_starts, self.attention.scale, self._width)
        if cache.device.type == "cuda":
            check_kernels(*parts, FlashInferAttention, "flashinfer")


def _inputs(step_I: Tensor, tokens_RL: Tensor, num_tokens: int, num_logits: int | None) -> Inputs:
    """The tokens of a step that is on the device; ``num_logits``: None if the logits of all are wanted."""
    places = token_places(num_tokens, num_logits or 0)
    positions_T = step_I[places.positions]
    logit_tokens_B = None if num_logits is None else step_I[places.logit_tokens]
    return Inputs(tokens_RL[step_I[places.rows], positions_T], positions_T, step_I[places.slots], logit_tokens_B)


def _wanted(step: StepInput, step_I: Tensor, logits_BV: Tensor) -> Tensor:
    """Of the logits that were computed, those that the step wants."""
    num_logits = len(step.logit_tokens_B)
    if not step.bucket or num_logits == len(step.rows_T):
        return logits_BV[:num_logits]
    return logits_BV[step_I[token_places(step.bucket, num_logits).logit_tokens]]
