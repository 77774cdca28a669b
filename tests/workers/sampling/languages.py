"""Small languages as grammars, and which tokens continue them, found without llguidance."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.byte_tokenizer import EOS, token_bytes

TOKENS = token_bytes()

# A language of byte strings, described by nested tuples, and what follows a byte in it (Antimirov's partial
# derivatives). No description is of the empty language, so one that is left means that there is a way to go on.

Node = tuple[Any, ...]
EMPTY: Node = ("seq",)


def text(string: str) -> Node:
    return ("seq", *(("byte", byte) for byte in string.encode()))


def nullable(node: Node) -> bool:
    kind, *parts = node
    if kind == "byte":
        return False
    if kind == "star":
        return True
    return (all if kind == "seq" else any)(nullable(part) for part in parts)


@cache
def after_byte(node: Node, byte: int) -> frozenset[Node]:
    kind, *parts = node
    if kind == "byte":
        return frozenset({EMPTY}) if parts[0] == byte else frozenset()
    if kind == "star":
        return frozenset(("seq", rest, node) for rest in after_byte(parts[0], byte))
    if kind == "any":
        return frozenset().union(*(after_byte(part, byte) for part in parts))
    found: set[Node] = set()
    for index, part in enumerate(parts):
        found |= {("seq", rest, *parts[index + 1 :]) for rest in after_byte(part, byte)}
        if not nullable(part):
            break
    return frozenset(found)


def after(places: frozenset[Node], data: bytes) -> frozenset[Node]:
    for byte in data:
        places = frozenset().union(*(after_byte(place, byte) for place in places))
    return places


def right_tokens(language: Node, so_far: bytes) -> set[int]:
    places = after(frozenset({language}), so_far)
    right = {token for token, data in TOKENS.items() if after(places, data)}
    return right | {EOS} if any(nullable(place) for place in places) else right


def is_open(right: set[int]) -> bool:
    """Whether there is more than one way to go on."""
    longest = max((TOKENS.get(token, b"") for token in right), key=len)
    return EOS in right or not all(longest.startswith(TOKENS[token]) for token in right)


def written(node: Node) -> str:
    """As a regex of bytes that are ASCII."""
    kind, *parts = node
    if kind == "byte":
        return f"\\x{parts[0]:02x}"
    if kind == "star":
        return f"({written(parts[0])})*"
    return "(" + ("" if kind == "seq" else "|").join(written(part) for part in parts) + ")"


# Grammars and what they describe

LETTERS = st.sampled_from(list('abc"\\/\n{} '))
WORDS = st.one_of(st.text(LETTERS, min_size=1, max_size=4), st.sampled_from(["é", "日本", "ab😀", "èé", "日"]))


def regexes() -> st.SearchStrategy[Node]:
    def larger(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
        some = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            some.map(lambda parts: ("seq", *parts)),
            some.map(lambda parts: ("any", *parts)),
            inner.map(lambda part: ("star", part)),
            inner.map(lambda part: ("any", EMPTY, part)),
        )

    return st.recursive(LETTERS.map(text), larger, max_leaves=6)


def choice_grammar(choices: Sequence[str]) -> str:
    return LLMatcher.grammar_from_lark("start: C\nC: " + " | ".join(json.dumps(choice) for choice in choices))


@st.composite
def schemas(draw: st.DrawFn) -> tuple[str, Node]:
    """Of objects that have but so many forms, without white space."""
    plain = WORDS.filter(lambda word: "\n" not in word)  # which JSON may write in two ways
    values = st.one_of(st.booleans(), st.none(), st.integers(-20, 200), plain)
    names = draw(st.lists(st.sampled_from(["a", "ab", "b", "é"]), min_size=1, max_size=3, unique=True))
    enums = {name: draw(st.lists(values, min_size=1, max_size=3, unique_by=repr)) for name in names}
    required = [name for name in names if draw(st.booleans())]
    schema = {"type": "object", "properties": {name: {"enum": enum} for name, enum in enums.items()}}
    schema |= {"required": required, "additionalProperties": False}
    forms = []
    for picked in itertools.product(*([*enums[name], *([...] if name not in required else [])] for name in names)):
        made = {name: value for name, value in zip(names, picked, strict=True) if value is not ...}
        forms.append(text(json.dumps(made, separators=(",", ":"), ensure_ascii=False)))
    compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    return LLMatcher.grammar_from_json_schema(schema, overrides=compact), ("any", *forms)


def languages() -> st.SearchStrategy[tuple[str, Node]]:
    words = st.lists(WORDS, min_size=1, max_size=5)
    return st.one_of(
        regexes().map(lambda node: (LLMatcher.grammar_from_regex(written(node)), node)),
        words.map(lambda choices: (choice_grammar(choices), ("any", *map(text, choices)))),
        schemas(),
    )
