"""``headwise doctor``: what would keep an engine from starting here, and the fix of each."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from headwise.runtime.cli.options import (
    MODEL_HELP,
    Address,
    AsJson,
    Attention,
    Device,
    DiskKvPath,
    Dtype,
    Executor,
    KvDtype,
    KvMemory,
    KvPolicy,
    MaxModelLen,
    StreamingHeads,
    Tp,
    engine_settings,
    option,
)
from headwise.runtime.cli.printing import print_json
from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from rich.table import Table

    from headwise.runtime.doctor.finding import Finding

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    model: Annotated[
        str | None, option("path", f"{MODEL_HELP} Without it, what is of a model alone is left out.", "--model", "-m")
    ] = None,
    tp: Tp = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    attention: Attention = None,
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    streaming_heads: StreamingHeads = None,
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    gpu_memory: Annotated[
        str | None, option("size", "Memory of each rank's GPU: 80GiB; default: what is free on this machine's.")
    ] = None,
    disk_kv_path: DiskKvPath = None,
    address: Address = None,
    host: Annotated[str, option("address", "The address that the server would listen on.")] = "127.0.0.1",
    port: Annotated[int, option("port", "Its port for gRPC.", min=0, max=65535)] = 50051,
    metrics_port: Annotated[int | None, option("port", "Its port for metrics.", min=0, max=65535)] = None,
    metrics_host: Annotated[str, option("address", "The address of its metrics.")] = "127.0.0.1",
    openai_port: Annotated[int | None, option("port", "Its port for OpenAI's API.", min=0, max=65535)] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what would keep a server from starting.

    And say what to do about it. Give it the options of the server. Each line is pass, warn (it works, but slower, less
    safely or not with every setting) or fail. The exit code is 1 if a line is fail, and 0 else. Starts no Ray, loads no
    weights.
    """
    from rich.console import Console

    from headwise.runtime.config import engine_config
    from headwise.runtime.doctor.examine import Setup, examine

    settings = engine_settings(
        *(tp, dtype, device, executor, max_model_len, kv_memory, None, address),
        attention=attention,
        kv_policy=kv_policy,
        kv_dtype=kv_dtype,
        streaming_heads=streaming_heads,
    )
    config = engine_config(model=model or "", disk_kv_path=disk_kv_path, **settings)
    ports = [
        ("--port", host, port),
        ("--metrics-port", metrics_host, metrics_port),
        ("--openai-port", host, openai_port),
    ]
    given = tuple((flag, where, number) for flag, where, number in ports if number is not None)
    found = list(examine(Setup(config, given, _bytes(gpu_memory))))
    counts = Counter(str(finding.level) for finding in found)
    if as_json:
        print_json({"findings": [asdict(finding) for finding in found], **{name: counts[name] for name in _STYLES}})
    else:
        Console().print(_table(found, f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail"))
    sys.exit(1 if counts["fail"] else 0)


def _bytes(gpu_memory: str | None) -> int | None:
    if gpu_memory is None:
        return None
    from headwise.workers.kv.sizes import parse_memory

    try:
        return parse_memory(gpu_memory, 0)
    except InvalidValueError:
        raise InvalidValueError("--gpu-memory", gpu_memory, 'must be a size in bytes, such as "80GiB"') from None


def _table(found: Sequence[Finding], summary: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(caption=summary, caption_justify="left")
    for column in ("", "check"):
        made.add_column(column)
    made.add_column("what is so, and the fix", overflow="fold")
    for finding in found:
        said = Text(finding.said)
        if finding.fix:
            said.append(f"\nfix: {finding.fix}", style="bold")
        made.add_row(Text(finding.level, style=_STYLES[finding.level]), Text(finding.name), said)
    return made
