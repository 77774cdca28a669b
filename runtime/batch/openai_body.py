"""What a line of an OpenAI batch file asks: the body of a chat or a completion."""

from __future__ import annotations

from typing import Any

from headwise.runtime.batch.fields import PARAMETERS, check_messages, refuse_unknown, sampling_params
from headwise.runtime.batch.question import Prompt, Question
from headwise.workers.errors import InvalidValueError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ENDPOINTS = (CHAT, COMPLETION)

_COMPLETION_MAX_TOKENS = 16
"""OpenAI's default. A chat may fill the model's context."""
_ABOUT_THE_CALLER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Change nothing of the output."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}
"""Fields of OpenAI's that may be given with these values, or null, alone: those that ask for nothing."""
_PASSED_ON = set(PARAMETERS) - {"logprobs", "max_tokens"}


def question_of(url: str, custom_id: str, body: dict[str, Any]) -> Question:
    """The question of a body. Defaults are OpenAI's; its other fields may be any of SamplingParams'.

    Raises:
        InvalidValueError: a field is wrong, or asks for what is not served.
    """
    body = {name: value for name, value in body.items() if value is not None}
    for name, allowed in _ONLY.items():
        if name in body and body[name] not in allowed:
            limit = f"is not served; leave it out{' or give ' + repr(allowed[0]) if allowed else ''}"
            raise InvalidValueError(name, body[name], limit)
    known = {"model", "max_tokens", "logprobs", *_PASSED_ON, *_ABOUT_THE_CALLER, *_ONLY}
    known |= {"messages", "max_completion_tokens", "top_logprobs", "response_format"} if url == CHAT else {"prompt"}
    refuse_unknown(body, known)
    if not isinstance(model := body.get("model", ""), str):
        raise InvalidValueError("model", model, "must be the model's name")
    params = {name: body[name] for name in _PASSED_ON & body.keys()}
    if url == COMPLETION:
        params |= {"logprobs": body.get("logprobs"), "max_tokens": body.get("max_tokens", _COMPLETION_MAX_TOKENS)}
        return Question(_prompt(body.get("prompt")), sampling_params(params), custom_id, url, model)
    top = _top_logprobs(body)
    params["logprobs"] = top
    params["max_tokens"] = body.get("max_completion_tokens", body.get("max_tokens"))
    if (form := _structured_outputs(body.get("response_format"))) is not None:
        params["structured_outputs"] = form
    return Question(_messages(body.get("messages")), sampling_params(params), custom_id, url, model, top or 0)


def _prompt(prompt: object) -> Prompt:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) != 1:
            raise InvalidValueError("prompt", f"{len(prompt)} prompts", "give one a line")
        [prompt] = prompt
    if not isinstance(prompt, (str, list)) or any(isinstance(one, dict) for one in prompt):
        raise InvalidValueError("prompt", prompt, "must be text or a list of token ids")
    return prompt


def _messages(messages: object) -> Prompt:
    if isinstance(messages, list):
        messages = [_flat(message) if isinstance(message, dict) else message for message in messages]
    check_messages(messages)
    assert isinstance(messages, list)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text, where it was a list of parts that are texts."""
    if wrong := {name for name, value in message.items() if value} - {"role", "content", "name"}:
        raise InvalidValueError(f"messages.{min(wrong)}", message[min(wrong)], "is not served; leave it out")
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidValueError("messages.content", part, 'each part must be {"type": "text", "text": …}')
    return message | {"content": "".join(part["text"] for part in parts)}


def _top_logprobs(body: dict[str, Any]) -> int | None:
    asked = body.get("logprobs", False)
    if not isinstance(asked, bool):
        raise InvalidValueError("logprobs", asked, "must be true or false")
    if not asked and "top_logprobs" in body:
        raise InvalidValueError("top_logprobs", body["top_logprobs"], 'needs "logprobs": true')
    top: int = body.get("top_logprobs", 0)  # which SamplingParams checks
    return top if asked else None


def _structured_outputs(form: object) -> dict[str, Any] | None:
    match form:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return {"json": schema}
    limit = 'must be of the type text, json_object, or json_schema with {"json_schema": {"schema": …}}'
    raise InvalidValueError("response_format", form, limit)
