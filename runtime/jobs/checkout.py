"""The Headwise of a checkout, as folders that can be sent to the nodes of a cluster."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from headwise.workers.errors import HeadwiseError, InvalidValueError

BUILD_S = 300.0
_NEEDED = ("pyproject.toml", "README.md", "LICENSE", "proto", "workers", "cluster", "runtime")
_FLAG = "--checkout"


def packages_of(checkout: Path, into: Path) -> tuple[Path, ...]:
    """Builds a wheel and unpacks it.

    Args:
        into: an empty folder.

    Returns:
        The folders in the wheel: the package, and what is known about it.

    Raises:
        InvalidValueError: it is no checkout, or the package ``build`` is not installed.
        HeadwiseError: no wheel can be built of it.
    """
    if missing := [name for name in _NEEDED if not (checkout / name).exists()]:
        limit = f"is no checkout of Headwise: it has no {missing[0]}"
        raise InvalidValueError(_FLAG, str(checkout.absolute()), limit)
    if importlib.util.find_spec("build") is None:
        limit = "needs the package build, which is not installed"
        raise InvalidValueError(_FLAG, str(checkout.absolute()), limit, "run: pip install build setuptools")
    source = into / "source"
    try:
        _copy(checkout, source)
    except shutil.Error as error:
        raise HeadwiseError(f"{_FLAG}={checkout.absolute()}: cannot be copied: {error.args[0][0][2]}") from error
    except OSError as error:
        raise HeadwiseError(f"{_FLAG}={checkout.absolute()}: cannot be copied: {error}") from error
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(into), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
    except subprocess.TimeoutExpired:
        raise HeadwiseError(f"{_FLAG}={checkout.absolute()}: no wheel was built within {BUILD_S:g} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise HeadwiseError(f"{_FLAG}={checkout.absolute()}: no wheel can be built: {' '.join(said)}")
    [wheel] = into.glob("*.whl")
    unpacked = into / "packages"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(unpacked)
    return tuple(sorted(unpacked.iterdir()))


def _copy(checkout: Path, source: Path) -> None:
    """A copy, for setuptools takes along what an earlier build has left in the checkout. Editors leave links in it that
    lead nowhere."""
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in _NEEDED:
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, source / name, ignore=ignore, ignore_dangling_symlinks=True)
        else:
            shutil.copy(checkout / name, source / name)
