"""ShardSpec: what a group is built from. Imports no torch: an actor reads it before it sets torch's threads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What every rank of a group is built from; the same on all of them.

    Attributes:
        model_dir: a directory in Hugging Face form, at the same path on every rank's host.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu`` or ``cuda`` (the process's first GPU).
        attention: the attention backend, ``reference`` or ``cpu``; None takes the best one for device and dtype.
        kv_memory: what this rank may spend on KV: ``"2GiB"``, bytes, or a fraction of the memory that is free once
            the weights are loaded (on CPU shared out among the ranks of the group).
    """

    model_dir: str
    tensor_parallel_size: int
    dtype: str
    device: str
    block_size: int
    max_num_seqs: int
    max_model_len: int
    kv_memory: str | int | float
    attention: str | None = None
