"""Fields that lines of every form have: checked, and turned into what the engine's validator takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import InvalidValueError

PARAMETERS = tuple(field.name for field in fields(SamplingParams))
_FORMS = tuple(field.name for field in fields(StructuredOutputsParams))


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams of what JSON can say.

    Raises:
        InvalidValueError: a value is wrong.
    """
    made = dict(values)
    if isinstance(bias := made.get("logit_bias"), dict):
        made["logit_bias"] = {_token(key): value for key, value in bias.items()}
    if isinstance(form := made.get("structured_outputs"), dict):
        refuse_unknown(form, _FORMS, "structured_outputs.")
        made["structured_outputs"] = StructuredOutputsParams(**form)
    return SamplingParams(**made)


def check_messages(messages: object) -> None:
    """
    Raises:
        InvalidValueError: it is no conversation of texts.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidValueError("messages", messages, "must be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidValueError("messages", message, "each must have a role and a content, both strings")


def refuse_unknown(value: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    """
    Args:
        prefix: of the fields' names in the error.

    Raises:
        InvalidValueError: a field is none of those that are known.
    """
    if unknown := value.keys() - set(known):
        name = min(unknown)
        raise InvalidValueError(prefix + name, value[name], f"unknown; there are {', '.join(sorted(known))}")


def _token(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise InvalidValueError("logit_bias", key, "its names must be token ids") from None
