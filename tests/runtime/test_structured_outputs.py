"""What may be asked of an output's form, and what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from types import MappingProxyType
from typing import Any

import pytest

from headwise.runtime import SamplingParams
from headwise.runtime.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, StructuredOutputsParams
from headwise.workers.errors import InvalidValueError

OBJECT = '{"type": "object"}'


def refused(field: str, limit: str, **given_: Any) -> InvalidValueError:
    with pytest.raises(InvalidValueError, match=limit) as caught:
        StructuredOutputsParams(**given_)
    assert caught.value.field == field
    assert len(str(caught.value)) < 600
    return caught.value


# The parameters


def test_one_of_them_is_given() -> None:
    refused("structured_outputs", "must be one of json, regex, choice, grammar, json_object")
    refused("structured_outputs", "must be one of", json_object=False)
    several = refused("structured_outputs", "must be one of", regex="a", choice=["a"])
    assert several.value == "regex and choice"
    refused("structured_outputs", "must be one of", json=OBJECT, json_object=True)
    with pytest.raises(TypeError):
        StructuredOutputsParams("a")  # type: ignore[misc]


@pytest.mark.parametrize("field", ["regex", "grammar", "json"])
def test_a_text_that_is_none_is_refused(field: str) -> None:
    name = f"structured_outputs.{field}"
    for wrong in (3, b"a", True, ["a"]):
        error = refused(name, "must be a string, not ", **{field: wrong})
        assert type(wrong).__name__ in error.limit
    refused(name, "must be a string, not mappingproxy", **{field: MappingProxyType({"type": "object"})})
    refused(name, "must not be empty", **{field: ""})
    refused(name, "character 2 is half of a surrogate pair", **{field: "ab\ud83d"})


@pytest.mark.parametrize("field", ["regex", "grammar"])
def test_bytes_are_what_counts_of_a_text(field: str) -> None:
    longest = "é" * (MAX_GRAMMAR_BYTES // 2)
    assert getattr(StructuredOutputsParams(**{field: longest}), field) == longest
    error = refused(f"structured_outputs.{field}", f"at most {MAX_GRAMMAR_BYTES}", **{field: longest + "a"})
    assert error.value == f"{MAX_GRAMMAR_BYTES + 1} bytes"


def test_a_schema_is_an_object_of_bounded_length() -> None:
    frame = '{"const": ""}'
    longest = frame.replace('""', '"' + "a" * (MAX_GRAMMAR_BYTES - len(frame)) + '"')
    assert StructuredOutputsParams(json=longest).json == longest
    error = refused("structured_outputs.json", f"at most {MAX_GRAMMAR_BYTES}", json=longest + " ")
    assert error.value == f"{MAX_GRAMMAR_BYTES + 1} bytes"
    refused("structured_outputs.json", f"at most {MAX_GRAMMAR_BYTES}", json={"const": "a" * MAX_GRAMMAR_BYTES})
    for schema in ("[]", "true", "3", '"a"', "null"):
        refused("structured_outputs.json", "must be a JSON schema that is an object", json=schema)
    for schema in ("{", "", "{'a': 1}", "{} {}", "start: /a/"):
        refused("structured_outputs.json", "must", json=schema)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_a_schema_that_is_no_json_is_refused() -> None:
    round_about: dict[str, Any] = {}
    round_about["items"] = round_about
    for schema in (
        {"const": float("nan")},
        {"maximum": float("inf")},
        {"enum": {1, 2}},
        {"const": b"a"},
        {("a", "b"): 1},
        round_about,
        deep(100_000),
        '{"const": ' + "[" * 60_000 + "]" * 60_000 + "}",
        '{"maximum": ' + "9" * 5_000 + "}",
    ):
        refused("structured_outputs.json", "must be a JSON schema: ", json=schema)


def test_choices_are_strings_not_too_many_and_not_too_long() -> None:
    name = "structured_outputs.choice"
    for wrong, kind in (("ab", "str"), (b"ab", "bytes"), (3, "int"), ({"a": 1}, "dict"), ({"a"}, "set")):
        refused(name, f"must be a list of strings, not {kind}", choice=wrong)
    assert refused(name, f"must be 1 to {MAX_CHOICES}", choice=[]).value == "0 strings"
    many = [str(i) for i in range(MAX_CHOICES)]
    assert StructuredOutputsParams(choice=many).choice == tuple(many)
    assert refused(name, f"must be 1 to {MAX_CHOICES}", choice=[*many, "a"]).value == f"{MAX_CHOICES + 1} strings"
    refused(name, "must be a string, not int", choice=["a", 3])
    refused(name, "must not be empty", choice=["a", ""])
    refused(name, "character 0 is half of a surrogate pair", choice=["a", "\udc00"])
    half = "é" * (MAX_GRAMMAR_BYTES // 4)
    assert StructuredOutputsParams(choice=[half, half]).choice == (half, half)
    refused(name, f"at most {MAX_GRAMMAR_BYTES} in all", choice=[half, half, "a"])
    refused(name, f"at most {MAX_GRAMMAR_BYTES}", choice=[half, half + half + "a"])


@pytest.mark.parametrize("wrong", [1, "true", None, {}])
def test_json_object_is_a_flag(wrong: object) -> None:
    refused("structured_outputs.json_object", "must be True or False", json_object=wrong)


def test_they_are_values() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, "é"]}}}
    for params in (
        StructuredOutputsParams(json=schema),
        StructuredOutputsParams(regex="a"),
        StructuredOutputsParams(choice=["a", "b"]),
        StructuredOutputsParams(grammar="start: /a/"),
        StructuredOutputsParams(json_object=True),
    ):
        assert params == copy.deepcopy(params) == pickle.loads(pickle.dumps(params))  # noqa: S301
        assert hash(params) == hash(copy.deepcopy(params))
        assert len(params.given) == 1 and params.field == f"structured_outputs.{next(iter(params.given))}"
        with pytest.raises(dataclasses.FrozenInstanceError):
            params.regex = "b"  # type: ignore[misc]
    kept = StructuredOutputsParams(json=schema)
    schema["properties"] = {}
    assert json.loads(kept.json or "") == {"type": "object", "properties": {"a": {"enum": [1, "é"]}}}
    assert kept == StructuredOutputsParams(json=kept.json)


def test_it_ends_where_it_is_complete_and_nowhere_else() -> None:
    structured = StructuredOutputsParams(choice=["a"])
    assert SamplingParams(structured_outputs=structured, min_tokens=0, ignore_eos=False)
    for field, value in (("min_tokens", 1), ("ignore_eos", True)):
        with pytest.raises(InvalidValueError, match="ends where that is complete") as caught:
            SamplingParams(structured_outputs=structured, **{field: value})  # type: ignore[arg-type]
        assert (caught.value.field, caught.value.value) == (field, value)
    for wrong in ({"choice": ["a"]}, "a", ["a"], True):
        with pytest.raises(InvalidValueError, match=f"must be StructuredOutputsParams, not {type(wrong).__name__}"):
            SamplingParams(structured_outputs=wrong)  # type: ignore[arg-type]


def test_a_copy_keeps_them_and_is_checked_again() -> None:
    structured = StructuredOutputsParams(regex="a+")
    params = SamplingParams(structured_outputs=structured, n=2, seed=3)
    assert params.clone(temperature=0.5).structured_outputs is structured
    assert params.clone(structured_outputs=None) == SamplingParams(n=2, seed=3)
    assert params.clone() == params and hash(params.clone()) == hash(params)
    with pytest.raises(InvalidValueError, match="min_tokens"):
        params.clone(min_tokens=2)
    with pytest.raises(InvalidValueError, match="ignore_eos"):
        SamplingParams(ignore_eos=True).clone(structured_outputs=structured)
