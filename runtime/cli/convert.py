"""``headwise convert``: a model with fewer KV heads, as a checkpoint of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.runtime.cli.options import AsJson, option
from headwise.runtime.cli.printing import print_json

if TYPE_CHECKING:
    from headwise.runtime.convert import Converted

ModelPath = Annotated[
    str,
    typer.Argument(help="A directory with config.json and safetensors files, a .gguf file, or smollm2."),
]
Out = Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet.")]
KvHeads = Annotated[int, option("n", "KV heads to keep; divides the model's. 1 is MQA.")]


def convert(model: ModelPath, out: Out, kv_heads: KvHeads, as_json: AsJson = False) -> None:
    """Write a model with fewer KV heads.

    Each is the mean of several (GQA, arXiv 2305.13245), so KV of a token takes that much less memory. The model has to
    be trained further to be as good as it was. The result is a checkpoint as any other, in Hugging Face form.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from headwise.runtime.convert import TRAIN_FURTHER, convert_kv_heads

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), redirect_stdout=False) as bar:
        task = bar.add_task(f"Writing {out.name}", total=None, visible=False)

        def show(done: int, whole: int) -> None:
            bar.update(task, completed=done, total=whole, visible=True)

        made = convert_kv_heads(model, kv_heads, out, show)
    note = TRAIN_FURTHER if made.new.num_kv_heads < made.old.num_kv_heads else ""
    if as_json:
        print_json(_json(model, made) | {"note": note})
    else:
        print(_text(made))
    if note:
        print(f"headwise: {note}", file=sys.stderr)


def _json(model: str, made: Converted) -> dict[str, Any]:
    return {
        "model": model,
        "out": str(made.path),
        "query_heads": made.new.num_heads,
        "kv_heads_before": made.old.num_kv_heads,
        "kv_heads": made.new.num_kv_heads,
        "weight_bytes": made.weight_bytes,
    }


def _text(made: Converted) -> str:
    old, new = made.old.num_kv_heads, made.new.num_kv_heads
    share = f"1/{old // new} of the memory" if new < old else "as much memory"
    return f"{made.path}: {new} KV heads for {made.new.num_heads} query heads, of {old}; KV of a token takes {share}"
