"""The probe of cluster/manifests/service.yaml against a server with TLS and tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cluster.manifests.test_kubernetes import run_script
from tests.runtime.server.conftest import Running
from tests.runtime.server.test_service import wait_until

Serve = Callable[..., Running]


def test_the_probe_says_whether_the_server_serves(serve: Serve, tmp_path: Path, certificates: Path) -> None:
    (tmp_path / "tokens").write_text("alice 0123456789abcdef\n")
    files = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key"}
    running = serve(options={"token_file": tmp_path / "tokens", **files})

    def probe() -> tuple[int, str]:
        done = run_script("ready.py", running.address, str(certificates / "good-ca.pem"), folder=tmp_path)
        return done.returncode, done.stderr.strip().rpartition("\n")[2]  # gRPC may have warned before

    assert probe()[0] == 0
    running.server.sessions.draining = True
    wait_until(lambda: probe() == (1, "not serving"))
    running.end()
    assert probe() == (1, "no answer: UNAVAILABLE")
