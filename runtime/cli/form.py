"""The form of an output on the command line: ``--json-schema``, ``--regex`` or ``--choice``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.runtime.cli.options import FlagError
from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from headwise.runtime.structured_outputs import StructuredOutputsParams

Form = tuple[str, Path | str | list[str]]
"""What the output has to be: the flag, and what was given with it."""


def given_form(json_schema: Path | None, regex: str | None, choice: list[str] | None) -> Form | None:
    """
    Raises:
        FlagError: several are given.
    """
    forms = {"--json-schema": json_schema, "--regex": regex, "--choice": choice or None}
    given: list[Form] = [(flag, value) for flag, value in forms.items() if value is not None]
    if len(given) > 1:
        raise FlagError(
            " and ".join(flag for flag, _ in given), "do not go together", f"give one of {', '.join(forms)}"
        )
    return given[0] if given else None


def structured_outputs(form: Form | None) -> StructuredOutputsParams | None:
    from headwise.runtime.structured_outputs import MAX_GRAMMAR_BYTES, StructuredOutputsParams

    match form:
        case ("--json-schema", Path() as path):
            try:
                schema = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidValueError("--json-schema", str(path), f"cannot be read: {error}") from None
            if (size := len(schema.encode())) > MAX_GRAMMAR_BYTES:
                raise InvalidValueError("--json-schema", str(path), f"has {size} bytes, more than {MAX_GRAMMAR_BYTES}")
            return StructuredOutputsParams(json=schema)
        case ("--regex", str() as regex):
            return StructuredOutputsParams(regex=regex)
        case (_, list() as choice):
            return StructuredOutputsParams(choice=choice)
    return None


@contextmanager
def told_in_flags(form: Form | None) -> Iterator[None]:
    """Has errors name the flag and the file of the output's form, where they name the API's fields."""
    try:
        yield
    except InvalidValueError as error:
        if form is None or error.field.partition(".")[0] != "structured_outputs":
            raise
        flag, given = form
        # Of choices, it is one, or how many they are, that is wrong.
        value = error.value if error.field == "structured_outputs.choice" else given
        raise InvalidValueError(
            flag, str(value) if isinstance(value, Path) else value, error.limit, error.fix
        ) from None
