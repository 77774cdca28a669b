"""From what users write to the form of grammars that shards take: llguidance's."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

MAX_CONVERTED_BYTES = 256 << 10
"""Of a grammar in llguidance's form, which steps carry to the shards."""

# A blank, or a line break with an indentation. Unbounded, small models fill the rest of an output with it.
_WHITESPACE = r"(\x20|\n[\x20\x09]{0,40})"

# What a regex has outside of escapes and classes: of both only what is before and after is looked at.
_ESCAPE, _CLASS = re.compile(r"\\.", re.DOTALL), re.compile(r"\[\^?\]?[^\]]*\]")
_VERBOSE = re.compile(r"\(\?[A-Za-z]*x[A-Za-z]*(-[A-Za-z]*)?[:)]")
# Comments, strings and classes of GBNF.
_GBNF_PART = re.compile(r'#[^\r\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', re.DOTALL)
_GBNF_CHAR = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|(.)", re.DOTALL)


def convert(kind: str, value: Any) -> str:
    """What a request asks for, in llguidance's form.

    Args:
        kind: a field of StructuredOutputsParams.  value: of that field.

    Raises:
        ValueError: it cannot be parsed, would come to mean something else, or is too long.
    """
    grammar = _converted(kind, value)
    if (size := len(grammar.encode())) > MAX_CONVERTED_BYTES:
        raise ValueError(f"takes {size} bytes in llguidance's form, of which there may be {MAX_CONVERTED_BYTES}")
    return grammar


def _converted(kind: str, value: Any) -> str:
    from llguidance import LLMatcher, regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax

    match kind:
        case "json" | "json_object":
            schema = value if kind == "json" else '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        case "regex":
            _check_regex(value)
            # As in JSON schemas: a model that is asked for \\d otherwise answers with the digits of any script.
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(value, 'dw')}/")
        case "choice":
            # A terminal, in capitals: the lexer takes any number of alternatives, the parser a few hundred.
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
            escaped = choices.replace("\x7f", r"\u007f")  # the one control character that JSON lets stand
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {escaped}")
    if is_lark_syntax(value):
        return LLMatcher.grammar_from_lark(value)
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(_without_codes(value)))
    except IndexError:
        raise ValueError("ends within an escape") from None


def _check_regex(regex: str) -> None:
    """Refuses what regex_to_lark would change the meaning of."""
    bare = _ESCAPE.sub("", regex)
    if bare.endswith("\\"):
        raise ValueError("ends in a backslash that escapes nothing")
    if _VERBOSE.search(_CLASS.sub("", bare)):
        raise ValueError("the flag x (white space and comments are ignored) is not supported")


def _without_codes(gbnf: str) -> str:
    """With characters in place of their codes, which any_to_lark takes for others or leaves to Lark, that has none."""

    def part(match: re.Match[str]) -> str:
        text = match[0]
        if text[0] == "#":
            return text
        write = _in_string if text[0] == '"' else _in_class
        return text[0] + _GBNF_CHAR.sub(write, text[1:-1]) + text[-1]

    return _GBNF_PART.sub(part, gbnf)


def _in_string(match: re.Match[str]) -> str:
    *codes, escaped, _ = match.groups()
    if code := next(filter(None, codes), None):
        char = _char(code)
        if char in '"\\\n\r\t':
            return json.dumps(char)[1:-1]
        if char < " " or char == "\x7f":
            raise ValueError(
                f"has the control character {match[0]} in a string; write it as a class, [\\x{ord(char):02x}]"
            )
        return char
    return escaped if escaped and escaped in "[]" else match[0]


def _in_class(match: re.Match[str]) -> str:
    *codes, _, plain = match.groups()
    # Two of these are an operator in the classes of regexes, though not in GBNF's.
    char = plain if plain and plain in "&~" else None
    if code := next(filter(None, codes), None):
        char = _char(code)
    if char is None:
        return match[0]
    return char if ord(char) > 0x7F else f"\\x{ord(char):02x}"


def _char(code: str) -> str:
    number = int(code, 16)
    if number > sys.maxunicode or 0xD800 <= number < 0xE000:
        raise ValueError(f"{code} is the code of no character")
    return chr(number)
