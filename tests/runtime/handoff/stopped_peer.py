"""A prefill engine in a process of its own, to be stopped: prints the address of its service."""

from __future__ import annotations

import sys

from headwise.runtime.handoff.service import HandoffService
from tests.runtime.handoff.conftest import FakeEngine, TcpServer, about

engine = FakeEngine()
server = TcpServer(HandoffService(about(), engine.run))
print(server.address, flush=True)
sys.stdin.read()
server.close()
engine.close()
