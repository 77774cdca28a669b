"""Cases of a part, one by one: one that fails does not cost the others."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Case = dict[str, Any]


class CasesFailedError(Exception):
    """Cases could not be measured; the others were."""


class WrongNumbersError(Exception):
    """Something was computed wrongly."""


class OutOfTimeError(BaseException):
    """A part took longer than its budget. No Exception, so that whoever catches those does not go on for longer."""


def each(cases: Iterable[tuple[Case, Callable[[], Case]]]) -> Iterator[Case]:
    """What comes of each case, as soon as it is there.

    Args:
        cases: each with what measures it, and gives what is to be added to it.

    Raises:
        CasesFailedError: when all others are done.
    """
    failed = []
    for case, measure in cases:
        said = ", ".join(f"{key} {value}" for key, value in case.items())
        try:
            result = case | measure()
        except Exception as error:
            traceback.print_exc()
            result = case | {"left_out": f"{type(error).__name__}: {error}"[:200]}
            failed.append(f"{said}: {result['left_out']}")
        print(said, "->", {key: value for key, value in result.items() if key not in case}, file=sys.stderr)
        yield result
    if failed:
        raise CasesFailedError("; ".join(failed))
