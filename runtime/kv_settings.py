"""What the settings of an engine say of its keys and values, for one model: the policy, and the form they are kept in.

A file of *streaming heads*, which ``headwise calibrate`` writes, is JSON: an object with ``kv_policy``, one rule such
as ``"sinks:16,240"``, and ``heads``, the KV heads that it is for, as pairs of layer and head. ``model``, which may be
left out, is the fingerprint of the model. What else the object has is for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwise.runtime.config import EngineConfig
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KvFormat, kv_format
from headwise.workers.kv.policy import DENSE_TEXT, KvPolicy, check_policy, resolve_policy
from headwise.workers.model.checkpoint import model_fingerprint
from headwise.workers.model.model_config import ModelConfig

MAX_FILE_BYTES = 1 << 20
"""Of a file of streaming heads; that of a model with 10,000 KV heads is a tenth as long."""
_FIX = "write the file with headwise calibrate"


def model_policy(config: EngineConfig, model: ModelConfig) -> KvPolicy:
    """The policy of a model's layers and KV heads.

    Raises:
        InvalidValueError: ``kv_policy`` or ``streaming_heads`` does not fit the model, or each other, or the policy
            does not go with other settings.
    """
    if config.streaming_heads is not None:
        _check_heads(config.streaming_heads, _read(config.streaming_heads), model)
    text = with_streaming_heads(config).kv_policy
    policy = resolve_policy(text, model.num_layers, model.num_kv_heads, model.sliding_windows)
    if policy.num_groups > 1:
        _refuse_several(config, policy)
    return policy


def model_format(config: EngineConfig, model: ModelConfig, dtype: str) -> KvFormat:
    """The form of a model's keys and values.

    Args:
        dtype: in which the model is computed: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        InvalidValueError: ``kv_dtype`` does not work with the model's heads.
    """
    return kv_format(config.kv_dtype or dtype, model.head_dim)


def kv_name(kv_dtype: str, dtype: str) -> str:
    """What makes blocks of the same tokens differ by dtype: their form, and the dtype that they were computed in."""
    return dtype if kv_dtype == dtype else f"{kv_dtype} of {dtype}"


def with_streaming_heads(config: EngineConfig) -> EngineConfig:
    """The same settings without the file of streaming heads: what it says stands before the rest of ``kv_policy``. Who
    gets them need not have the file.

    Raises:
        InvalidValueError: the file cannot be used.
    """
    if config.streaming_heads is None:
        return config
    found = _read(config.streaming_heads)
    places = ",".join(f"{layer}.{head}" for layer, head in found["heads"])
    text = f"{found['kv_policy']}@{places};{config.kv_policy}" if places else config.kv_policy
    return config.model_copy(update={"kv_policy": text, "streaming_heads": None})


def heads_notes(config: EngineConfig, path: Path) -> Iterator[str]:
    """A line if the streaming heads were found for another model than that in ``path``."""
    if config.streaming_heads is None:
        return
    made_for = _read(config.streaming_heads).get("model")
    if isinstance(made_for, str) and made_for != model_fingerprint(path):
        yield (
            f"streaming_heads={config.streaming_heads} was written for a model with other weights or another "
            "config.json, whose heads may need other tokens; headwise calibrate finds those of this model"
        )


def _refuse_several(config: EngineConfig, policy: KvPolicy) -> None:
    """A block of tokens is one block in each group: what moves blocks elsewhere knows of one."""
    used = {
        "host_kv_memory": config.host_kv_memory is not None,
        "disk_kv_path": config.disk_kv_path is not None,
        "prefill": config.prefill is not None,
        "handoff": config.handoff is not None,
    }
    if name := next((name for name, is_used in used.items() if is_used), None):
        limit = f"heads that keep different tokens, of which there are {policy.num_groups} groups here, do not work "
        limit += f"with {name}"
        fix = f"leave out {name}, or give all heads the same policy"
        raise InvalidValueError("kv_policy", policy.text, limit, fix)


def _read(path: str) -> dict[str, Any]:
    """What a file of streaming heads says, checked as far as that can be without a model."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # the latter two: of NUL, and of ~ and no such user
        limit = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise InvalidValueError("streaming_heads", path, limit, "give a file of headwise calibrate") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidValueError("streaming_heads", path, f"is larger than {MAX_FILE_BYTES} bytes", _FIX)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError("streaming_heads", path, f"is not JSON: {error}", _FIX) from None
    if not isinstance(found, dict):
        raise InvalidValueError("streaming_heads", path, f"holds a JSON {type(found).__name__}, not an object", _FIX)
    _check_rule(path, found.get("kv_policy"))
    heads = found.get("heads")
    if not isinstance(heads, list):
        raise _wrong(path, "heads", heads, "must be a list of [layer, KV head]")
    for index, head in enumerate(heads):
        if not isinstance(head, list) or len(head) != 2 or not all(type(n) is int and n >= 0 for n in head):
            raise _wrong(path, f"heads[{index}]", head, "must be [layer, KV head], both counted from 0")
    return found


def _check_rule(path: str, rule: Any) -> None:
    if not isinstance(rule, str):
        raise _wrong(path, "kv_policy", rule, "must be window:L or sinks:S,L, the policy of its heads")
    try:
        check_policy(rule)
    except InvalidValueError as error:
        raise _wrong(path, "kv_policy", rule, error.limit) from None
    if "@" in rule or ";" in rule or rule.strip() == DENSE_TEXT:
        raise _wrong(path, "kv_policy", rule, "must be window:L or sinks:S,L alone; heads says whose it is")


def _check_heads(path: str, found: dict[str, Any], model: ModelConfig) -> None:
    for index, (layer, head) in enumerate(found["heads"]):
        if layer >= model.num_layers or head >= model.num_kv_heads:
            limit = f"the model has layers 0 to {model.num_layers - 1} and KV heads 0 to {model.num_kv_heads - 1}"
            raise _wrong(path, f"heads[{index}]", [layer, head], limit)


def _wrong(path: str, field: str, value: Any, limit: str) -> InvalidValueError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return InvalidValueError("streaming_heads", path, f"{field}={shown} in it: {limit}", _FIX)
