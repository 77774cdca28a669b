"""A grammar is brought into the shards' form; a hostile one gets no further than its trial."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from headwise.runtime import grammars as module
from headwise.runtime.grammar_trial import WALL_SECONDS, read_frame, write_frame
from headwise.runtime.grammars import GrammarChecker, GrammarTrialError
from headwise.runtime.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.grammar import GrammarError, Grammars, allowed, compile_grammar, load_tokenizer
from tests.byte_tokenizer import EOS, VOCAB, token_bytes, write_byte_tokenizer

TOKENS = token_bytes()
IDS = {data: token for token, data in TOKENS.items()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("spoken")
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> LLTokenizer:
    return load_tokenizer(model_dir, VOCAB, [EOS])


@pytest.fixture(scope="module")
def shared(model_dir: Path) -> Iterator[GrammarChecker]:
    made = GrammarChecker(model_dir, VOCAB, [EOS])
    yield made
    made.close()


@pytest.fixture
def checker(shared: GrammarChecker) -> Iterator[GrammarChecker]:
    """After the test its process must be the one that it was, and must still answer."""
    shared.grammar(StructuredOutputsParams(choice=["before"]))
    before = pid(shared)
    yield shared
    shared._verdicts.clear()
    assert shared.grammar(StructuredOutputsParams(choice=["after"]))
    assert pid(shared) == before


def pid(checker: GrammarChecker) -> int:
    assert checker._process is not None
    return checker._process.pid


def cannot(checker: GrammarChecker, reason: str = "", **given_: Any) -> str:
    params = StructuredOutputsParams(**given_)
    with pytest.raises(InvalidValueError, match=reason or None) as caught:
        checker.grammar(params)
    assert caught.value.field == params.field
    assert caught.value.limit.startswith("cannot be used: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return caught.value.limit


def accepts(checker: GrammarChecker, tokenizer: LLTokenizer, text: str, **given_: Any) -> bool:
    """Whether the text, byte by byte, is an output that may end there."""
    matcher = compile_grammar(tokenizer, checker.grammar(StructuredOutputsParams(**given_)))
    for byte in text.encode():
        if not matcher.consume_token(IDS[bytes([byte])]):
            return False
    return bool(allowed(matcher, VOCAB)[EOS])


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ({"json_object": True}, ["{}", '{"a": [1, null, "é"]}', '{"a":{"b":{}}}'], ["[]", "3", "{", "", "{} "]),
        ({"json": {"type": "integer"}}, ["0", "-17"], ["1.5", "01", '"1"', ""]),
        ({"json": '{"enum": ["a", 1, null]}'}, ['"a"', "1", "null"], ["a", "2"]),
        ({"regex": "a+b?"}, ["a", "aab"], ["", "b", "abb"]),
        ({"regex": "a|bc"}, ["a", "bc"], ["ac", "abc"]),
        ({"regex": "^ab$"}, ["ab"], ["^ab$", "a"]),
        ({"regex": "a/b\nc"}, ["a/b\nc"], ["a/b"]),
        ({"regex": r"[/\\]\/"}, ["//", "\\/"], ["/\\"]),
        ({"regex": "a/\nb: /c"}, ["a/\nb: /c"], ["a"]),
        ({"regex": "(?i)é"}, ["é", "É"], ["e"]),
        ({"regex": "."}, ["a", "日", '"'], ["\n", "ab"]),
        ({"choice": ["a", "ab", "b"]}, ["a", "ab", "b"], ["", "abb"]),
        ({"grammar": 'start: "a" rest\nrest: "b" rest | "c"'}, ["ac", "abbc"], ["a", "ab"]),
        ({"grammar": 'root ::= "a" rest\nrest ::= "b" rest | [c-d]'}, ["ac", "abbd"], ["a", "abe"]),
        ({"grammar": 'start: "x" %json {"type": "boolean"}'}, ["xtrue"], ["x", "xnull"]),
        ({"regex": r"a\\"}, ["a\\"], ["a"]),
        ({"regex": r"[(?x)]\(?x\)(?-x: )"}, ["?(x) ", "(x) "], [""]),
        ({"grammar": r'root ::= "\u00e9ab\x41"'}, ["éabA"], ["\ue9abA", "é"]),
        ({"grammar": r'root ::= "\U0001F600\u65E5" # "\u00zz'}, ["😀日"], [""]),
        ({"grammar": r'root ::= "\x22\x5c\u000a\[\\u0041\""'}, ['"\\\n[\\u0041"'], []),
        ({"grammar": r"root ::= [\u00e9\u65e5-\u672c\x41-\x43]"}, ["é", "曜", "B"], ["-", "e", "x", "D"]),
        ({"grammar": r"root ::= [a\x2dc] [^\x5e\x5d] [\x01\]]"}, ["-b\x01", "ab]"], ["b-]", "a^]", "a]]"]),
        ({"grammar": "root ::= [ab&&bc]"}, ["a", "&", "c"], ["&&", "x"]),
        ({"grammar": 'start: "</ s>" | /<\\/s?>+/ // </s>'}, ["</ s>", "</s>>"], ["", "<"]),
        ({"grammar": 'start: %json {"const": "<[2]>"}'}, ['"<[2]>"'], ["<[2]>"]),
    ],
)
def test_an_output_is_what_was_asked_for(
    checker: GrammarChecker, tokenizer: LLTokenizer, asked: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not accepts(checker, tokenizer, text, **asked)] == []
    assert [text for text in wrong if accepts(checker, tokenizer, text, **asked)] == []


def test_digits_and_letters_are_ascii(checker: GrammarChecker, tokenizer: LLTokenizer) -> None:
    for regex, right, wrong in ((r"\d", "5", "٣"), (r"\w", "a", "é"), (r"[\d]", "0", "\uff15"), (r"\D", "é", "7")):
        assert accepts(checker, tokenizer, right, regex=regex)
        assert not accepts(checker, tokenizer, wrong, regex=regex)
        schema = {"type": "string", "pattern": f"^{regex}$"}
        assert accepts(checker, tokenizer, f'"{right}"', json=schema)
        assert not accepts(checker, tokenizer, f'"{wrong}"', json=schema)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        TEXT | st.sampled_from(['a"b', "\\", '\\"', "\n", "/", "\x00\x7f\x85", "CHOICE", "日\u2028", '" | "x']),
        min_size=1,
        max_size=4,
    )
)
def test_a_choice_is_taken_literally(shared: GrammarChecker, tokenizer: LLTokenizer, choices: list[str]) -> None:
    for text in choices:
        assert accepts(shared, tokenizer, text, choice=choices)
        assert accepts(shared, tokenizer, text[:-1], choice=choices) == (text[:-1] in choices)
        assert accepts(shared, tokenizer, text + "x", choice=choices) == (text + "x" in choices)


def test_as_many_choices_as_there_may_be_are_fine(checker: GrammarChecker, tokenizer: LLTokenizer) -> None:
    chance = random.Random(1)
    for letters in ("abcdefgh ", "日本語文字", "😀😁😂😃"):
        size = MAX_GRAMMAR_BYTES // MAX_CHOICES // len(letters[0].encode())
        choices = ["".join(chance.choice(letters) for _ in range(size)) for _ in range(MAX_CHOICES)]
        assert accepts(checker, tokenizer, choices[700], choice=choices)
        assert not accepts(checker, tokenizer, choices[700] + "a", choice=choices)


def test_choices_take_no_more_than_they_are_long(checker: GrammarChecker) -> None:
    choices = ["é" * 20_000, "日" * 10_000]
    grammar = checker.grammar(StructuredOutputsParams(choice=choices))
    assert len(grammar.encode()) < sum(len(text.encode()) for text in choices) + 100


@pytest.mark.parametrize("asked", [{"json_object": True}, {"json": {"type": "object"}}])
def test_white_space_is_bounded(checker: GrammarChecker, tokenizer: LLTokenizer, asked: dict[str, Any]) -> None:
    for space in (" ", "\n" + 40 * " ", "\n\t\t", ""):
        assert accepts(checker, tokenizer, f'{{"a":{space}1,{space}"b": 2}}', **asked)
    for space in ("  ", "\n\n", "\n" + 41 * " ", "\t", "\r\n"):
        assert not accepts(checker, tokenizer, f'{{"a":{space}1}}', **asked)
    mine = {"type": "object", "x-guidance": {"whitespace_pattern": "[ ]*"}}
    assert not accepts(checker, tokenizer, '{"a":  1}', json=mine)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": "("}, "invalid regex"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "a{3,2}"}, "invalid repetition"),
        ({"regex": r"[^\s\S]"}, ""),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"enum": []}}, "empty"),
        ({"json": {"$ref": "#/$defs/nobody"}}, "nobody"),
        ({"json": {"$ref": "http://localhost/schema"}}, "does not fetch"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "does not fetch"),
        ({"json": {"properties": {"a": False}, "required": ["a"], "type": "object"}}, "unsatisfiable"),
        ({"json": {"x-guidance": {"whitespace_flexible": 5}}}, "boolean"),
        ({"json": '{"const": NaN}'}, "expected value"),
        ({"json": {"const": "\ud83d"}}, "hex escape"),
        ({"json": '{"items": ' * 500 + "{}" + "}" * 500}, ""),
        ({"grammar": "start: nobody"}, "nobody"),
        ({"grammar": "start: start"}, ""),
        ({"grammar": 'root ::= "a'}, ""),
        ({"grammar": "root ::= ((("}, r"Expected '\)'"),
        ({"grammar": 'nobody ::= "a"'}, "No 'root' rule found"),
        ({"grammar": "root ::= i"}, "Rule 'i' not found"),
        ({"grammar": 'root ::= "\\'}, "ends within an escape"),
        ({"grammar": 'root ::= "\\xZZ"'}, "Invalid .x escape"),
        ({"grammar": 'root ::= "a\\u0001"'}, r"control character .u0001 in a string; write it as a class, \[.x01\]"),
        ({"grammar": 'root ::= "\\uD83D"'}, "D83D is the code of no character"),
        ({"grammar": 'root ::= "\\U00110000"'}, "00110000 is the code of no character"),
        ({"grammar": 'start: "a" </s> "b"'}, "names </s>, an end of sequence"),
        ({"grammar": 'start: "a" <[2]>'}, r"names <\[2\]>"),
        ({"grammar": 'start: b | "a"\nb: "/" <pad> <[0,1-+03]>'}, r"names <\[0,1-\+03\]>"),
        ({"grammar": 'start: "a" <[*]>'}, "names <"),
        ({"grammar": 'start: "a" <[^5]>'}, "names <"),
        ({"regex": "a\\"}, "ends in a backslash"),
        ({"regex": r"[a\\]\\" + "\\"}, "ends in a backslash"),
        ({"regex": "(?x) a # b\n c"}, "flag x"),
        ({"regex": r"\((?i-sx:a)(?six:a)"}, "flag x"),
        ({"choice": ["</s>"]}, "allows no token"),
        ({"choice": ["\x01" * 60_000]}, "takes 360024 bytes in llguidance's form, of which there may be 262144"),
        ({"regex": r"\w" * 40_000}, "bytes in llguidance's form"),
        ({"grammar": "\x00"}, ""),
        ({"grammar": "start: %import /etc/passwd"}, "%import"),
        ({"grammar": "start: <[300-400]>"}, "too large"),
        ({"grammar": 'start: %json {"type": "strin"}'}, "strin"),
    ],
)
def test_what_is_not_well_formed_is_refused_with_the_reason(
    checker: GrammarChecker, asked: dict[str, Any], reason: str
) -> None:
    first = cannot(checker, reason, **asked)
    assert cannot(checker, reason, **asked) == first


def chain_of_references(kind: str, count: int) -> str:
    start, arrow = ("start", ":") if kind == "lark" else ("root", "::=")
    rules = [f"{start} {arrow} a0", *(f"a{i} {arrow} a{i + 1}" for i in range(count)), f'a{count} {arrow} "x"']
    return "\n".join(rules)


def chain_of_schemas(count: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": defs | {f"a{count}": {"type": "string"}}}


TOO_MUCH = "too deep|too much memory|takes more than|too deeply nested|too large"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a deep chain of references": ({"grammar": chain_of_references("lark", 3000)}, TOO_MUCH),
    "a deep chain in GBNF": ({"grammar": chain_of_references("gbnf", 8000)}, TOO_MUCH),
    "many multiples": ({"json": {"multipleOf": 9000001}}, TOO_MUCH),
    "many options": ({"regex": "(a|b)?" * 20000}, TOO_MUCH),
    "a loop of schemas": ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, ""),
    "a deep chain of schemas": ({"json": chain_of_schemas(3000)}, TOO_MUCH),
    "parentheses in GBNF": ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, TOO_MUCH),
    "parentheses in Lark": ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, TOO_MUCH),
    "parentheses in a regex": ({"regex": "(" * 5000 + "a" + ")" * 5000}, ""),
    "many patterns at once": (
        {"json": {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(40)]}},
        TOO_MUCH,
    ),
}
# Far beyond what is bounded: the trial, a slow machine, and the start of the process.
DEADLINE_S = 2 * WALL_SECONDS + 20


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_in_time(checker: GrammarChecker, name: str) -> None:
    asked, reason = HOSTILE[name]
    started = time.monotonic()
    cannot(checker, reason, **asked)
    assert time.monotonic() - started < DEADLINE_S
    assert checker.grammar(StructuredOutputsParams(choice=[f"after {name}"]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["regex", "grammar", "json"]), st.text(max_size=30), st.randoms(use_true_random=False))
def test_no_text_is_too_much_for_the_checker(
    shared: GrammarChecker, tokenizer: LLTokenizer, field: str, noise: str, chance: random.Random
) -> None:
    """Grammars with a part cut out, and noise in its place: they compile here too, or are refused."""
    some = {
        "regex": [r"(a|[^b-z]{2,5})*\p{L}+(?i:x)?", r"^\d{3}-\w+$"],
        "grammar": [chain_of_references("gbnf", 4), 'start: A b+ %json {"type": "null"}\nA: /a+/\nb: "x"{2,3} | <[5]>'],
        "json": [
            json.dumps(chain_of_schemas(2)),
            '{"type":"array","items":{"pattern":"a+","minLength":3},"minItems":2}',
        ],
    }
    text = chance.choice(some[field])
    first = chance.randint(0, len(text))
    text = text[:first] + noise + text[chance.randint(first, len(text)) :]
    process = shared._process
    with suppress(InvalidValueError):
        grammar = shared.grammar(StructuredOutputsParams(**{field: text}))  # type: ignore[arg-type]
        assert allowed(compile_grammar(tokenizer, grammar), VOCAB).any()
    assert process is None or shared._process is process


# What takes a long time to follow, on the vocabulary of a real model

WORDS = "The quick brown fox jumps over the lazy dog and then it goes home to sleep a while"
NAMES = [f"field{i}" for i in range(150)]
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["v"],
        }
    },
}
ARITHMETIC = """start: stmt+
stmt: NAME "=" sum ";"
?sum: product | sum "+" product | sum "-" product
?product: atom | product "*" atom | product "/" atom
?atom: NUMBER | "-" atom | NAME | "(" sum ")" | NAME "(" [sum ("," sum)*] ")"
NAME: /[a-z_][a-z0-9_]*/
NUMBER: /[0-9]+(\\.[0-9]+)?/"""


def a_tree(depth: int) -> dict[str, Any]:
    return {"v": depth, "kids": [a_tree(depth - 1) for _ in range(2)]} if depth else {"v": "a leaf"}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"json": {"type": "string", "pattern": "cat|dog|bird", "maxLength": 100}}, f'"{WORDS} with a cat"'),
        ({"json": {"type": "object", "properties": {"s": {"pattern": r"^(\w+ ?){1,60}$"}}}}, f'{{"s": "{WORDS}"}}'),
        ({"json": {"type": "string", "pattern": "^.*(cat|dog).*$", "maxLength": 1000}}, f'"{WORDS}"'),
        ({"json": {"type": "string", "pattern": r"^(\w+[ ,.]*){1,40}$"}}, f'"{WORDS}"'),
        ({"json": {"enum": [f"{i} {WORDS[i % 40 :]} {i * i}" for i in range(800)]}}, f'"777 {WORDS[17:]} {777 * 777}"'),
        ({"json": {"type": "object", "properties": {n: {} for n in NAMES}}}, json.dumps(dict.fromkeys(NAMES[::9], 1))),
        (
            {"json": {"type": "object", "properties": {"s": {"type": "string", "maxLength": 2000}}}},
            f'{{"s":"{WORDS}"}}',
        ),
        ({"json": TREE}, json.dumps(a_tree(4))),
        ({"json_object": True}, json.dumps(a_tree(3), indent=2)),
        ({"regex": r"(\p{L}+ ?){1,50}"}, WORDS),
        ({"regex": r"(\w+ ?){1,60}"}, WORDS),
        ({"grammar": ARITHMETIC}, "foo=a*(b+c)/3.5-bar(x,y*z,-2);q=((((1+2)*3)));"),
    ],
)
def test_what_is_ordinary_can_be_followed_to_the_end(
    demo: tuple[GrammarChecker, Grammars, Tokenizer], asked: dict[str, Any], text: str
) -> None:
    checker, grammars, words = demo
    constraint = grammars.constraint(checker.grammar(StructuredOutputsParams(**asked)))
    for token in words.encode(text, add_special_tokens=False).ids:
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert constraint.allowed()[DEMO_EOS]


DEMO_VOCAB, DEMO_EOS = 49152, 2


@pytest.fixture(scope="module")
def demo(smollm2: Path) -> Iterator[tuple[GrammarChecker, Grammars, Tokenizer]]:
    about = smollm2, DEMO_VOCAB, [DEMO_EOS]
    checker, grammars = GrammarChecker(*about), Grammars(*about)
    yield checker, grammars, Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    checker.close()
    grammars.close()


# The checker's process


@pytest.fixture
def own(model_dir: Path) -> Iterator[GrammarChecker]:
    made = GrammarChecker(model_dir, VOCAB, [EOS])
    yield made
    made.close()


def asked(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that reach the process, from now on."""
    questions: list[str] = []
    ask = checker._ask
    monkeypatch.setattr(checker, "_ask", lambda question: questions.append(question) or ask(question))
    return questions


def test_verdicts_are_remembered(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = asked(own, monkeypatch)
    good, bad = StructuredOutputsParams(regex="a"), {"regex": "("}
    grammar = own.grammar(good)
    reason = cannot(own, **bad)
    assert len(questions) == 2
    for _ in range(3):
        assert own.grammar(StructuredOutputsParams(regex="a")) == grammar
        assert cannot(own, **bad) == reason
    assert len(questions) == 2
    # What is the same text is not the same question.
    assert own.grammar(StructuredOutputsParams(choice=["a"])) != grammar
    assert len(questions) == 3


def test_no_more_than_so_many_are_remembered(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VERDICTS", 3)
    questions = asked(own, monkeypatch)
    for text in "abcd":
        own.grammar(StructuredOutputsParams(regex=text))
        own.grammar(StructuredOutputsParams(regex="a"))  # used, and so not the next to go
    assert len(own._verdicts) == 3 and len(questions) == 4
    own.grammar(StructuredOutputsParams(regex="b"))
    assert len(questions) == 5


def test_a_process_that_is_killed_costs_one_answer_at_most(own: GrammarChecker) -> None:
    for round_ in range(3):
        own.grammar(StructuredOutputsParams(regex=f"a{round_}"))
        dead = pid(own)
        os.kill(dead, signal.SIGKILL)
        failures = 0
        for attempt in range(3):
            try:
                own.grammar(StructuredOutputsParams(regex=f"b{round_}{attempt}"))
            except GrammarTrialError:
                failures += 1
        assert failures <= 1 and pid(own) != dead
        # What failed was not taken for a verdict.
        assert own.grammar(StructuredOutputsParams(regex=f"b{round_}0"))
        assert not is_there(dead)


def test_a_process_that_is_killed_during_a_trial_is_replaced(own: GrammarChecker) -> None:
    own.grammar(StructuredOutputsParams(regex="a"))
    process = pid(own)
    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own.grammar, StructuredOutputsParams(regex="b"))
        os.kill(process, signal.SIGKILL)
        with pytest.raises(GrammarTrialError, match="could not be tried"):
            answer.result(timeout=DEADLINE_S)
    assert own.grammar(StructuredOutputsParams(regex="b"))


def test_a_process_that_does_not_answer_is_given_up(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WALL_SECONDS", 0.05)
    own.grammar(StructuredOutputsParams(regex="a"))
    stopped = pid(own)
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(GrammarTrialError, match=r"no answer within 0\.1 s"):
        own.grammar(StructuredOutputsParams(regex="b"))
    assert not is_there(stopped)
    monkeypatch.undo()
    assert own.grammar(StructuredOutputsParams(regex="b"))


def test_closing_leaves_no_process_and_no_descriptor(model_dir: Path) -> None:
    GrammarChecker(model_dir, VOCAB, [EOS]).close()
    made = GrammarChecker(model_dir, VOCAB, [EOS])
    before = descriptors()
    for round_ in range(3):
        made.grammar(StructuredOutputsParams(regex=f"a{round_}"))
        process = pid(made)
        assert descriptors() == before + 2
        for _ in range(2):
            made.close()
        assert not is_there(process) and descriptors() == before
        # A verdict needs no process.
        made.grammar(StructuredOutputsParams(regex=f"a{round_}"))
        assert descriptors() == before


def test_trials_leave_nothing_open_here_or_there(own: GrammarChecker) -> None:
    own.grammar(StructuredOutputsParams(regex="a"))
    here, there = descriptors(), descriptors(pid(own))
    for index in range(30):
        own.grammar(StructuredOutputsParams(regex=f"b{index}"))
        cannot(own, json={"multipleOf": 9000001, "title": str(index)}) if index < 3 else cannot(own, regex=f"({index}")
    assert (descriptors(), descriptors(pid(own))) == (here, there)
    assert Path(f"/proc/{pid(own)}/task/{pid(own)}/children").read_text() == ""


def test_it_can_be_asked_from_many_threads(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = asked(own, monkeypatch)
    together = threading.Barrier(8)

    def ask(index: int) -> str:
        together.wait(DEADLINE_S)
        return own.grammar(StructuredOutputsParams(choice=[f"same {index % 2}"]))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8), timeout=DEADLINE_S))
    assert len(questions) == 2
    assert answers == answers[:2] * 4 and answers[0] != answers[1]


def test_what_is_known_does_not_wait_for_a_trial(own: GrammarChecker) -> None:
    known, unknown = StructuredOutputsParams(regex="a"), StructuredOutputsParams(regex="b")
    bad = {"regex": "("}
    grammar = own.grammar(known)
    cannot(own, **bad)
    process = pid(own)
    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(3) as pool:
        try:
            waiting = pool.submit(own.grammar, unknown)
            deadline = time.monotonic() + DEADLINE_S
            while not own._trial.locked():
                assert time.monotonic() < deadline
            assert pool.submit(own.grammar, known).result(timeout=DEADLINE_S) == grammar
            assert pool.submit(own.known, known).result(timeout=DEADLINE_S)
            assert own.known(StructuredOutputsParams(**bad)) and not own.known(unknown)
            assert not waiting.done()
        finally:
            os.kill(process, signal.SIGCONT)
        assert waiting.result(timeout=DEADLINE_S)
    assert own.known(unknown) and not own.known(StructuredOutputsParams(choice=["b"]))


def test_a_host_without_a_core_to_spare_gives_no_verdict(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    params = StructuredOutputsParams(regex="a")
    answers = [json.dumps({"starved": "no core"}).encode()]
    real = module.read_frame
    own.grammar(StructuredOutputsParams(regex="b"))
    monkeypatch.setattr(module, "read_frame", lambda stream: real(stream) and (answers.pop() if answers else "{}"))
    with pytest.raises(GrammarTrialError, match="could not be tried: no core"):
        own.grammar(params)
    monkeypatch.undo()
    assert not own.known(params) and own.grammar(params)


def test_the_clock_on_the_wall_says_nothing_about_a_grammar(own: GrammarChecker) -> None:
    """It ends a trial that waits, but the next one may not have to."""
    source = (
        "import sys; from headwise.runtime import grammar_trial as trial; "
        "trial.CPU_SECONDS, trial.WALL_SECONDS = 60.0, 0.001; trial.main(*sys.argv[1:])"
    )
    command = [sys.executable, "-P", "-c", source, str(own._model_dir), str(VOCAB), str(EOS)]
    question = json.dumps(StructuredOutputsParams(json={"multipleOf": 9000001}).given)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        write_frame(process.stdin, question)
        process.stdin.close()
        assert [json.loads(read_frame(process.stdout) or "") for _ in range(2)] == [{}, {"starved": ANY}]


def test_timers_work_where_their_signals_are_ignored(own: GrammarChecker) -> None:
    """Processes inherit what their parents ignore and block."""
    kinds = (signal.SIGPROF, signal.SIGALRM)
    handlers = [signal.signal(kind, signal.SIG_IGN) for kind in kinds]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
    try:
        own.grammar(StructuredOutputsParams(regex="a"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for kind, handler in zip(kinds, handlers, strict=True):
            signal.signal(kind, handler)
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{pid(own)}/status").read_text().splitlines() if ":\t" in line
    )
    for kind in kinds:
        for name in ("SigBlk", "SigIgn"):
            assert not int(status[name], 16) >> (kind - 1) & 1, f"{name} {kind!r}"


def test_where_grammars_cannot_be_used_the_reason_is_told(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[object] = []
    start = GrammarChecker._start
    monkeypatch.setattr(GrammarChecker, "_start", lambda checker: (starts.append(checker), start(checker)))
    params = StructuredOutputsParams(regex="a")

    def problem(checker: GrammarChecker) -> str:
        with pytest.raises(InvalidValueError) as caught:
            checker.grammar(params)
        assert caught.value.field == "structured_outputs" and checker._process is None
        return caught.value.limit

    before = descriptors()
    assert "no tokenizer.json" in problem(GrammarChecker(tmp_path, VOCAB, [EOS]))
    assert "end of sequence" in problem(GrammarChecker(model_dir, VOCAB, []))
    for content in (b"", b"{", b'{"model": 3}', b"\xff", b"[]"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        made, started = GrammarChecker(tmp_path, VOCAB, [EOS]), len(starts)
        assert not made.known(params)
        for _ in range(3):
            assert "tokenizer.json is of no use" in problem(made)
            assert made.known(params)
        assert len(starts) == started + 1
    assert descriptors() == before


def test_what_the_trial_lets_pass_compiles_on_a_shard(checker: GrammarChecker, tokenizer: LLTokenizer) -> None:
    """A process that is confined and one that is not come to the same verdict on what is not a matter of memory."""
    for index in range(20):
        properties = {f"p{i}": {"type": "string", "maxLength": 50 * (i + index)} for i in range(10 * index)}
        grammar = checker.grammar(StructuredOutputsParams(json={"type": "object", "properties": properties}))
        assert allowed(compile_grammar(tokenizer, grammar), VOCAB).any()
    with pytest.raises(GrammarError):
        compile_grammar(tokenizer, "{}")


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def descriptors(process: int | None = None) -> int:
    """How many files and pipes are open: sockets and events are others', which may come and go on their threads."""
    gc.collect()
    count = 0
    for link in Path(f"/proc/{process or 'self'}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            count += not os.readlink(link).startswith(("socket:", "anon_inode:"))
    return count
