"""The job that a command of ours becomes."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence

from headwise.workers.errors import InvalidValueError

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Whole seconds between the SIGTERM of a job that is stopped and its SIGKILL. Ray reads it in the job's environment;
without, it takes 3."""
DRAIN_S, MARGIN_S = 30.0, 30.0
"""``serve --drain-timeout``, unless it is given; and for everything else that an end takes."""
_SECRET_FLAGS = ("--token",)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|PRIVATE_?KEY", re.IGNORECASE)


def shell_command(words: Sequence[str], sent: bool) -> str:
    """
    Args:
        words: of the command, without ``headwise``.
        sent: whether Headwise is sent along, so that the nodes have no program of that name that is the same.
    """
    program = ["python3", "-m", "headwise.runtime.cli"] if sent else ["headwise"]
    return shlex.join([*program, *words])


def job_environment(given: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """
    Args:
        given: ``NAME=VALUE``.
        words: of the command.

    Returns:
        The variables, and how long Ray has to wait for the command's end.

    Raises:
        InvalidValueError: one is of another form. Says nothing of its value.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise InvalidValueError("--env", name if equals else "...", "must be NAME=VALUE")
        if name in found:
            raise InvalidValueError("--env", name, "is given twice")
        if name == STOP_WAIT and not re.fullmatch(r"[0-9]{1,9}", value):
            raise InvalidValueError("--env", name, "must be a whole number of seconds: Ray could not end the job")
        found[name] = value
    return {STOP_WAIT: str(math.ceil(_drain_s(words) + MARGIN_S))} | found


def secret_names(environment: Mapping[str, str]) -> list[str]:
    """The variables that are secrets, by their names."""
    return [name for name in environment if _SECRET.search(name)]


def secret_flags(words: Sequence[str]) -> list[str]:
    """The flags among a command's words whose values are secrets."""
    return [flag for flag in _SECRET_FLAGS if _value(words, flag)]


def relative_output(words: Sequence[str]) -> str:
    """The command's ``--output``, if it depends on where the command runs; else empty."""
    path = _value(words, "--output")
    return path if path and not path.startswith("/") else ""


def _drain_s(words: Sequence[str]) -> float:
    """What the command says itself; whether that is a number, the command will find out."""
    try:
        given = float(_value(words, "--drain-timeout") or DRAIN_S)
    except ValueError:
        return DRAIN_S
    return given if 0 <= given < 1e6 else DRAIN_S


def _value(words: Sequence[str], name: str) -> str:
    """Of a flag; empty if it is not given. The last one holds."""
    found = ""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag == name:
            found = value if equals else after
    return found
