"""A row with a grammar gets tokens that keep to it, whatever else is asked of it and whoever runs beside it."""

from __future__ import annotations

import math
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from torch import Tensor

from headwise.workers.plan import RowSampling
from headwise.workers.sampling import grammar as module
from headwise.workers.sampling.grammar import Constraint, GrammarError, Grammars
from headwise.workers.sampling.sampler import Sampler
from tests.byte_tokenizer import EOS, VOCAB, token_bytes, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.effort import examples
from tests.workers.sampling.languages import Node, choice_grammar, is_open, languages, right_tokens
from tests.workers.sampling.sampling import ints, read, sample

TOKENS = token_bytes()
IDS = {data: token for token, data in TOKENS.items()}
SLOW = examples(100)


SAMPLINGS = st.builds(
    RowSampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3]),
    top_p=st.sampled_from([1.0, 0.9, 1e-6]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.01, 100.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 2.0]),
    num_logprobs=st.sampled_from([-1, 3]),
    seed=st.integers(0, 2**64 - 1),
)


def move_on(sampler: Sampler, row: int, token: int) -> None:
    """Moves a row on in its grammar, if it has one."""
    for constraint in sampler.constraints(ints([row])).values():
        constraint.accept(token)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("spoken"), 8, 4, vocab_size=VOCAB)
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def grammars(model_dir: Path) -> Iterator[Grammars]:
    made = Grammars(model_dir, VOCAB, [EOS])
    yield made
    made.close()


def logits_of(seed: int, position: int) -> Tensor:
    """[1, V], in which what most grammars allow is as likely as not to be far from the top."""
    generator = torch.Generator().manual_seed(seed * 1000 + position)
    return torch.randn((1, VOCAB), generator=generator) * 8


def draw(sampler: Sampler, row: int, logits_1V: Tensor, done: int) -> int:
    """One step of a row, as a runner takes it."""
    result = sample(sampler, logits_1V, [row], [5 + done], [done])
    assert read(result, [row]).failed == {}
    sampler.observe(ints([row]), result.tokens_B)
    token = int(result.tokens_B[0])
    move_on(sampler, row, token)
    return token


def follow(grammars: Grammars, sampling: RowSampling, seed: int, count: int, again_at: Sequence[int] = ()) -> list[int]:
    """A row's tokens up to the end of sequence; before the steps ``again_at`` it is dropped and admitted anew."""
    sampler = Sampler(VOCAB, 1, "cpu", grammars)
    sampler.admit(0, sampling, [7, 8])
    tokens: list[int] = []
    while len(tokens) < count and EOS not in tokens:
        if len(tokens) in again_at:
            sampler.drop(0)
            sampler.admit(0, sampling, [7, 8], tokens)
        tokens.append(draw(sampler, 0, logits_of(seed, len(tokens)), len(tokens)))
    return tokens


def spell(tokens: Sequence[int]) -> bytes:
    return b"".join(TOKENS[token] for token in tokens if token != EOS)


def mask(constraint: Constraint) -> set[int]:
    return set(np.flatnonzero(constraint.allowed()).tolist())


def accept(constraint: Constraint, data: bytes) -> None:
    for byte in data:
        constraint.accept(IDS[bytes([byte])])


# What may come next


@SLOW
@given(languages(), SAMPLINGS, st.integers(0, 2**20))
def test_just_the_tokens_that_continue_the_language_may_come(
    grammars: Grammars, language: tuple[str, Node], sampling: RowSampling, seed: int
) -> None:
    grammar, node = language
    constraint = grammars.constraint(grammar)
    for token in follow(grammars, replace(sampling, grammar=grammar), seed, 12):
        # What a step picks is in here, so what is picked is a prefix of the language, and ends where that is complete.
        right = right_tokens(node, spell(constraint._generated))
        found = mask(constraint)
        # Where there is only one way to go on, of the tokens that begin it only the one that the tokenizer would take.
        assert found == right if is_open(right) else found <= right
        assert token in found
        constraint.accept(token)


@SLOW
@given(languages(), SAMPLINGS, st.integers(0, 2**20), st.sets(st.integers(0, 11)))
def test_a_row_that_is_admitted_again_goes_on_as_it_would_have(
    grammars: Grammars, language: tuple[str, Node], sampling: RowSampling, seed: int, again_at: set[int]
) -> None:
    sampling = replace(sampling, grammar=language[0])
    assert follow(grammars, sampling, seed, 12, sorted(again_at)) == follow(grammars, sampling, seed, 12)


@SLOW
@given(st.lists(st.tuples(languages(), SAMPLINGS, st.booleans()), min_size=2, max_size=6), st.integers(0, 2**20))
def test_rows_with_and_without_a_grammar_do_not_disturb_each_other(
    grammars: Grammars, rows: list[tuple[tuple[str, Node], RowSampling, bool]], seed: int
) -> None:
    samplings = [replace(s, grammar=language[0] if structured else "") for language, s, structured in rows]
    together, alone = Sampler(VOCAB, 6, "cpu", grammars), Sampler(VOCAB, 6, "cpu", grammars)
    for row, sampling in enumerate(samplings):
        together.admit(row, sampling, [7, 8])
        alone.admit(row, sampling, [7, 8])
    for step in range(4):
        logits_BV = torch.cat([logits_of(seed + row, step) for row in range(len(rows))])
        before_BV = logits_BV.clone()
        result = sample(together, logits_BV, range(len(rows)), [step] * len(rows), [step] * len(rows))
        assert torch.equal(logits_BV, before_BV)
        together.observe(np.arange(len(rows)), result.tokens_B)
        logprobs = read(result, range(len(rows))).logprobs
        for row, token in enumerate(result.tokens_B.tolist()):
            one = sample(alone, logits_BV[row : row + 1], [row], [step], [step])
            alone.observe(ints([row]), one.tokens_B)
            sampled = read(one, [row])
            assert (sampled.tokens, sampled.failed) == ([token], {})
            assert sampled.logprobs.get(row) == logprobs.get(row)
            move_on(together, row, token)
            move_on(alone, row, token)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 100.0},
        {"temperature": 1e-4},
        {"repetition_penalty": 100.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 0.01, "temperature": 1.0, "top_k": 2, "top_p": 0.5, "min_p": 0.9},
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e4, 1e35])
def test_what_is_allowed_may_be_the_least_likely_of_all(
    grammars: Grammars, change: dict[str, Any], size: float
) -> None:
    """Its bias is -100, and each of the other tokens is more likely."""
    right = {IDS[b"a"], IDS[b"b"], IDS[b"ab"], IDS[b"bc"], IDS[b"abc"]}
    bias = tuple((token, -100.0 if token in right else 100.0) for token in range(VOCAB))
    grammar = LLMatcher.grammar_from_regex("[ab](b?c)?")
    logits_1V = torch.linspace(0.5, 1, VOCAB)[None] * size
    for token in right:
        logits_1V[0, token] = -size
    for seed in range(4):
        for num_logprobs in (-1, 2):
            sampler = Sampler(VOCAB, 1, "cpu", grammars)
            base = RowSampling(seed=seed, logit_bias=bias, grammar=grammar, num_logprobs=num_logprobs)
            sampler.admit(0, replace(base, **change), sorted(right))
            assert draw(sampler, 0, logits_1V, 0) in right


def test_the_log_probabilities_are_those_without_the_grammar(grammars: Grammars) -> None:
    sampler = Sampler(VOCAB, 1, "cpu", grammars)
    sampler.admit(0, RowSampling(num_logprobs=3, grammar=choice_grammar(["q"])), [7])
    logits_1V = logits_of(1, 0)
    reported = read(sample(sampler, logits_1V, [0], [1], [0]), [0]).logprobs[0]
    logprobs_V = logits_1V.log_softmax(-1)[0]
    assert reported.chosen == logprobs_V[IDS[b"q"]].item()
    assert list(reported.top_ids) == logprobs_V.topk(3).indices.tolist()


def test_steps_after_the_end_are_harmless(grammars: Grammars) -> None:
    """The step after the last token is submitted before that is seen."""
    sampler = Sampler(VOCAB, 2, "cpu", grammars)
    sampler.admit(0, RowSampling(temperature=1.0, grammar=choice_grammar(["a"])), [7])
    sampler.admit(1, RowSampling(temperature=1.0, seed=5), [7])
    tokens = []
    for step in range(6):
        logits_2V = torch.cat([logits_of(3, step), logits_of(4, step)])
        sampled = read(sample(sampler, logits_2V, [0, 1], [step] * 2, [step] * 2), [0, 1])
        assert sampled.failed == {}
        tokens.append(sampled.tokens)
        for row in range(2):
            move_on(sampler, row, tokens[-1][row])
    assert [token for token, _ in tokens] == [IDS[b"a"], *[EOS] * 5]


@pytest.mark.parametrize(
    "grammar",
    [
        choice_grammar(["a</s>b"]),
        LLMatcher.grammar_from_lark('start: "a" </s> "b"'),
        LLMatcher.grammar_from_regex("a</s>"),
    ],
)
def test_no_text_is_taken_for_the_end_of_the_sequence(grammars: Grammars, grammar: str) -> None:
    """Though the tokenizer would: what is incomplete must not end as if it were complete."""
    constraint = grammars.constraint(grammar)
    assert mask(constraint) == {IDS[b"a"]}
    accept(constraint, b"a")
    with pytest.raises(GrammarError, match="no token of the model's vocabulary continues"):
        constraint.allowed()


def test_ids_that_stand_for_nothing_are_never_allowed(grammars: Grammars) -> None:
    assert mask(grammars.constraint(LLMatcher.grammar_from_regex(r"(?s).*"))) == {
        EOS,
        *(token for token, data in TOKENS.items() if right_utf8(data)),
    }


def right_utf8(data: bytes) -> bool:
    """Whether text may begin with these bytes."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


# What cannot be followed

# So many ways to go on after "ab" that the parser gives up.
TOO_AMBIGUOUS = LLMatcher.grammar_from_lark(
    'start: "a" body\nbody: '
    + " | ".join(f"r{i}" for i in range(200))
    + "".join(f'\nr{i}: "b" r{i} "c{i}" | "b"' for i in range(200))
)


def test_a_token_that_was_not_allowed_shows_at_the_next(grammars: Grammars) -> None:
    constraint = grammars.constraint(choice_grammar(["ab"]))
    assert mask(constraint) == {IDS[b"ab"]}
    constraint.accept(IDS[b"c"])
    for _ in range(2):
        with pytest.raises(GrammarError, match="cannot be followed further"):
            constraint.allowed()
    with pytest.raises(GrammarError, match="cannot be followed further"):
        grammars.constraint(choice_grammar(["ab"]), [IDS[b"c"]]).allowed()


def test_a_grammar_that_is_too_much_fails_its_row_alone(grammars: Grammars) -> None:
    sampler, free = Sampler(VOCAB, 3, "cpu", grammars), Sampler(VOCAB, 3, "cpu")
    samplings = [RowSampling(temperature=1.0, seed=row) for row in range(3)]
    for row, sampling in enumerate(samplings):
        free.admit(row, sampling, [7])
        sampler.admit(row, replace(sampling, grammar=TOO_AMBIGUOUS, num_logprobs=1) if row == 1 else sampling, [7])
    failed, rows = [], [0, 1, 2]
    for step in range(4):
        logits_3V = torch.cat([logits_of(row, step) for row in range(3)])
        results = (sample(s, logits_3V, rows, [step] * 3, [step] * 3) for s in (sampler, free))
        sampled, expected = (read(result, rows) for result in results)
        assert sampled.tokens[::2] == expected.tokens[::2]
        assert sampled.verified == list(sampled.failed)
        assert set(sampled.logprobs) == (set() if sampled.failed else {1})
        failed.append(sampled.failed)
        if not sampled.failed:
            move_on(sampler, 1, sampled.tokens[1])
    assert failed[0] == {} and list(failed[-1]) == [1]
    assert failed[-1][1].startswith("the grammar cannot be followed further: Parser Error: Current row has")
    # What is wrong with the model's own numbers is not put on the grammar: others must not get this row's blocks.
    logits_3V[1, 0] = math.nan
    sampled = read(sample(sampler, logits_3V, rows, [4] * 3, [4] * 3), rows)
    assert (sampled.failed, sampled.verified) == ({1: "the model's logits are not finite"}, [])
    # The row is as good as any other once it is given to somebody else.
    sampler.admit(1, RowSampling(grammar=choice_grammar(["é"])), [7])
    assert draw(sampler, 1, logits_of(1, 1), 0) in {IDS["é".encode()], IDS["é".encode()[:1]]}


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (LLMatcher.grammar_from_regex("("), "invalid regex"),
        (LLMatcher.grammar_from_lark("start: nobody"), "nobody"),
        ("no grammar at all", "Expected token"),
        (LLMatcher.grammar_from_regex(r"[^\s\S]"), "NoExtension"),
    ],
)
def test_a_grammar_that_is_none_is_refused(grammars: Grammars, grammar: str, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(GrammarError, match=reason) as caught:
            grammars.constraint(grammar).allowed()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def random_walk(constraint: Constraint, seed: int, count: int) -> int:
    """How many tokens are there, of ``count``, when the grammar fails."""
    chance = random.Random(seed)
    for done in range(count):
        try:
            constraint.accept(chance.choice(sorted(mask(constraint) - {EOS})))
        except GrammarError:
            return done
    return count


def test_what_one_row_makes_of_a_grammar_does_not_use_it_up_for_others(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of a compiled grammar share the states of its lexer, of which there is a limit."""
    monkeypatch.setattr(module, "_MAX_LEXER_STATES", 2000)
    made = Grammars(model_dir, VOCAB, [EOS])
    many_states = LLMatcher.grammar_from_regex(".*a.{2000}b")  # one for each set of places where an a was
    beside = made.constraint(many_states)
    accept(beside, b"abc")
    expected = mask(beside)
    lengths = [random_walk(made.constraint(many_states), seed, 2000) for seed in range(3)]
    assert max(lengths) < 2000, "the limit was not reached"
    assert min(lengths) > 100
    assert mask(beside) == expected
    accept(beside, b"ca")
    assert mask(beside) == expected
    # One that comes back, and one that is new.
    assert mask(made.constraint(many_states, [IDS[b"abc"], IDS[b"c"]])) == expected
    assert random_walk(made.constraint(many_states), 9, 100) == 100
    made.close()


# Its letters are too much for little fuel, and its last part is not.
HEAVY_AND_LIGHT = LLMatcher.grammar_from_lark(
    'start: "x" HEAVY | "y" LIGHT\nHEAVY: /(\\p{L}+ ?){1,50}/\nLIGHT: /[ab]{9}/'
)


def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars that are compiled, from now on."""
    found: list[str] = []
    compile_grammar = module.compile_grammar
    monkeypatch.setattr(
        module, "compile_grammar", lambda tokenizer, g: found.append(g) or compile_grammar(tokenizer, g)
    )
    return found


def test_rows_that_come_to_too_many_states_together_compile_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_LEXER_STATES", 300)
    found = compiled(monkeypatch)
    made = Grammars(model_dir, VOCAB, [EOS])
    grammar = LLMatcher.grammar_from_regex(".*a.{2000}b")
    rows = [made.constraint(grammar) for _ in range(16)]
    chance = random.Random(2)
    for _ in range(200):
        first, *others = [mask(row) for row in rows]
        assert all(other == first for other in others)
        if len(found) > 1:
            break
        token = chance.choice(sorted(first - {EOS}))
        for row in rows:
            row.accept(token)
    assert found == [grammar] * 2
    made.close()


def test_a_row_that_is_too_much_by_itself_fails_alone_and_makes_nobody_compile_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP_LEXER_FUEL", 1000)
    found = compiled(monkeypatch)
    made = Grammars(model_dir, VOCAB, [EOS])
    heavy, light = ([made.constraint(HEAVY_AND_LIGHT) for _ in range(8)] for _ in range(2))
    expected = {IDS[b"a"], IDS[b"b"], IDS[b"ab"]}
    for row in light:
        accept(row, b"y")
        assert mask(row) == expected
    for row in heavy:
        accept(row, b"xthe")
        for _ in range(2):
            with pytest.raises(GrammarError, match="cannot be followed further: lexer error: too many expressions"):
                row.allowed()
    assert len(found) == 1
    for row in light:  # whose lexer it was
        assert mask(row) == expected
        accept(row, b"a")
        assert mask(row) == expected
    assert mask(made.constraint(HEAVY_AND_LIGHT)) == {IDS[b"x"], IDS[b"y"]}
    assert len(found) == 2
    made.close()


def test_rows_that_are_too_much_at_several_places_compile_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP_LEXER_FUEL", 1000)
    found = compiled(monkeypatch)
    made = Grammars(model_dir, VOCAB, [EOS])
    rows = [made.constraint(HEAVY_AND_LIGHT) for _ in range(8)]
    for row, letter in zip(rows, "abcdefgh", strict=True):
        accept(row, f"xth{letter}".encode())
        with pytest.raises(GrammarError, match="too many expressions"):
            row.allowed()
    assert len(found) == 2
    made.close()


def test_one_that_could_not_be_compiled_is_tried_again_by_the_next_row(model_dir: Path, tmp_path: Path) -> None:
    made = Grammars(tmp_path, VOCAB, [EOS])
    grammar = choice_grammar(["a"])
    early = made.constraint(grammar)
    with pytest.raises(GrammarError, match="cannot be compiled on this host"):
        early.allowed()
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    assert mask(made.constraint(grammar)) == {IDS[b"a"]}
    made.close()


# Keeping them


def test_no_more_than_so_many_are_kept_compiled(grammars: Grammars) -> None:
    kept = [grammars.constraint(choice_grammar([f"a{i}"])) for i in range(2 * module.MAX_COMPILED)]
    assert len(grammars._compiled) == module.MAX_COMPILED
    for constraint in kept:  # also those that are no longer kept
        assert mask(constraint) == {IDS[b"a"]}
    grammars.constraint(choice_grammar([f"a{module.MAX_COMPILED}"]))  # used, and so not the next to go
    grammars.constraint(choice_grammar(["b"]))
    assert choice_grammar([f"a{module.MAX_COMPILED}"]) in grammars._compiled
    assert choice_grammar([f"a{module.MAX_COMPILED + 1}"]) not in grammars._compiled
    assert mask(grammars.constraint(choice_grammar(["a0"]))) == {IDS[b"a"]}


def test_rows_of_a_grammar_share_what_is_compiled(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(monkeypatch)
    made = Grammars(model_dir, VOCAB, [EOS])
    rows = [made.constraint(choice_grammar(["ab", "b"])) for _ in range(3)]
    start = {IDS[b"a"], IDS[b"ab"], IDS[b"b"]}
    assert [mask(row) for row in rows] == [start] * 3
    rows[0].accept(IDS[b"b"])
    rows[1].accept(IDS[b"a"])
    assert [mask(row) for row in rows] == [{EOS}, {IDS[b"b"]}, start]
    assert found == [choice_grammar(["ab", "b"])]
    made.close()


def test_closing_ends_the_thread_and_may_be_done_again(model_dir: Path) -> None:
    Grammars(model_dir, VOCAB, [EOS]).close()
    before = set(threading.enumerate())
    made = Grammars(model_dir, VOCAB, [EOS])
    assert mask(made.constraint(choice_grammar(["a"]))) == {IDS[b"a"]}
    assert len(set(threading.enumerate()) - before) == 1
    for _ in range(2):
        made.close()
        assert set(threading.enumerate()) <= before


def test_every_end_of_sequence_may_end_it(model_dir: Path) -> None:
    made = Grammars(model_dir, VOCAB, [EOS, 0])
    constraint = made.constraint(choice_grammar(["a"]))
    assert mask(constraint) == {IDS[b"a"]}
    constraint.accept(IDS[b"a"])
    assert mask(constraint) == {EOS, 0}
    constraint.accept(0)
    assert mask(constraint) <= {EOS, 0}
    made.close()
