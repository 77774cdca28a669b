"""StructuredOutputsParams: what an output has to be, such as JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from headwise.workers.errors import InvalidValueError

JsonText: TypeAlias = str

MAX_GRAMMAR_BYTES = 128 << 10
"""Most bytes of a schema, a regex, a grammar, or all choices together: five times what OpenAI's API allows for the
names in a schema."""
MAX_CHOICES = 1024


@dataclass(frozen=True, init=False)
class StructuredOutputsParams:
    """What an output has to be. Exactly one field is given; their names are those of vLLM. Immutable.

    Compiling a schema, a regex or a grammar may take 0.1 s. A string of 43,000 characters or an object of 1,000
    properties compiles in that time; one of 60,000 characters or 1,500 properties does not, and is refused.

    Attributes:
        json: a JSON schema, as a dict or as text; kept as text. What a schema may use is listed at
            https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md. Keywords that JSON Schema does not
            know, such as OpenAPI's ``nullable``, are ignored. Between the parts of the output there may be a blank, or
            a line break with up to 40 blanks. Give objects ``"additionalProperties": false``: otherwise the output may
            have further keys, which may come twice, or repeat one of ``properties`` in another spelling (``"\\u0061"``
            for ``"a"``) with any value. An object with more than 150 optional properties may end the output with an
            error.
        regex: a regex of the whole output, in the syntax of https://docs.rs/regex. As in JSON schemas, \\d and \\w are
            ASCII; \\s is Unicode, and the dot does not match a line break. Refused are look-arounds, \\b, the flag x,
            and ^ and $ anywhere but at the beginning and the end.
        choice: strings, one of which is the output. Kept as a tuple.
        grammar: a context-free grammar, in llguidance's Lark syntax or llama.cpp's GBNF. The grammar must not name an
            end-of-sequence token (``</s>``, ``<[2]>``): the output would end wherever that token stands.
        json_object: True for any JSON object.

    Raises:
        InvalidValueError: none or several fields are given, or a value has a wrong type or is too long. Whether a
            schema, a regex or a grammar can be used is checked later, when a request brings it.
    """

    json: JsonText | None
    regex: str | None
    choice: tuple[str, ...] | None
    grammar: str | None
    json_object: bool

    def __init__(
        self,
        *,
        json: str | dict[str, Any] | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        json_object: bool = False,
    ) -> None:
        if not isinstance(json_object, bool):
            raise InvalidValueError(_name("json_object"), json_object, "must be True or False")
        given = {"json": json, "regex": regex, "choice": choice, "grammar": grammar, "json_object": json_object or None}
        found = [name for name, value in given.items() if value is not None]
        if len(found) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise InvalidValueError("structured_outputs", " and ".join(found) or None, f"must be one of {names}")
        self._set(
            json=None if json is None else _schema(json),
            regex=None if regex is None else _text("regex", regex),
            choice=None if choice is None else _choice(choice),
            grammar=None if grammar is None else _text("grammar", grammar),
            json_object=json_object,
        )

    @property
    def given(self) -> dict[str, Any]:
        """The field that is given, by its name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) not in (None, False)}

    @property
    def field(self) -> str:
        """The name of the field that is given, as error messages have it."""
        return _name(next(iter(self.given)))

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _name(field: str) -> str:
    return f"structured_outputs.{field}"


def _schema(schema: object) -> JsonText:
    name = _name("json")
    try:
        if isinstance(schema, dict):
            schema = json.dumps(schema, allow_nan=False)
        text = _text("json", schema)
        if not isinstance(json.loads(text), dict):
            raise InvalidValueError(name, text, "must be a JSON schema that is an object")
    except InvalidValueError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValueError(name, f"{type(schema).__name__}", f"must be a JSON schema: {error}") from None
    return text


def _choice(choice: object) -> tuple[str, ...]:
    name = _name("choice")
    if not isinstance(choice, Sequence) or isinstance(choice, (str, bytes)):
        raise InvalidValueError(name, choice, f"must be a list of strings, not {type(choice).__name__}")
    if not 1 <= len(choice) <= MAX_CHOICES:
        raise InvalidValueError(name, f"{len(choice)} strings", f"must be 1 to {MAX_CHOICES}")
    texts = tuple(_text("choice", text) for text in choice)
    if (size := sum(len(text.encode()) for text in texts)) > MAX_GRAMMAR_BYTES:
        raise InvalidValueError(name, f"{size} bytes", f"at most {MAX_GRAMMAR_BYTES} in all")
    return texts


def _text(field: str, text: object) -> str:
    name = _name(field)
    if not isinstance(text, str):
        raise InvalidValueError(name, text, f"must be a string, not {type(text).__name__}")
    if not text:
        raise InvalidValueError(name, text, "must not be empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        limit = f"character {error.start} is half of a surrogate pair, which is no text"
        raise InvalidValueError(name, text, limit) from None
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidValueError(name, f"{size} bytes", f"at most {MAX_GRAMMAR_BYTES}")
    return text
