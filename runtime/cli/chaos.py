"""``headwise chaos``: kills and other faults while requests run, and whether every client got what it was to get."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Annotated

from headwise.runtime.cli.options import (
    Address,
    AsJson,
    CpusPerRank,
    Device,
    DiskKvPath,
    Dtype,
    Executor,
    HostKvMemory,
    KvMemory,
    MaxModelLen,
    Model,
    Tp,
    WarmSpare,
    engine_settings,
    option,
)
from headwise.runtime.cli.printing import print_json


def chaos(
    model: Model,
    tp: Tp = 2,
    minutes: Annotated[float, option("n", "For how long faults come.", min=0.01)] = 2.0,
    seed: Annotated[
        int | None, option("n", "The same seed has the same requests and faults; default: a random one.", min=0)
    ] = None,
    streams: Annotated[int, option("n", "Clients, each of which asks one thing at a time.", min=1, max=128)] = 12,
    deadline: Annotated[float, option("seconds", "A request that takes longer hangs.", min=1)] = 300.0,
    history: Annotated[Path | None, option("file", "What each client saw, as JSON lines.", dir_okay=False)] = None,
    warm_spare: WarmSpare = False,
    step_timeout: Annotated[
        float | None, option("seconds", "A step that takes longer hangs; default: by what steps take.", min=0.1)
    ] = None,
    host_kv_memory: HostKvMemory = None,
    disk_kv_path: DiskKvPath = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 1024,
    kv_memory: KvMemory = "256MiB",
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Kill shards while requests run, and check every token.

    An engine is started for it. Its answers to a set of questions are taken first, undisturbed; then clients ask them
    while ranks are killed, stopped and made to fail. Printed are the faults, the pauses of the streams, and what was
    found: a token that is wrong, lost or doubled, a request that hangs or fails, anything left behind.

    The exit code is 0 if nothing was found, 1 if something was, 2 for a wrong flag or model.
    """
    from headwise.runtime.chaos.run import Load, run
    from headwise.runtime.chaos.verdict import show

    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    more = {"host_kv_memory": host_kv_memory, "disk_kv_path": disk_kv_path, "step_timeout": step_timeout}
    settings |= {name: value for name, value in more.items() if value is not None} | {"warm_spare": warm_spare}
    chosen = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    verdict = run(model, Load(chosen, 60 * minutes, streams, deadline, history), settings)
    if as_json:
        print_json(verdict.as_dict())
    else:
        show(verdict)
    sys.exit(1 if verdict.findings else 0)
