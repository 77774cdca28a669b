"""How many replicas a deployment has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headwise.workers.errors import InvalidValueError

MAX_REPLICAS = 64
"""Of one front, where nobody names a limit."""


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """
    Attributes:
        replicas: how many there are to be at first.
        least, most: how many there may be.
        autoscale: whether the load decides how many there are, between ``least`` and ``most``.
        drain_timeout_s: for the requests of a replica that is to end; then they go on elsewhere.
        prefill: how many replicas there are besides that compute prompts for those.
    """

    replicas: int
    least: int = 1
    most: int = MAX_REPLICAS
    autoscale: bool = False
    drain_timeout_s: float = 30.0
    prefill: int = 0


def replica_options(
    replicas: int | None,
    min_replicas: int | None,
    max_replicas: int | None,
    drain_timeout_s: float = 30.0,
    prefill: int = 0,
    decode: int | None = None,
) -> ReplicaOptions | None:
    """From the flags of ``headwise serve``. None: one engine, in the server's own process.

    Args:
        prefill, decode: the numbers in ``--prefill`` and ``--decode``.

    Raises:
        InvalidValueError: they do not fit each other.
    """
    if decode is None:
        return _replica_options(replicas, min_replicas, max_replicas, drain_timeout_s)
    if replicas is not None:
        limit = "--prefill and --decode say how many replicas there are"
        raise InvalidValueError("--replicas", replicas, limit, "leave it out")
    options = _replica_options(decode, min_replicas, max_replicas, drain_timeout_s)
    return None if options is None else replace(options, prefill=prefill)


def _replica_options(
    replicas: int | None, min_replicas: int | None, max_replicas: int | None, drain_timeout_s: float
) -> ReplicaOptions | None:
    if min_replicas is None and max_replicas is None:
        if replicas is None:
            return None
        if not 1 <= replicas <= MAX_REPLICAS:
            raise InvalidValueError("--replicas", replicas, f"must be from 1 to {MAX_REPLICAS}")
        return ReplicaOptions(replicas, drain_timeout_s=drain_timeout_s)
    if max_replicas is None:
        limit = "the load chooses between --min-replicas and --max-replicas, and one is missing"
        raise InvalidValueError("--min-replicas", min_replicas, limit, "give --max-replicas too")
    least = 1 if min_replicas is None else min_replicas
    if not 1 <= least <= max_replicas:
        raise InvalidValueError("--min-replicas", least, f"must be from 1 to --max-replicas={max_replicas}")
    first = least if replicas is None else replicas
    if not least <= first <= max_replicas:
        limit = f"must be from --min-replicas={least} to --max-replicas={max_replicas}"
        raise InvalidValueError("--replicas", first, limit)
    return ReplicaOptions(first, least, max_replicas, True, drain_timeout_s)
