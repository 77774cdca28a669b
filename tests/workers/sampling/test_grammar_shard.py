"""A shard with rows that have a grammar: which fail, why, and how one goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from llguidance import LLMatcher

from headwise.workers.collectives import Solo
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.shard import Shard
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import small_spec, write_checkpoint
from tests.workers.sampling.languages import choice_grammar
from tests.workers.sampling.test_grammar import TOO_AMBIGUOUS, spell


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("spoken"), 8, 4, vocab_size=VOCAB)
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture
def start(model_dir: Path) -> Iterator[Callable[..., Shard]]:
    made: list[Shard] = []

    def make(directory: Path = model_dir) -> Shard:
        made.append(Shard(small_spec(directory, kv_memory="2MiB"), Solo(), 1))
        made[-1].load()
        made[-1].allocate(16)
        return made[-1]

    yield make
    for shard in made:
        shard.close()


def admits(grammars: Sequence[str]) -> list[RowAdmit]:
    prompts = [[5 + row, 6, 7] for row in range(len(grammars))]
    return [
        RowAdmit(row, prompts[row], 3, 0, [2 * row, 2 * row + 1], RowSampling(temperature=1.0, seed=row, grammar=g))
        for row, g in enumerate(grammars)
    ]


def run(shard: Shard, grammars: Sequence[str], steps: int) -> tuple[list[list[int]], dict[int, list[str]]]:
    """By row: the tokens, and the reasons of the steps that failed."""
    tokens: list[list[int]] = [[] for _ in grammars]
    failed: dict[int, list[str]] = {}
    rows = range(len(grammars))
    for step in range(steps):
        first = {"admits": admits(grammars), "computes": [(row, 3) for row in rows]}
        output = shard.step(StepPlan(step, **(first if step == 0 else {"computes": [(row, 1) for row in rows]})))
        assert sorted([row for row, _ in output.tokens] + [row for row, _ in output.failed]) == list(rows)
        assert output.verified == [row for row, _ in output.failed], "their logits are finite"
        for row, token in output.tokens:
            tokens[row].append(token)
        for row, reason in output.failed:
            failed.setdefault(row, []).append(reason)
    return tokens, failed


def test_a_shard_tells_which_row_failed_and_why(start: Callable[..., Shard]) -> None:
    free, none = run(start(), ["", "", ""], 6)
    tokens, failed = run(start(), ["", TOO_AMBIGUOUS, ""], 6)
    assert none == {}
    assert (tokens[0], tokens[2]) == (free[0], free[2])
    assert spell(tokens[1]) in (b"a", b"ab", b"abb")
    assert list(failed) == [1] and len(failed[1]) == 6 - len(tokens[1])
    assert {"Current row has" in reason for reason in failed[1]} == {True}


def test_a_shard_goes_on_where_the_row_was(start: Callable[..., Shard]) -> None:
    shard = start()
    grammars = [LLMatcher.grammar_from_regex("[abc]{40}"), choice_grammar(["abcabc"]), ""]
    expected, _ = run(start(), grammars, 8)
    tokens, _ = run(shard, grammars, 4)
    again = [
        replace(admit, token_ids=[*admit.token_ids, *tokens[admit.row]], block_ids=[b + 6 for b in admit.block_ids])
        for admit in admits(grammars)
    ]
    for step in range(4, 8):
        plan = StepPlan(step, computes=[(row, 1) for row in range(3)])
        if step == 4:
            plan = StepPlan(step, drops=[0, 1, 2], admits=again, computes=[(row, 7) for row in range(3)])
        for row, token in shard.step(plan).tokens:
            tokens[row].append(token)
    assert tokens == expected


@pytest.mark.parametrize("spoil", ["missing", "no JSON", "no tokenizer", "not UTF-8"])
def test_without_a_tokenizer_a_row_with_a_grammar_fails_alone(
    start: Callable[..., Shard], model_dir: Path, tmp_path: Path, spoil: str
) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "mute")
    spoiled = {"no JSON": b"{", "no tokenizer": b'{"model": 3}', "not UTF-8": b"\xff"}
    (directory / "tokenizer.json").unlink()
    if spoil in spoiled:
        (directory / "tokenizer.json").write_bytes(spoiled[spoil])
    free, _ = run(start(), ["", "", ""], 3)
    tokens, failed = run(start(directory), ["", "", choice_grammar(["a"])], 3)
    assert tokens == [free[0], free[1], []]
    assert list(failed) == [2] and len(failed[2]) == 3
    assert failed[2][0].startswith("the grammar cannot be compiled on this host: ")


def test_a_token_read_back_late_moves_on_the_row_that_it_was_sampled_for(start: Callable[..., Shard]) -> None:
    """Between launch and finish another request gets the row, with the same grammar; it spells the whole of it."""
    shard, word = start(), "abc"
    runner = shard._runner
    assert runner is not None
    [admit] = admits([choice_grammar([word])])
    first = runner.launch(StepPlan(0, admits=[admit], computes=[(0, 3)]))
    found = [runner.launch(StepPlan(1, drops=[0], admits=[admit], computes=[(0, 3)]))]
    runner.finish(first)
    tokens = runner.finish(found[0]).tokens
    for step in range(2, 4):
        tokens += shard.step(StepPlan(step, computes=[(0, 1)])).tokens
    assert spell([token for _, token in tokens]) == word.encode()
