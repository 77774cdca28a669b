"""Fixtures for every floor: checkpoints, engines, and the check that a test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from headwise.runtime import LLM, start
from headwise.runtime.models import resolve
from tests.checkpoints import SHAPES, write_checkpoint
from tests.effort import FEW
from tests.thread_group import thread_groups

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's job in the background, whose programs, those under test too, would hear of no Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(FEW, max_examples=20)  # of a test that asks for no number
torch.set_num_threads(1)  # the tests' tensors are tiny: a second thread would only spin beside those of the engine

DEADLINE_S = 10.0
_OURS = ("headwise-shard", "headwise-engine", "headwise-front", "headwise-hear", "headwise-replicas")

MakeLLM = Callable[..., LLM]


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: a collection need not look through it, and takes a tenth of the time


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or Triton, at exit, reports what nobody collects as leaks


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the directory of a small checkpoint by shape and config changes; each is written once."""
    made: dict[str, Path] = {}

    def make(shape: str = "gqa", **changes: Any) -> Path:
        key = f"{shape}-{sorted(changes.items())}"
        if key not in made:
            heads, kv_heads = SHAPES[shape]
            made[key] = write_checkpoint(tmp_path_factory.mktemp(shape), heads, kv_heads, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted once for all runs: in the cache where ``make demo`` looks for it too."""
    return resolve("smollm2")


def own_addresses() -> list[str]:
    """By which other hosts reach this one, of IPv4."""
    found = [one.address for some in psutil.net_if_addrs().values() for one in some if one.family is socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, and from each a certificate for 127.0.0.1 and this host's own address, if it has one: good.pem,
    good.key and other.pem, other.key."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30, cwd=folder)

    names = ["IP:127.0.0.1", *(f"IP:{address}" for address in own_addresses())]
    (folder / "ext").write_text(f"subjectAltName={','.join(names)}\n")
    for name in ("good", "other"):
        subject = f"/CN={name}"
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"{subject}-ca",
                "-keyout", f"{name}-ca.key", "-out", f"{name}-ca.pem")  # fmt: skip
        openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr"
        )
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{name}-ca.pem", "-CAkey", f"{name}-ca.key",
                "-CAcreateserial", "-days", "2", "-extfile", "ext", "-out", f"{name}.pem")  # fmt: skip
    return folder


@pytest.fixture
def thread_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLLM]:
    """Makes LLMs whose ranks are threads of this process, and closes them."""
    monkeypatch.setattr(start, "make_factory", thread_groups())
    made: list[LLM] = []

    def make(model: Path, **settings: Any) -> LLM:
        made.append(LLM(model, **{"quiet": True, "kv_memory": "64MiB"} | settings))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which shared memory, socket folders or threads of ours are there that were not before."""
    before, threads = _leftovers(), set(threading.enumerate())
    yield
    assert _leftovers() <= before
    for thread in set(threading.enumerate()) - threads:
        if thread.name in _OURS:  # others come with what they are first asked for
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"{thread.name} goes on"


def _leftovers() -> set[str]:
    found = set()
    for folder in ("/dev/shm", "/tmp", os.environ.get("TMPDIR", "/tmp")):
        if os.path.isdir(folder):
            found |= {f"{folder}/{name}" for name in os.listdir(folder) if name.startswith(("headwise", "hw-"))}
    return found
