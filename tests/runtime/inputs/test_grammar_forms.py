"""A grammar means on the shards what its user wrote; a hostile one gets no further than its trial."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from headwise.runtime.inputs.grammar_trial import WALL_SECONDS
from headwise.runtime.inputs.grammars import GrammarChecker
from headwise.runtime.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.sampling.grammar import GrammarError, Grammars, allowed, compile_grammar, load_tokenizer
from tests.byte_tokenizer import EOS, VOCAB, token_bytes, write_byte_tokenizer
from tests.effort import examples

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


@examples(60)
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


@examples(60)
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


def test_what_the_trial_lets_pass_compiles_on_a_shard(checker: GrammarChecker, tokenizer: LLTokenizer) -> None:
    """A process that is confined and one that is not come to the same verdict on what is not a matter of memory."""
    for index in range(20):
        properties = {f"p{i}": {"type": "string", "maxLength": 50 * (i + index)} for i in range(10 * index)}
        grammar = checker.grammar(StructuredOutputsParams(json={"type": "object", "properties": properties}))
        assert allowed(compile_grammar(tokenizer, grammar), VOCAB).any()
    with pytest.raises(GrammarError):
        compile_grammar(tokenizer, "{}")
