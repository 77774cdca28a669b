"""A shard under KV policies: its tokens are the oracle's, and its memory is shared out among the groups of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MistralForCausalLM

from headwise.workers import shard
from headwise.workers.collectives import Solo
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import kv_format
from headwise.workers.kv.handoff import HandoffSpec
from headwise.workers.kv.policy import resolve_policy
from headwise.workers.model.model import StepInput
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.shard import Shard
from headwise.workers.spec import ShardSpec
from tests.checkpoints import small_spec, write_mistral
from tests.policy_oracle import Oracle

BLOCK = 16


class Scheduled:
    """A shard, and who plans its steps: gives blocks to rows for each step, and takes them back, spoilt, once no later
    token sees them. Block 0 of each group, which pads tables, is nobody's.

    Attributes:
        logits: those that were computed, step by step.
    """

    def __init__(self, spec: ShardSpec, num_blocks: int) -> None:
        self.shard = Shard(spec, Solo(), 1)
        self.shard.load()
        self.shard.allocate(num_blocks)
        assert self.shard._model is not None and self.shard._kv_cache is not None
        self._cache, self._forward = self.shard._kv_cache, self.shard._model.forward
        self.shard._model.forward = self._record  # type: ignore[method-assign]
        self._reaches = self._cache.policy.reaches
        self._free = [list(range(1, count)) for count in self._cache.group_blocks]
        for group, count in enumerate(self._cache.group_blocks):
            self._spoil(group, list(range(count)))
        self._tables: dict[int, list[list[int]]] = {}
        self._done: dict[int, int] = {}
        self._plan = StepPlan(0)
        self.tokens: dict[int, list[int]] = {}
        self.logits: list[Tensor] = []

    def admit(self, row: int, tokens: list[int]) -> None:
        self.tokens[row], self._done[row], self._tables[row] = list(tokens), 0, [[] for _ in self._reaches]

    def preempt(self, row: int) -> None:
        """It comes back at once, and is computed anew."""
        for group, table in enumerate(self._tables[row]):
            self._take_back(group, table, range(len(table)))
        self._plan.drops.append(row)
        self.admit(row, self.tokens[row])

    def step(self, counts: dict[int, int]) -> None:
        plan = self._plan
        for row, count in counts.items():
            tables, new = self._tables[row], not self._tables[row][0]
            for group, table in enumerate(tables):
                while len(table) * BLOCK < self._done[row] + count:
                    table.append(self._free[group].pop())
                    if not new and group:
                        plan.group_appends.append((group, row, table[-1]))
                    elif not new:
                        plan.appends.append((row, table[-1]))
            if new:
                first, *others = (list(table) for table in tables)
                tokens = list(self.tokens[row])
                plan.admits.append(RowAdmit(row, tokens, len(tokens), 0, first, RowSampling(), tuple(others)))
            plan.computes.append((row, count))
        for row, token in self.shard.step(plan).tokens:
            self.tokens[row].append(token)
        for row, count in counts.items():
            self._done[row] += count
            for group, reach in enumerate(self._reaches):
                stop = reach.first_key(self._done[row]) // BLOCK
                self._take_back(group, self._tables[row][group], range(min(stop, -(-reach.sinks // BLOCK)), stop))
        self._plan = StepPlan(plan.step + 1)

    def finish(self, row: int, num_tokens: int, chunk: int) -> None:
        """Computes a row alone until it has so many tokens."""
        while len(self.tokens[row]) < num_tokens:
            self.step({row: min(chunk, len(self.tokens[row]) - self._done[row])})

    def num_held(self, row: int) -> int:
        return sum(block >= 0 for table in self._tables[row] for block in table)

    def _take_back(self, group: int, table: list[int], indices: range) -> None:
        left = [table[index] for index in indices if table[index] >= 0]
        table[indices.start : indices.stop] = [-1] * len(indices)
        self._spoil(group, left)
        self._free[group] += left

    def _spoil(self, group: int, blocks: list[int]) -> None:
        for part in (part for parts in self._cache.parts for part in parts if part.group == group):
            for x in (part.keys, part.values):
                x[blocks] = 255 if self._cache.format.quantised else float("nan")

    def _record(self, step: StepInput) -> Tensor:
        logits_BV = self._forward(step)
        self.logits.append(logits_BV.clone())
        return logits_BV


@contextmanager
def scheduled(spec: ShardSpec, num_blocks: int) -> Iterator[Scheduled]:
    made = Scheduled(spec, num_blocks)
    try:
        yield made
    finally:
        made.shard.close()


def text(length: int, first: int = 3) -> list[int]:
    return [(first + 7919 * position) % 251 + 3 for position in range(length)]


@pytest.mark.parametrize(
    ("kv_policy", "max_model_len"),
    [
        ("window:40", 64),
        ("sinks:4,44", 64),
        ("sinks:4,44@0;window:20@*", 64),
        ("dense@0;sinks:4,44@*", 500),
        ("window:24@0.1;sinks:5,33@0.2,1.0;dense@*", 500),
    ],
)
@pytest.mark.parametrize("attention", ["reference", "cpu"])
def test_rows_of_any_history_have_the_tokens_of_the_oracle(
    checkpoint: Callable[..., Path], attention: str, kv_policy: str, max_model_len: int
) -> None:
    """Beside each other, in chunks, and computed anew when they are long: where all have windows, longer than the model
    and than all blocks that a row may have."""
    directory = checkpoint("uneven")
    changes = {"max_model_len": max_model_len, "max_num_batched_tokens": 64, "kv_policy": kv_policy}
    bounded = max_model_len == 64
    with scheduled(small_spec(directory, **changes, attention=attention), 40 if bounded else 80) as made:
        made.admit(0, text(230))
        made.step({0: 30})
        made.admit(2, text(9, 5))
        made.step({0: 50, 2: 9})
        for count in (64, 60, 26, *[1] * 70):
            made.step({0: count})
            made.step({2: 1})
        made.preempt(0)
        made.step({2: 1, 0: 63})
        made.finish(0, 330, 60)
        if bounded:
            assert made.num_held(0) <= 4 * len(made._reaches) + 1
    oracle, policy = Oracle(directory), resolve_policy(kv_policy, 2, 3)
    for row, prompt in ((0, text(230)), (2, text(9, 5))):
        oracle.assert_greedy(prompt, made.tokens[row][len(prompt) :], policy)


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "int4"])
def test_keys_and_values_are_kept_as_asked(checkpoint: Callable[..., Path], kv_dtype: str) -> None:
    directory, prompt = checkpoint("gqa"), text(40)
    with scheduled(small_spec(directory, kv_dtype=kv_dtype, attention="reference"), 8) as made:
        made.admit(0, prompt)
        made.finish(0, 60, 13)
        stats, format = made.shard.stats(), kv_format(kv_dtype, 16)
    assert stats["kv_dtype"] == kv_dtype and stats["kv_bytes"] == 8 * 2 * 4 * format.block_bytes(BLOCK, 16)
    Oracle(directory).assert_greedy(prompt, made.tokens[0][40:], None, format, 2e-3)


def test_a_mistral_has_the_logits_that_transformers_says(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory, prompt = write_mistral(tmp_path / "mistral", checkpoint("gqa"), 8), text(30)
    with scheduled(small_spec(directory, attention="reference"), 8) as made:
        made.admit(0, prompt)
        made.finish(0, 60, 11)
        assert made.shard.stats()["kv_policy"] == "window:8"
    logits_TV = torch.cat(made.logits)
    model = MistralForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        expected_TV = model(torch.tensor([made.tokens[0][:-1]]), use_cache=False).logits[0, 29:]
    assert (logits_TV - expected_TV).abs().max() <= 1e-5 * expected_TV.abs().max()


def test_no_policy_lets_a_token_see_more_than_the_model_was_trained_with(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = write_mistral(tmp_path / "mistral", checkpoint("gqa"), 8)
    for kv_policy, expected in (("window:20", "window:8"), ("window:5", "window:5"), ("sinks:4,20", "sinks:4,8")):
        made = Shard(small_spec(directory, kv_policy=kv_policy), Solo(), 1)
        assert made.stats()["kv_policy"] == expected
        made.close()


HEAD_BLOCK = 2 * 16 * 16 * 4
"""Bytes of a head's keys and values of a block."""


def test_groups_with_a_window_have_no_more_blocks_than_they_can_use(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer of two keeps everything, and the other 48 tokens of each of 4 rows."""
    changes = {"kv_policy": "dense@0;window:48@*", "max_num_batched_tokens": 32}
    made = Shard(small_spec(checkpoint("gqa"), **changes, kv_memory=300 * 4 * HEAD_BLOCK), Solo(), 1)
    cap = made._caps[1]
    assert cap is not None and made._caps[0] is None and cap < 100
    made.load()
    assert made.affordable_blocks() == 300 - cap
    made.allocate(300 - cap)
    stats = made.stats()
    assert stats["kv_blocks"] == (300 - cap, cap) and stats["kv_bytes"] == 300 * 4 * HEAD_BLOCK
    made.close()
    monkeypatch.setattr(shard, "free_host_memory", lambda: 200 * 4 * HEAD_BLOCK)
    made.load()
    bytes_wanted = 300 * 4 * HEAD_BLOCK
    with pytest.raises(InvalidValueError, match=rf"^kv_memory=.*{300 - cap} blocks take {bytes_wanted} bytes"):
        made.allocate(300 - cap)
    made.close()


def test_a_narrow_dtype_affords_more_blocks(checkpoint: Callable[..., Path]) -> None:
    found = {}
    for kv_dtype in (None, "float32", "bfloat16", "int8", "int4"):
        made = Shard(small_spec(checkpoint("gqa"), kv_dtype=kv_dtype, kv_memory="1MiB"), Solo(), 1)
        made.load()
        found[kv_dtype] = made.affordable_blocks()
        made.close()
    # Of 16 numbers: 16 and 8 bytes of codes, and 4 of scale and zero.
    assert list(found.values()) == [64, 64, 128, (1 << 20) // (256 * 20), (1 << 20) // (256 * 12)]


@pytest.mark.parametrize(
    ("field", "value"), [("host_kv_blocks", 2), ("disk_kv_path", "/nowhere"), ("handoff", HandoffSpec())]
)
def test_blocks_of_several_groups_do_not_leave_the_device(
    checkpoint: Callable[..., Path], field: str, value: object
) -> None:
    spec = small_spec(checkpoint("gqa"), kv_policy="dense@0;window:48@*", **{field: value})
    with pytest.raises(InvalidValueError, match=r"^kv_policy='dense@0;window:48@\*': has 2 kinds of heads.*handoffs"):
        Shard(spec, Solo(), 1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_policy": "window:0"}, "kv_policy"),
        ({"kv_policy": "dense@7"}, "kv_policy"),
        ({"kv_dtype": "int3"}, "kv_dtype"),
        ({"kv_policy": "window:48", "attention": "cuda"}, "attention"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_any_weight_is_read(
    checkpoint: Callable[..., Path], changes: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Shard(small_spec(checkpoint("gqa"), **changes), Solo(), 1)
    assert caught.value.field == field
