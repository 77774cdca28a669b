"""``headwise plan``: what a model takes of memory, from its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.runtime.cli.options import AsJson, KvPolicy, StreamingHeads, Tp, option
from headwise.runtime.cli.printing import print_json
from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from headwise.runtime.capacity import Capacity, Room

_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_GIB = 1 << 30
_BATCHES = (1, 8, 32, 128)
"""Of the lines in the picture."""

ModelFolder = Annotated[
    str,
    typer.Argument(help="A directory with a config.json, that file, a .gguf file, or smollm2; no weights needed."),
]
Dtype = Annotated[str, option("type", "float32, bfloat16, float16 (or fp32, bf16, fp16), or auto: the checkpoint's.")]
KvDtype = Annotated[
    str | None,
    option("type", "Of keys and values: as --dtype, or int8, int4, or int8/int4 for keys/values; default: --dtype."),
]
GpuMemory = Annotated[str | None, option("size", "Memory of each rank's GPU, or of its part of a host: 80GiB.")]
KvMemory = Annotated[str, option("size", "Of what the weights leave there, what KV may take: 0.9, or 16GiB.")]
RequestTokens = Annotated[
    int | None, option("n", "Tokens of a request, prompt and output together; default: the model's own limit.")
]
BlockSize = Annotated[int, option("n", "Tokens of a KV block.")]
HostKvMemory = Annotated[str | None, option("size", "Host memory of each rank for KV blocks: 64GiB.")]
DiskKvLimit = Annotated[str | None, option("size", "Disk of each rank for KV blocks: 1000GiB.")]
Plot = Annotated[
    Path | None, option("file", "Also draw memory against context: a .png, .svg or .pdf; needs 'headwise[plot]'.")
]


def plan(
    model: ModelFolder,
    tp: Tp = 1,
    dtype: Dtype = "auto",
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    streaming_heads: StreamingHeads = None,
    gpu_memory: GpuMemory = None,
    kv_memory: KvMemory = "0.9",
    max_model_len: RequestTokens = None,
    block_size: BlockSize = 16,
    host_kv_memory: HostKvMemory = None,
    disk_kv_limit: DiskKvLimit = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Say what a model takes of memory.

    Bytes of weights and of KV, of all ranks and of each, and with --gpu-memory how many tokens and requests fit. What
    steps need for a time is measured at start; it has to fit in the memory that --kv-memory leaves. KV of a request
    that keeps a window is what it takes once its prompt is computed; before, it takes as much more as a step computes.
    """
    from rich.console import Console

    from headwise.runtime.bench.figures import check_plot
    from headwise.runtime.capacity import DTYPE_BYTES, capacity, room
    from headwise.runtime.config import engine_config
    from headwise.runtime.kv_settings import model_format, model_policy

    check_plot(plot)
    config = _config(model)
    name = config.dtype if dtype == "auto" else _ALIASES.get(dtype, dtype)
    if name not in DTYPE_BYTES:
        raise InvalidValueError("dtype", name, f"must be one of {', '.join(DTYPE_BYTES)}")
    form = None if kv_dtype is None else _ALIASES.get(kv_dtype, kv_dtype)
    settings = engine_config(model="", kv_policy=kv_policy, kv_dtype=form, streaming_heads=streaming_heads)
    policy, kept = model_policy(settings, config), model_format(settings, config, name)
    tokens = max_model_len or config.max_position_embeddings
    taken = capacity(config, tp, name, tokens, block_size, policy=policy, format=kept)
    budgets = {"gpu_memory": gpu_memory, "host_kv_memory": host_kv_memory, "disk_kv_limit": disk_kv_limit}
    rooms = {field: room(taken, field, size, kv_memory) for field, size in budgets.items() if size is not None}
    if as_json:
        print_json(_json(model, name, taken, rooms))
    else:
        Console().print(_table(model, name, taken, rooms))
    if plot is not None:
        _draw(model, name, taken, rooms.get("gpu_memory")).savefig(plot)


def _config(model: str) -> Any:
    from headwise.runtime.models import resolve
    from headwise.workers.model.model_config import load_model_config

    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        if path.name != "config.json":
            raise InvalidValueError("MODEL", model, "a file of shapes is named config.json", "name its directory")
        return load_model_config(path.parent)
    return load_model_config(resolve(model))


def _json(model: str, dtype: str, taken: Capacity, rooms: dict[str, Room]) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": dtype,
        "tp": len(taken.ranks),
        "attention": taken.attention,
        "block_size": taken.block_size,
        "request_tokens": taken.request_tokens,
        "weight_bytes": taken.weight_bytes,
        "kv_policy": taken.policy.text,
        "kv_dtype": str(taken.format),
        "kv_bytes_per_token": taken.kv_bytes_per_token,
        "kv_bytes_per_request": taken.kv_bytes_per_request,
        "kv_constant_after_tokens": taken.constant_after,
        "groups": [group._asdict() | {"reach": str(group.reach)} for group in taken.groups],
        "ranks": [
            {
                "rank": rank.rank,
                "query_heads": list(rank.query_heads),
                "kv_heads": list(rank.kv_heads),
                "weight_bytes": rank.weight_bytes,
                "kv_bytes_per_token": rank.kv_bytes_per_token,
                "kv_bytes_per_request": rank.kv_bytes_per_request,
            }
            for rank in taken.ranks
        ],
        "fits": {
            field: {"blocks": one.blocks, "tokens": one.tokens, "requests": one.requests, "kv_bytes": one.kv_bytes}
            for field, one in rooms.items()
        },
    }


def _table(model: str, dtype: str, taken: Capacity, rooms: dict[str, Room]) -> Table:
    from headwise.runtime.bench.report import table
    from headwise.runtime.sizes import size_text

    rows = [
        [
            f"rank {rank.rank}",
            _range(rank.query_heads),
            _range(rank.kv_heads),
            size_text(rank.weight_bytes),
            size_text(rank.kv_bytes_per_token),
            size_text(rank.kv_bytes_per_request),
        ]
        for rank in taken.ranks
    ]
    whole = [size_text(n) for n in (taken.weight_bytes, taken.kv_bytes_per_token, taken.kv_bytes_per_request)]
    rows.append(["all", "", "", *whole])
    fits = [
        f"{field} ({'+'.join(sorted({size_text(n) for n in one.kv_bytes}))} of KV a rank) holds {one.tokens:,} tokens, "
        f"or {one.requests:,} requests of {taken.request_tokens:,} tokens at a time"
        for field, one in rooms.items()
    ]
    if not taken.policy.plain:
        fits = [*_groups(taken), *fits]
    columns = ("", "query heads", "KV heads", "weights", "KV a token", f"KV of {taken.request_tokens:,} tokens")
    kept = "" if str(taken.format) == dtype else f", KV {taken.format}"
    title = f"{model}: {taken.attention}, {dtype}{kept}, blocks of {taken.block_size} tokens"
    return table(title, columns, rows, "\n".join(fits) or None)


def _groups(taken: Capacity) -> list[str]:
    """A line for each group of heads, and one where requests stop growing."""
    from headwise.runtime.sizes import size_text

    lines = [
        f"{group.reach}: {group.heads:,} KV heads of all layers, {size_text(group.kv_bytes_per_token)} a token, "
        f"{group.request_blocks:,} blocks or {size_text(group.kv_bytes_per_request)} a request"
        for group in taken.groups
    ]
    if (tokens := taken.constant_after) is not None:
        lines.append(f"a request takes no more from {tokens:,} tokens on")
    return lines


def _draw(model: str, dtype: str, taken: Capacity, room: Room | None) -> Figure:
    """Memory of the rank that takes the most, by context, a line for each number of requests."""
    from headwise.runtime.bench import figures

    rank = max(taken.ranks, key=lambda one: (one.kv_bytes_per_token, one.weight_bytes))
    subtitle = f"{Path(model).name}, {dtype}, rank {rank.rank} of {len(taken.ranks)}: weights and KV"
    figure, [axes] = figures.new_figure("Memory by context", subtitle, 1)
    contexts = [taken.request_tokens * step // 64 for step in range(65)]
    for color, batch in zip(figures.COLORS, _BATCHES, strict=True):
        used = [(rank.weight_bytes + batch * taken.request_bytes(rank, context)) / _GIB for context in contexts]
        axes.plot(contexts, used, color=color, label=f"{batch} request{'s' * (batch > 1)}")
    if room is not None:
        limit = (rank.weight_bytes + room.kv_bytes[rank.rank]) / _GIB
        axes.axhline(limit, color=figures.BOUND_COLOR, linestyle="--", label="weights and memory for KV")
        axes.set_ylim(0, 1.5 * limit)
    axes.set(xlabel="tokens of each request", ylabel="GiB", xlim=(0, taken.request_tokens))
    axes.legend(loc="upper left")
    return figure


def _range(bounds: tuple[int, int]) -> str:
    first, stop = bounds
    return f"{first}" if stop - first == 1 else f"{first}-{stop - 1}"
