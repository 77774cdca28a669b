"""OpenAI's API: the gateway ``smg`` as a child process, which starts and ends with the server."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import secrets
import socket
import ssl
import sys
import time
from contextlib import suppress
from pathlib import Path

from headwise.workers.addresses import join
from headwise.workers.errors import HeadwiseError, InvalidValueError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
_MAX_RESTART_WAIT_S = 30.0
_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the server has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the program that is named after the number of this process. The kernel ends it when this process ends, in
whatever way. It is a program of its own because a forked copy of this process has gRPC's locks and sockets, but not the
threads that they belong to, and may die of it."""

_logger = logging.getLogger(__name__)


class GatewayError(HeadwiseError):
    """The gateway did not start."""


def check_gateway() -> None:
    """
    Raises:
        InvalidValueError: the packages of the extra ``gateway`` are not installed.
    """
    for package in ("smg", "smg_grpc_proto"):
        if importlib.util.find_spec(package) is None:
            fix = "run: pip install 'headwise[gateway]'"
            raise InvalidValueError("--openai-port", package, "needs this package, which is not installed", fix)


class Gateway:
    """Runs ``smg launch`` for one engine, and starts it again if it ends by itself."""

    def __init__(
        self, host: str, port: int, engine_port: int, model_path: Path, tls: tuple[Path, Path] | None = None
    ) -> None:
        """
        Args:
            port: where the gateway serves OpenAI's API.
            engine_port: where this process serves gRPC for the gateway, on loopback and without TLS.
            tls: a certificate and its key, to serve HTTPS with; None serves HTTP.
        """
        self._host, self.port = host, port or _free_port(host)
        self._tls = _unverified() if tls is not None else None
        self._command = [
            *(sys.executable, "-P", "-m", "smg", "launch"),  # not what is called smg in the working directory
            *("--host", host, "--port", str(self.port)),
            *("--worker-urls", f"grpc://127.0.0.1:{engine_port}", "--log-level", "warn"),
            *("--model-path", str(model_path)),
            *("--prometheus-port", str(_free_port("127.0.0.1")), "--prometheus-host", "127.0.0.1"),
            # Nobody knows the key: or whoever reaches the port could have it send prompts to engines of his own.
            *("--control-plane-api-keys", f"headwise:headwise:admin:{secrets.token_urlsafe(32)}"),
            *(("--tls-cert-path", str(tls[0]), "--tls-key-path", str(tls[1])) if tls is not None else ()),
        ]
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the gateway; returns once it answers.

        Raises:
            GatewayError: the gateway ended, or did not answer within START_TIMEOUT_S.
        """
        await self._launch()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not await self._answers():
            assert self._process is not None
            if self._process.returncode is not None or time.monotonic() > deadline:
                code = self._process.returncode
                await self.stop()
                ended = f"ended with {code}" if code is not None else f"did not answer within {START_TIMEOUT_S:g} s"
                raise GatewayError(f"the gateway on {join(self._host, self.port)} {ended}")
            await asyncio.sleep(0.1)
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Ends the gateway, by force if it does not end by itself. Idempotent."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            self._supervisor = None
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()

    def kill(self) -> None:
        """Ends the gateway by force, at once. Call :meth:`stop` after it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _launch(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _WITH_PARENT, str(os.getpid()), *self._command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )

    async def _supervise(self) -> None:
        wait = 1.0
        while self._process is not None:
            started = time.monotonic()
            code = await self._process.wait()
            wait = 1.0 if time.monotonic() - started > 60 else min(_MAX_RESTART_WAIT_S, wait * 2)
            _logger.error("the gateway ended with %d; it is started again in %g s", code, wait)
            await asyncio.sleep(wait)
            try:
                await self._launch()
            except OSError as error:  # no memory or no process to be had: the one that has ended is waited for again
                _logger.error("the gateway could not be started: %s", error.strerror)

    async def _answers(self) -> bool:
        """Whether the gateway can serve the engine's model. It lists the model before it has the tokenizer."""
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            reader, writer = await asyncio.open_connection(self._host, self.port, ssl=self._tls)
            try:
                writer.write(b"GET /readiness HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return (await asyncio.wait_for(reader.read(), 5.0)).startswith(b"HTTP/1.1 200")
            finally:
                writer.close()
        return False


def _unverified() -> ssl.SSLContext:
    """TLS without a check of the name: to ask a child on this host, whatever name its certificate has."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
