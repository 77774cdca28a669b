"""From an answer to a line of a batch's output: of our own form, or of OpenAI's batch files."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from headwise.runtime.batch.lines import Line
from headwise.runtime.batch.openai_body import CHAT
from headwise.runtime.batch.parse import Parsed
from headwise.runtime.batch.question import Answer, LineError, Question, Sample


def render(line: Line, parsed: Parsed, result: Answer | LineError, created: int) -> bytes:
    """A line of the output, with its line break.

    Args:
        created: seconds since 1970.
    """
    value: dict[str, Any] = {"id": line.id, "custom_id": parsed.custom_id}
    error = _failure(result)
    if not parsed.openai:
        value |= {"line": line.number, **_own(result), "error": _own_error(error)}
    elif isinstance(result, Answer) and error is None:
        assert parsed.question is not None
        body = _body(parsed.question, result, line.id, created)
        value |= {"response": {"status_code": 200, "request_id": line.id, "body": body}, "error": None}
    else:
        assert error is not None
        value |= {"response": {"status_code": error.status, "request_id": line.id, "body": _error_body(error)}}
        value |= {"error": None}
    # ASCII: a half of a surrogate pair, which a stop string may hold, is written as it was read.
    return json.dumps(value).encode() + b"\n"


def is_failure(value: dict[str, Any]) -> bool:
    """Whether a line of the output says that its line of the input could not be answered."""
    response = value.get("response")
    return value.get("error") is not None or (isinstance(response, dict) and response.get("status_code") != 200)


def model_of(value: dict[str, Any]) -> str | None:
    """The model that gave the answer in a line of the output; None if none did."""
    body = response.get("body") if isinstance(response := value.get("response"), dict) else None
    model = value.get("model") if body is None else body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) else None


def _failure(result: Answer | LineError) -> LineError | None:
    if isinstance(result, LineError):
        return result
    return LineError("failed", result.error, status=500) if result.error else None


def _own(result: Answer | LineError) -> dict[str, Any]:
    if isinstance(result, LineError):
        return {"response": None}  # a line that is no JSON may have been one of an OpenAI batch file
    return {
        "model": result.model,
        "outputs": [asdict(sample) for sample in result.samples],
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "cached_tokens": result.cached_tokens,
    }


def _own_error(error: LineError | None) -> dict[str, Any] | None:
    return None if error is None else {"code": error.code, "field": error.field or None, "message": str(error)}


def _error_body(error: LineError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.field or None, "code": error.code}}


def _body(question: Question, answer: Answer, name: str, created: int) -> dict[str, Any]:
    chat = question.url == CHAT
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": answer.model,
        "choices": [(_chat_choice if chat else _choice)(question, answer, sample) for sample in answer.samples],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        },
    }


def _chat_choice(question: Question, answer: Answer, sample: Sample) -> dict[str, Any]:
    message = {"role": "assistant", "content": sample.text, "refusal": None}
    logprobs = None
    if question.params.logprobs is not None:

        def entry(token: int, value: float) -> dict[str, Any]:
            text = answer.token_texts[token]
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        content = []
        for token, (value, _, top) in zip(sample.token_ids, sample.logprobs, strict=True):
            best = [entry(other, one) for other, one in top[: question.top_logprobs]]
            content.append({**entry(token, value), "top_logprobs": best})
        logprobs = {"content": content, "refusal": None}
    return {"index": sample.index, "message": message, "logprobs": logprobs, "finish_reason": sample.finish_reason}


def _choice(question: Question, answer: Answer, sample: Sample) -> dict[str, Any]:
    logprobs = None
    if question.params.logprobs is not None:
        texts = [answer.token_texts[token] for token in sample.token_ids]
        starts = list(accumulate(map(len, texts[:-1]), initial=0))[: len(texts)]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [value for value, _, _ in sample.logprobs],
            "top_logprobs": [{answer.token_texts[t]: v for t, v in top} for _, _, top in sample.logprobs],
            "text_offset": starts,
        }
    return {
        "index": sample.index,
        "text": sample.text,
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
    }
