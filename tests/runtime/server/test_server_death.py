"""A server's process that is killed: within seconds its ranks, gateway, sockets and shared memory are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("smg")
openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow

START_S = 240.0
GONE_S = 10.0
"""The promise."""
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Try for a minute to tell the driver that Ray has ended."""


def left_over() -> set[str]:
    return {f"{folder}/{name}" for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder) if "headwise" in name}


def test_with_a_gateway_a_prefill_engine_and_a_stream(smollm2: Path) -> None:
    before = left_over()
    command = [
        *(sys.executable, "-m", "headwise.runtime.cli", "serve", "--model", str(smollm2), "--name", "smollm2"),
        *("--port", "0", "--openai-port", "0", "--max-model-len", "2048", "--json", "--kv-memory", "128MiB"),
        *("--prefill", "tp=1,cpus-per-rank=0.5", "--decode", "tp=2,cpus-per-rank=0.5"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as server:
        try:
            assert server.stdout is not None
            about = json.loads(server.stdout.readline())
            processes = psutil.Process(server.pid).children(recursive=True)
            names = [process.name() for process in processes]
            assert sum("ShardActor" in name for name in names) == 3
            left = left_over() - before
            with openai.OpenAI(base_url=about["openai"], api_key="none", timeout=START_S, max_retries=0) as client:
                stream = client.completions.create(
                    model="smollm2", prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
                )
                next(iter(stream))
                server.kill()
                server.wait(GONE_S)
                deadline = time.monotonic() + GONE_S
                while (alive := _alive(processes)) or left & left_over():
                    assert time.monotonic() < deadline, (alive, left & left_over())
                    threading.Event().wait(0.05)
                stream.close()
        finally:
            server.kill()


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE and process.name() not in RAYS_OWN:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found
