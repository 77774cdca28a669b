"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headwise.workers.errors import HeadwiseError, InvalidValueError


class Level(StrEnum):
    """``WARN``: an engine works, but slower, less safely, or not with every setting. ``FAIL``: it would not work."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        name: of the check, and of what it looked at where it looks at several.
        said: what is so, with the numbers.
        fix: what to do; empty if the check passed.
    """

    name: str
    level: Level
    said: str
    fix: str = ""


def passed(name: str, said: str) -> Finding:
    return Finding(name, Level.PASS, said)


def warned(name: str, said: str, fix: str) -> Finding:
    return Finding(name, Level.WARN, said, fix)


def failed(name: str, said: str, fix: str) -> Finding:
    return Finding(name, Level.FAIL, said, fix)


def refused(name: str, error: HeadwiseError, fix: str) -> Finding:
    """A failure of an error with which an engine would refuse to start.

    Args:
        fix: what to do where the error does not say. An error says it after its last semicolon.
    """
    own = error.fix if isinstance(error, InvalidValueError) else str(error).rpartition("; ")[2]
    said = str(error).removesuffix(f"; {own}")
    return failed(name, said, own if own and said != str(error) else fix)
