"""The tokens of a text file, for commands that look at how a model reads."""

from __future__ import annotations

from pathlib import Path

from headwise.runtime.inputs.tokenizer import load_tokenizer
from headwise.workers.errors import InvalidValueError

MAX_BYTES = 64 << 20


def tokens_of_file(text: Path, model: Path, least: int) -> list[int]:
    """
    Args:
        text: UTF-8.
        model: the directory of a model with a tokenizer.
        least: how many tokens it must have.

    Raises:
        InvalidValueError: the file cannot be read, is not UTF-8, is longer than MAX_BYTES or too short, or the model
            has no tokenizer.
        CheckpointError: the model's tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise InvalidValueError("model", str(model), "has no tokenizer, so a text has no tokens", "add tokenizer.json")
    try:
        if (size := text.stat().st_size) > MAX_BYTES:
            raise InvalidValueError("--text", str(text), f"has {size} bytes, more than {MAX_BYTES}")
        token_ids = tokenizer.encode(text.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError("--text", str(text), f"cannot be read: {error}") from None
    if len(token_ids) < least:
        limit = f"has {len(token_ids)} tokens of this model; {least} are needed"
        raise InvalidValueError("--text", str(text), limit, "give a longer text, or ask for less of it")
    return token_ids
