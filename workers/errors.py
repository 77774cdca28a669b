"""The typed errors of every floor: each names the field or flag, the value, the limit and what to do."""

from __future__ import annotations

_SHOWN = 80


class HeadwiseError(Exception):
    """The base of every error Headwise raises on purpose."""


class InvalidValueError(HeadwiseError, ValueError):
    """A field, argument or flag has a value outside its limit.

    Args:
        field: its name as the caller wrote it, such as ``max_tokens`` or ``--tp``.
        value: what was given; shortened to 80 characters in the message.
        limit: what is allowed, with the numbers.
        fix: what to do about it, when that is more than obeying the limit.
    """

    def __init__(self, field: str, value: object, limit: str, fix: str = "") -> None:
        self.field, self.value, self.limit, self.fix = field, value, limit, fix
        shown = _show(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
        super().__init__(f"{field}={shown}: {limit}" + (f"; {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type[InvalidValueError], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.limit, self.fix)


def _show(value: object) -> str:
    try:
        # Cut first: what is refused for its length may be long.
        return repr(value[:_SHOWN] if isinstance(value, (str, bytes, list, tuple)) else value)
    except Exception:  # an int of more digits than Python prints, or something of the caller's own
        return f"<{type(value).__name__}>"


class UnsupportedModelError(HeadwiseError):
    """The checkpoint's configuration asks for something this runtime does not compute."""


class CheckpointError(HeadwiseError):
    """A model file is missing, truncated, or does not hold what its configuration promises."""


class PeerDiedError(HeadwiseError):
    """Another rank of the same group died or gave up while this one waited for it."""

    def __init__(self, rank: int, cause: str) -> None:
        self.rank, self.cause = rank, cause
        super().__init__(f"rank {rank} of this group {cause}")

    def __reduce__(self) -> tuple[type[PeerDiedError], tuple[int, str]]:
        return type(self), (self.rank, self.cause)
