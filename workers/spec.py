"""ShardSpec: what a group is built from. Imports no torch: an actor reads it before it sets torch's threads."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.workers.kv.handoff import HandoffSpec
from headwise.workers.kv.policy import DENSE_TEXT


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What every rank of a group is built from; the same on all of them.

    Attributes:
        model_dir: a directory in Hugging Face form, at the same path on every rank's host.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda`` (the first GPU that the process sees) or ``cuda:`` and a GPU's index there.
        attention: the attention backend, a name of backends.py; None takes the best one for device and dtype.
        kv_memory: what this rank may spend on KV: ``"2GiB"``, bytes, or a fraction of the memory that is free once
            the weights are loaded (on CPU shared out among the ranks of the group, and without what host_kv_blocks
            will take; on CUDA without what steps need).
        max_num_batched_tokens: most tokens of a step; on CUDA, steps are given memory for them.
        host_kv_blocks: how many of its blocks this rank may keep in host memory below the device's.
        disk_kv_path: a folder for files of blocks; each rank keeps its own in a sub-folder. None keeps none.
        kv_identity: what blocks on disk were computed from, apart from what each rank knows itself (its place, heads,
            shapes, dtype): those of another identity are deleted.
        handoff: how KV is handed over to other groups, or taken from them; None does neither.
        kv_policy: which tokens' keys and values each layer and KV head keeps, as in :mod:`headwise.workers.kv.policy`.
        kv_dtype: in what form they are kept, one of :data:`headwise.workers.kv.format.KV_DTYPES`; None is ``dtype``.
    """

    model_dir: str
    tensor_parallel_size: int
    dtype: str
    device: str
    block_size: int
    max_num_seqs: int
    max_model_len: int
    kv_memory: str | int | float
    max_num_batched_tokens: int = 1024
    attention: str | None = None
    host_kv_blocks: int = 0
    disk_kv_path: str | None = None
    kv_identity: bytes = b""
    handoff: HandoffSpec | None = None
    kv_policy: str = DENSE_TEXT
    kv_dtype: str | None = None
