"""Compiled kernels: where they are kept, who finds them, and that all are compiled before anyone waits for one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from headwise.workers.jit import kernel_cache
from headwise.workers.jit.kernel_cache import kernel, kernel_folder, kernel_sources, key_of
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[3]
DEADLINE_S = 120

NUMBA_CONFIG: Any = numba.config

SOURCES = {"a.py": b"one", "b.py": b"two"}
FACTS = {"numba": "0.68.1", "cpu": "skylake", "features": "+avx2"}


def _total(x: Any) -> float:
    total = 0.0
    for i in numba.prange(len(x)):
        total += x[i]
    return total


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where kernels of a test go, instead of where those of this process do."""
    monkeypatch.setattr(kernel_cache, "kernel_folder", lambda: tmp_path)
    monkeypatch.setattr(kernel_cache, "_warnings", [])
    return tmp_path


@pytest.mark.parametrize(
    ("sources", "facts"),
    [
        (SOURCES | {"a.py": b"onE"}, FACTS),
        (SOURCES | {"c.py": b""}, FACTS),
        ({"a.py": b"on", "b.py": b"etwo"}, FACTS),
        ({"a.py": b"two", "b.py": b"one"}, FACTS),
        (SOURCES, FACTS | {"cpu": "znver4"}),
        (SOURCES, FACTS | {"features": "+avx2,+avx512f"}),
        (SOURCES, FACTS | {"numba": "0.69.0"}),
    ],
)
def test_whatever_changes_has_another_folder(sources: dict[str, bytes], facts: dict[str, str]) -> None:
    assert key_of(sources, facts) != key_of(SOURCES, FACTS)
    assert key_of(dict(reversed(SOURCES.items())), dict(reversed(FACTS.items()))) == key_of(SOURCES, FACTS)


def test_another_cpu_or_option_in_numbas_environment_has_another_folder() -> None:
    keys = set()
    for environment in ({}, {"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_FEATURES": "+avx2"}, {"NUMBA_BOUNDSCHECK": "1"}):
        code = "from headwise.workers.jit.kernel_cache import current_key; print(current_key())"
        keys.add(run(["-c", code], **environment).stdout)
    assert len(keys) == 4


def test_sources_are_the_kernels_and_what_they_import(tmp_path: Path) -> None:
    files = {
        "kernels/sums.py": "from headwise.workers.jit.kernel_cache import kernel\n"
        "from headwise.workers.sizes import TILE",
        "sizes.py": "from headwise.workers import (\n    deeper,\n)",
        "deeper.py": "",
        "kernels/__init__.py": "from headwise.workers.kernels.sums import total",
        "kernels/emit.py": "import llvmlite.binding",
        "warm.py": "from headwise.workers import kernel_cache\ndef f():\n    from headwise.workers import shard",
        "shard.py": "from headwise.workers.kernels import sums",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert sorted(kernel_sources(tmp_path)) == [
        "deeper.py",
        "kernels/emit.py",
        "kernels/sums.py",
        "sizes.py",
        "warm.py",
    ]


def test_the_sources_of_this_package_hold_every_kernel() -> None:
    from headwise.workers import shard  # noqa: F401
    from headwise.workers.collectives import shared_memory  # noqa: F401

    workers = Path(kernel_cache.__file__).parent.parent
    sources = kernel_sources(workers)
    assert {"jit/vectors.py", "cpu/attention.py", "cpu/llama.py", "collectives/spin.py"} <= sources.keys()
    ours = [made.py_func.__code__.co_filename for made in kernel_cache._kernels]
    ours = [name for name in ours if name != __file__]
    assert ours and {Path(name).relative_to(workers).as_posix() for name in ours} <= sources.keys()


def test_a_kernel_is_kept_and_numbas_own_setting_is_not_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NUMBA_CONFIG, "CACHE_DIR", "elsewhere")
    first = kernel(_total)
    assert NUMBA_CONFIG.CACHE_DIR == "elsewhere"
    assert first(np.ones(3)) == 3
    assert len(list(folder.rglob("*.nbc"))) == 1
    again = kernel(_total)
    assert again(np.ones(3)) == 3
    assert again.stats.cache_hits and not again.stats.cache_misses
    with pytest.raises(TypeError):
        kernel(_total.__name__)  # type: ignore[arg-type]
    assert NUMBA_CONFIG.CACHE_DIR == "elsewhere"


def test_forms_of_one_function_are_kept_apart(folder: Path) -> None:
    forms: list[dict[str, Any]] = [{}, {"parallel": True}, {"fastmath": {"reassoc", "nsz"}}, {"parallel": True}]
    for count, options in enumerate(forms):
        made = kernel(_total, **options)
        assert made(np.ones(3)) == 3
        assert len(list(folder.rglob("*.nbc"))) == min(count + 1, 3)
        assert bool(made.stats.cache_hits) == (count == 3)


@pytest.mark.usefixtures("folder")
def test_it_decorates_with_and_without_options() -> None:
    @kernel
    def double(x: float) -> float:
        return 2 * x

    @kernel(fastmath=True)
    def halve(x: float) -> float:
        return x / 2

    assert double(3.0) == 6 and halve(3.0) == 1.5
    assert halve.targetoptions["fastmath"] and "fastmath" not in double.targetoptions


def test_a_signature_is_compiled_at_once_and_is_the_only_one(folder: Path) -> None:
    made = kernel(_total, signature="float64(float64[::1])")
    assert len(list(folder.rglob("*.nbc"))) == 1
    assert made(np.ones(3)) == 3
    with pytest.raises(TypeError):
        made(np.ones((3, 3)))


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_torn_file_costs_a_compile(folder: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernel(_total)(np.ones(3))
    [file] = folder.rglob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:20])
    torn, healed = kernel(_total), kernel(_total)
    assert torn(np.ones(3)) == 3 and torn.stats.cache_misses
    assert healed(np.ones(3)) == 3 and healed.stats.cache_hits
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_costs_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", full)
    assert kernel(_total)(np.ones(3)) == 3
    assert kernel(_total, parallel=True)(np.ones(3)) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert "No space left" in line and "HEADWISE_CACHE" in line


def test_without_a_folder_kernels_are_compiled_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_cache, "kernel_folder", kernel_folder.__wrapped__)
    monkeypatch.setattr(kernel_cache, "_warnings", [])
    assert kernel(_total)(np.ones(3)) == 3
    assert kernel(_total)(np.ones(4)) == 4
    assert not kernel_cache.kernels_ready()
    [line] = capsys.readouterr().err.splitlines()
    assert "File exists" in line and "HEADWISE_CACHE" in line


def test_old_folders_go_but_for_those_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [f"{age}" for age in range(kernel_cache.FOLDERS_KEPT + 4)]
    for age, name in enumerate(names):
        (tmp_path / "kernels" / name).mkdir(parents=True)
        in_use = tmp_path / "kernels" / name / "in-use"
        in_use.touch()
        os.utime(in_use, (10**9 - age, 10**9 - age))
    (tmp_path / "kernels" / "not ours").mkdir()
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "_held", [])
    with (tmp_path / "kernels" / names[-2] / "in-use").open() as other_process:
        fcntl.flock(other_process, fcntl.LOCK_SH)
        current = kernel_folder.__wrapped__()
    assert current is not None
    kept = {*names[: kernel_cache.FOLDERS_KEPT], names[-2], "not ours", current.name}
    assert {path.name for path in (tmp_path / "kernels").iterdir()} == kept


@pytest.mark.slow
def test_after_a_warm_up_serving_compiles_nothing(tmp_path: Path) -> None:
    """Two processes warm up at once; a third then serves on one thread, on two, by the reference and on two ranks."""
    model = write_checkpoint(tmp_path / "model", 8, 4, max_position_embeddings=2048, attention_bias=True)
    cache = tmp_path / "cache"
    warm = ["-m", "headwise.runtime.cli", "warmup", "--json"]
    processes = [start(warm, HEADWISE_CACHE=str(cache)) for _ in range(2)]
    outputs = [process.communicate(timeout=DEADLINE_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    [folder] = (cache / "kernels").iterdir()
    assert {json.loads(out)["folder"] for out, _ in outputs} == {str(folder)}
    assert all(err.startswith("headwise: compiling CPU kernels for") for _, err in outputs)
    assert sum("Waiting for another process" in err for _, err in outputs) == 1
    before = files_in(folder)
    code = f"""
from headwise.runtime import LLM, SamplingParams, start
from headwise.workers.jit import kernel_cache
from tests.thread_group import thread_groups

def serve(**settings):
    params = [SamplingParams(max_tokens=4, ignore_eos=True, temperature=temperature) for temperature in (0, 0, 1)]
    with LLM({str(model)!r}, quiet=True, kv_memory="32MiB", max_num_batched_tokens=2048, **settings) as llm:
        llm.generate([[5] * 1900, [6], [7, 8]], params, use_tqdm=False)

serve(executor="local", cpus_per_rank=1)
serve(executor="local", cpus_per_rank=2)
serve(executor="local", cpus_per_rank=2, attention="reference")
start.make_factory = thread_groups()
serve(tensor_parallel_size=2)
print(kernel_cache.count() > 0, kernel_cache.compiled())
"""
    done = run(["-c", code], HEADWISE_CACHE=str(cache), NUMBA_NUM_THREADS="2")
    assert (done.stdout, done.stderr) == ("True []\n", "")
    assert files_in(folder) == before


def files_in(folder: Path) -> dict[str, int]:
    """What is compiled, with the times of writing."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(arguments, **environment)
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(arguments, 0, out, err)
