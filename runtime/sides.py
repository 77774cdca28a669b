"""The two engines of one program: prefill computes the prompts, decode goes on from them. Their settings, from one
config."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from headwise.runtime.config import EngineConfig, HandoffConfig, engine_config, handoff_config
from headwise.workers.errors import InvalidValueError
from headwise.workers.machine import usable_cores

_COMMON = (
    *("model", "dtype", "block_size", "kv_policy", "kv_dtype", "streaming_heads"),
    *("seed", "enable_prefix_caching", "address", "prefill", "handoff"),
)
"""Settings that cannot differ."""
_OWN = ("host_kv_memory", "disk_kv_path", "disk_kv_limit", "num_blocks", "cpus_per_rank")
"""Settings that prefill has only if they are given for it."""


def handoff_settings(
    prefill: Mapping[str, Any] | None,
    decode: Mapping[str, Any] | None,
    min_tokens: int | None,
    on_failure: str,
    shared_memory: bool,
) -> dict[str, Any]:
    """The fields of EngineConfig that make two engines of one; none where ``prefill`` and ``decode`` are both None.

    Raises:
        InvalidValueError: a setting is wrong.
    """
    if prefill is None and decode is None:
        for name, value, default in (
            ("handoff_min_tokens", min_tokens, None),
            ("on_handoff_failure", on_failure, "recompute"),
            ("handoff_shared_memory", shared_memory, True),
        ):
            if value != default:
                raise InvalidValueError(name, value, "is for an engine with prefill and decode", "give prefill={}")
        return {}
    check_side("decode", decode or {})
    check_side("prefill", prefill or {})
    handoff = handoff_config(role="decode", min_tokens=min_tokens, on_failure=on_failure, shared_memory=shared_memory)
    return {**(decode or {}), "prefill": dict(prefill or {}), "handoff": handoff}


def check_side(name: str, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidValueError: a setting is wrong, or cannot differ between the sides.
    """
    if wrong := [key for key in settings if key in _COMMON]:
        raise InvalidValueError(f"{name}[{wrong[0]!r}]", settings[wrong[0]], "is the same for prefill and decode")
    with _named_as_given(name, settings):
        engine_config(model="", **settings)


def prefill_config(config: EngineConfig) -> EngineConfig:
    """The settings of the engine that computes prompts.

    Raises:
        InvalidValueError: one is wrong.
    """
    assert config.prefill is not None
    check_side("prefill", config.prefill)
    common = config.model_dump(exclude={"prefill", "handoff", *_OWN})
    shared_memory = config.handoff.shared_memory if config.handoff is not None else True
    handoff = HandoffConfig(role="prefill", shared_memory=shared_memory)
    side = engine_config(**common | config.prefill | {"handoff": handoff})
    return side.model_copy(update={"cpus_per_rank": side.cpus_per_rank or _cpus_per_rank(config)})


def decode_config(config: EngineConfig, address: str) -> EngineConfig:
    """The settings of the engine that generates.

    Args:
        address: of the other.
    """
    handoff = (config.handoff or HandoffConfig(role="decode")).model_copy(update={"peers": (address,)})
    cpus = config.cpus_per_rank or _cpus_per_rank(config)
    return config.model_copy(update={"prefill": None, "handoff": handoff, "cpus_per_rank": cpus})


def pool_configs(config: EngineConfig) -> tuple[EngineConfig, EngineConfig]:
    """The settings of the prefill and of the decode replicas of a deployment, with a token that nobody else has. Who
    computes prompts for whom they are told once they run.

    Raises:
        InvalidValueError: a setting is wrong.
    """
    assert config.prefill is not None
    check_side("prefill", config.prefill)
    token = secrets.token_hex(32)
    decode = (config.handoff or HandoffConfig(role="decode")).model_copy(update={"token": token})
    files = {name: getattr(decode, name) for name in ("ca", "tls_cert", "tls_key")}
    handoff = HandoffConfig(role="prefill", shared_memory=decode.shared_memory, token=token, **files)
    common = config.model_dump(exclude={"prefill", "handoff", *_OWN})
    side = engine_config(**common | config.prefill | {"handoff": handoff})
    return side, config.model_copy(update={"prefill": None, "handoff": decode})


@contextmanager
def _named_as_given(side: str, settings: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except InvalidValueError as error:
        if error.field not in settings:
            raise
        raise InvalidValueError(f"{side}[{error.field!r}]", error.value, error.limit, error.fix) from None


def _cpus_per_rank(config: EngineConfig) -> float | None:
    """Where nobody has said how many: the cores of this machine are for the ranks of both sides alike."""
    assert config.prefill is not None
    if config.device == "cuda" or (config.address or os.environ.get("RAY_ADDRESS")):
        return None
    ranks: int = config.tensor_parallel_size + config.prefill.get("tensor_parallel_size", config.tensor_parallel_size)
    # Ray counts in ten-thousandths: three thirds of a core, rounded up, would not fit in it.
    return math.floor(usable_cores() / ranks * 10_000) / 10_000
