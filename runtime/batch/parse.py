"""From a line of a batch's input to a question: lines of our own form, and those of OpenAI's batch files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headwise.runtime.batch.fields import PARAMETERS, check_messages, refuse_unknown, sampling_params
from headwise.runtime.batch.lines import MAX_LINE_BYTES, Line
from headwise.runtime.batch.openai_body import ENDPOINTS, question_of
from headwise.runtime.batch.question import LineError, Question
from headwise.workers.errors import InvalidValueError

MAX_CUSTOM_ID = 512
"""Characters."""


@dataclass(slots=True)
class Parsed:
    """A line, as far as it was understood.

    Attributes:
        custom_id: None if the line has none, or none that can be used.
        openai: whether it is a line of an OpenAI batch file, and not of our own form.
        question: None where ``error`` says what is wrong.
    """

    custom_id: str | None = None
    openai: bool = False
    question: Question | None = None
    error: LineError | None = None


def parse(line: Line, defaults: Mapping[str, Any]) -> Parsed:
    """
    Args:
        defaults: the sampling parameters that a line of our own form has unless it says otherwise.
    """
    parsed = Parsed()
    try:
        value = _object(line)
        parsed.openai = bool(value.keys() & {"url", "method", "body"})
        parsed.custom_id = _custom_id(value)
        if parsed.openai:
            parsed.question = _openai(value, parsed)
        else:
            parsed.question = _own(value, parsed, defaults)
    except InvalidValueError as error:
        parsed.error = LineError("invalid_value", str(error), error.field)
    except LineError as error:
        parsed.error = error
    return parsed


def custom_id_of(line: Line) -> str | None:
    """What ``parse`` says of it, for less."""
    if b"custom_id" not in line.data and b"\\" not in line.data:
        return None
    try:
        return _custom_id(_object(line))
    except (InvalidValueError, LineError):
        return None


def _own(value: dict[str, Any], parsed: Parsed, defaults: Mapping[str, Any]) -> Question:
    refuse_unknown(value, {"prompt", "messages", "custom_id", *PARAMETERS})
    given = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(given) != 1:
        raise InvalidValueError("prompt", " and ".join(given) or None, "give one of prompt and messages")
    prompt = value[given[0]]
    if given == ["messages"]:
        check_messages(prompt)
    elif not isinstance(prompt, (str, list)) or any(isinstance(one, dict) for one in prompt):
        raise InvalidValueError("prompt", prompt, "must be text or a list of token ids")
    params = dict(defaults) | {name: value[name] for name in PARAMETERS if name in value}
    return Question(prompt, sampling_params(params), parsed.custom_id)


def _openai(value: dict[str, Any], parsed: Parsed) -> Question:
    url = value.get("url")
    if url not in ENDPOINTS:
        raise InvalidValueError("url", url, f"must be one of {', '.join(ENDPOINTS)}")
    if parsed.custom_id is None:
        raise InvalidValueError("custom_id", None, "a line of an OpenAI batch file has one")
    if value.get("method") != "POST":
        raise InvalidValueError("method", value.get("method"), "must be POST")
    refuse_unknown(value, {"custom_id", "method", "url", "body"})
    if not isinstance(value.get("body"), dict):
        raise InvalidValueError("body", value.get("body"), "must be an object")
    return question_of(url, parsed.custom_id, value["body"])


def _custom_id(value: dict[str, Any]) -> str | None:
    name = value.get("custom_id")
    if name is None:
        return None
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_CUSTOM_ID or not _is_text(name):
        raise InvalidValueError("custom_id", name, f"must be text of 1 to {MAX_CUSTOM_ID} characters")
    return name


def _object(line: Line) -> dict[str, Any]:
    if not line.data:
        said = f"line {line.number} has {line.num_bytes} bytes, at most {MAX_LINE_BYTES} are read"
        raise LineError("invalid_line", said)
    try:
        value = json.loads(line.data)
    except json.JSONDecodeError as error:
        said = f"line {line.number} is not JSON: {error.msg} at character {error.pos + 1}"
        raise LineError("invalid_line", said) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of too many digits, or too deep
        raise LineError("invalid_line", f"line {line.number} is not JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise LineError("invalid_line", f"line {line.number} must be a JSON object, not {type(value).__name__}")
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
