"""Lines of both forms: what they ask, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headwise.runtime.batch.lines import Line
from headwise.runtime.batch.parse import Parsed, parse
from headwise.runtime.batch.question import Question

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parsed(value: Any, **defaults: Any) -> Parsed:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse(Line(3, data, "0" * 16, len(data)), defaults)


def asked(value: Any, **defaults: Any) -> Question:
    found = parsed(value, **defaults)
    assert found.question is not None, found.error
    return found.question


def openai(body: Any, url: str = "/v1/chat/completions", **changes: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | changes


def test_a_line_of_our_own_form() -> None:
    question = asked({"prompt": "hi", "max_tokens": 5}, temperature=0.0, max_tokens=128)
    assert (question.prompt, question.params.max_tokens, question.params.temperature) == ("hi", 5, 0)
    assert asked({"prompt": [1, 2], "custom_id": "x"}).custom_id == "x"
    assert asked({"messages": CHAT["messages"], "n": 2}).params.n == 2
    form = asked({"prompt": "hi", "structured_outputs": {"regex": "a+"}, "logit_bias": {"5": 1}})
    assert form.params.structured_outputs is not None and form.params.structured_outputs.regex == "a+"
    assert form.params.logit_bias == ((5, 1.0),)


@pytest.mark.parametrize(
    ("line", "code", "field", "said"),
    [
        (b"{", "invalid_line", "", "line 3 is not JSON: Expecting property name"),
        (b"\xff{}", "invalid_line", "", "line 3 is not JSON: UnicodeDecodeError"),
        (b"[" * 100_000, "invalid_line", "", "line 3 is not JSON: RecursionError"),
        ([1], "invalid_line", "", "must be a JSON object, not list"),
        ({}, "invalid_value", "prompt", "give one of prompt and messages"),
        ({"prompt": "a", "messages": []}, "invalid_value", "prompt", "give one of"),
        ({"prompt": 5}, "invalid_value", "prompt", "must be text or a list of token ids"),
        ({"messages": "hi"}, "invalid_value", "messages", "must be a list"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages", "must have a role and a content"),
        ({"prompt": "a", "max_token": 3}, "invalid_value", "max_token", "unknown; there are"),
        ({"prompt": "a", "top_p": 3}, "invalid_value", "top_p", r"must be in \(0, 1\]"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "invalid_value", "logit_bias", "token ids"),
        ({"prompt": "a", "custom_id": 5}, "invalid_value", "custom_id", "must be text"),
        ({"prompt": "a", "structured_outputs": {"x": 1}}, "invalid_value", "structured_outputs.x", "unknown"),
        (openai(CHAT, url="/v1/embeddings"), "invalid_value", "url", "must be one of /v1/chat/completions"),
        (openai(CHAT, method="GET"), "invalid_value", "method", "must be POST"),
        (openai(CHAT, custom_id=None), "invalid_value", "custom_id", "has one"),
        (openai(3), "invalid_value", "body", "must be an object"),
        (openai(CHAT, more=3), "invalid_value", "more", "unknown"),
        (openai(CHAT | {"tools": [{}]}), "invalid_value", "tools", "is not served"),
        (openai(CHAT | {"stream": True}), "invalid_value", "stream", "is not served"),
        (openai(CHAT | {"top_logprobs": 2}), "invalid_value", "top_logprobs", "needs"),
        (openai(CHAT | {"response_format": {"type": "x"}}), "invalid_value", "response_format", "must be of the type"),
        (openai(CHAT | {"prompt": "x"}), "invalid_value", "prompt", "unknown"),
        (openai({"prompt": ["a", "b"]}, "/v1/completions"), "invalid_value", "prompt", "give one a line"),
        (openai({"prompt": "a", "echo": True}, "/v1/completions"), "invalid_value", "echo", "is not served"),
    ],
)
def test_what_is_wrong_with_a_line(line: Any, code: str, field: str, said: str) -> None:
    found = parsed(line)
    assert found.question is None and found.error is not None
    assert (found.error.code, found.error.field) == (code, field)
    with pytest.raises(type(found.error), match=said):
        raise found.error


def test_a_line_that_was_too_long_says_so() -> None:
    found = parse(Line(3, b"", "0" * 16, 1 << 30), {})
    assert found.error is not None and "1073741824 bytes, at most" in str(found.error)


def test_a_chat_of_openais_has_openais_defaults() -> None:
    question = asked(openai(CHAT | {"user": "u", "stream": False, "seed": None}), temperature=0.0, max_tokens=128)
    assert (question.params.temperature, question.params.max_tokens, question.params.n) == (1.0, None, 1)
    assert (question.custom_id, question.model, question.url) == ("a", "m", "/v1/chat/completions")
    assert question.params.logprobs is None


def test_a_chat_of_openais_with_much_in_it() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        "messages": [{"role": "user", "name": "x", "content": parts}],
        **{"max_completion_tokens": 7, "logprobs": True, "top_logprobs": 2, "stop": ["x"], "seed": 5, "min_p": 0.1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    }
    question = asked(openai(body))
    params = question.params
    assert question.prompt == [{"role": "user", "content": "ab"}]
    assert (params.max_tokens, params.logprobs, params.stop, params.seed, params.min_p) == (7, 2, ("x",), 5, 0.1)
    assert params.structured_outputs is not None and params.structured_outputs.json == '{"type": "object"}'


def test_a_completion_of_openais() -> None:
    question = asked(openai({"prompt": ["hi"], "logprobs": 3}, "/v1/completions"))
    assert (question.prompt, question.params.max_tokens, question.params.logprobs) == ("hi", 16, 3)
    assert asked(openai({"prompt": [[1, 2]]}, "/v1/completions")).prompt == [1, 2]
    assert asked(openai({"prompt": [1, 2]}, "/v1/completions")).prompt == [1, 2]
