"""``headwise calibrate``: which KV heads may keep sinks and a window only."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.runtime.cli.options import MODEL_HELP, AsJson, Device, option
from headwise.runtime.cli.printing import print_json
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import Reach

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
Out = Annotated[Path, typer.Argument(help="The JSON file to write, for --streaming-heads.")]
Text = Annotated[Path, option("file", "A long text of the kind that the model will read, UTF-8.")]


def calibrate(
    model: ModelArgument,
    out: Out,
    text: Text,
    sinks: Annotated[int, option("n", "First tokens that streaming heads keep.", min=0)] = 16,
    window: Annotated[int, option("n", "Last tokens that streaming heads keep.", min=1)] = 240,
    share: Annotated[float, option("share", "Of all KV heads, how many become streaming heads.", min=0, max=1)] = 0.5,
    tokens: Annotated[int, option("n", "Tokens of the text to read; more than sinks and window.", min=1)] = 2048,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the KV heads that look no further back than a window.

    Reads a text and measures, for each KV head of each layer, how much attention falls on tokens that are neither among
    the first (sinks) nor among the last (window). The heads with the least become streaming heads, for which the engine
    keeps sinks and window only: headwise generate --streaming-heads OUT.
    """
    from tqdm import tqdm

    from headwise.runtime.calibrate import attention_mass, check_length, streaming_heads
    from headwise.runtime.config import engine_config
    from headwise.runtime.inputs.text_file import tokens_of_file
    from headwise.runtime.models import resolve
    from headwise.runtime.prepare import usable_device
    from headwise.workers.model.checkpoint import model_fingerprint
    from headwise.workers.model.model_config import load_model_config

    where = usable_device(engine_config(model=model, device=device).device)
    _check_out(out, text)
    path, reach = resolve(model), Reach(sinks, window)
    check_length(tokens, reach, load_model_config(path).max_position_embeddings)
    token_ids = tokens_of_file(text, path, tokens)[:tokens]
    with tqdm(total=tokens, desc="calibrating", unit="token", file=sys.stderr) as bar:
        mass = attention_mass(path, token_ids, reach, where, bar.update)
    chosen = streaming_heads(mass, share)
    result: dict[str, Any] = {
        "kv_policy": str(reach),
        "heads": [list(head) for head in chosen],
        "share": share,
        "mass": [[round(one, 6) for one in row] for row in mass],
        "model": model_fingerprint(path),
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "tokens": tokens,
    }
    try:
        out.write_text(json.dumps(result) + "\n")
    except OSError as error:
        raise InvalidValueError("OUT", str(out), f"cannot be written: {error}") from None
    if as_json:
        print_json({"out": str(out), **result})
    else:
        print(_summary(out, reach, mass, set(chosen)))


def _check_out(out: Path, text: Path) -> None:
    """What would otherwise be found out when the text is read."""
    if not out.absolute().parent.is_dir():
        raise InvalidValueError("OUT", str(out), f"the folder {out.absolute().parent} is not there")
    if out.is_dir():
        raise InvalidValueError("OUT", str(out), "is a folder", "name a file, such as heads.json in it")
    if out.exists() and text.exists() and out.samefile(text):
        raise InvalidValueError("OUT", str(out), "is the text itself, which would be overwritten", "name another file")


def _summary(out: Path, reach: Reach, mass: list[list[float]], chosen: set[tuple[int, int]]) -> str:
    of = {(layer, head): one for layer, row in enumerate(mass) for head, one in enumerate(row)}
    lost = [one for place, one in of.items() if place in chosen]
    kept = [one for place, one in of.items() if place not in chosen]
    lines = [f"{out}: {len(lost)} of {len(of)} KV heads stream ({reach})"]
    if lost:
        lines.append(f"attention outside: {sum(lost) / len(lost):.2%} of theirs, at most {max(lost):.2%}")
    if kept:
        lines.append(f"of the other heads': {sum(kept) / len(kept):.2%}, at least {min(kept):.2%}")
    return "\n".join(lines)
