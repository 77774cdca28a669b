"""Processes that a test starts to lose: forked from a server that has imported torch, so that many are cheap."""

from __future__ import annotations

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "headwise.workers.collectives.shared_memory",
        "headwise.workers.collectives.torch_distributed",
        "headwise.workers.kv.store",
    ]
)
