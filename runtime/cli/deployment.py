"""``headwise scale``, ``restart`` and ``drain``: what whoever runs a server has done to it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.runtime.cli.options import AsJson, FlagError, option
from headwise.runtime.cli.printing import print_json
from headwise.runtime.cli.server import DEFAULT_SERVER, Server, TlsCa, TlsCert, TlsKey, Token, connected
from headwise.runtime.cli.status import TIMEOUT_S, as_dict, serving, state_of, wanted
from headwise.workers.errors import HeadwiseError, InvalidValueError

if TYPE_CHECKING:
    from headwise.runtime.client import Client
    from headwise.v1.deployment_pb2 import GetStatusResponse

LOOK_S = 0.5
Timeout = Annotated[float | None, option("seconds", "How long to wait at most; default: no limit.", min=0)]


class NotDoneError(HeadwiseError):
    """What was waited for has not come about."""


def scale(
    replicas: Annotated[str, typer.Argument(help="replicas=N, where N is how many there are to be.")],
    server: Server = DEFAULT_SERVER,
    wait: Annotated[bool, typer.Option("--wait", help="Return once so many serve, and the others have ended.")] = False,
    timeout: Timeout = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: AsJson = False,
) -> None:
    """Set how many replicas a server has.

    Those that are too many end once their requests have. Without --wait it returns at once. Takes an admin's token
    where there are tokens.
    """
    number = _number(replicas)
    with connected(server, token, tls_ca, tls_cert, tls_key, TIMEOUT_S) as client:
        client.scale(number)
        found = _wait(client, lambda now: _is_scaled(now, number), timeout) if wait else client.status()
        if as_json:
            print_json(as_dict(found))


def restart(
    server: Server = DEFAULT_SERVER,
    rolling: Annotated[
        bool, typer.Option("--rolling", help="One replica after another, so that no request fails; must be given.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return once every replica was replaced.")] = True,
    timeout: Timeout = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: AsJson = False,
) -> None:
    """Replace every replica of a server.

    By default it waits until that is done, and tells on stderr how it goes; the exit code is 1 if it is not done. Takes
    an admin's token where there are tokens.
    """
    if not rolling:
        raise FlagError("--rolling", "is missing", "give it; no other kind of restart keeps requests going")
    with connected(server, token, tls_ca, tls_cert, tls_key, TIMEOUT_S) as client:
        before = {replica.name for replica in client.status().replicas}
        print(client.restart(), file=sys.stderr)
        found = _wait(client, lambda now: not now.restarting, timeout) if wait else client.status()
        if as_json:
            print_json(as_dict(found))
        if wait and (left := _not_replaced(found, before)):
            raise NotDoneError(f"the rolling restart has ended, and {left}; the server's log says why")


def drain(
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: AsJson = False,
) -> None:
    """Have a server take no more requests, and end.

    Returns once all that run have ended; the server drains on if the wait is over before. Takes an admin's token where
    there are tokens.
    """
    with connected(server, token, tls_ca, tls_cert, tls_key) as client:
        client.drain(timeout)
        if as_json:
            print_json({"drained": True})


def _number(replicas: str) -> int:
    name, _, value = replicas.partition("=")
    if name != "replicas" or not value.isdecimal() or not 1 <= int(value) < 1 << 16:
        raise InvalidValueError("replicas", replicas, "must be written replicas=N, with N from 1")
    return int(value)


def _is_scaled(now: GetStatusResponse, replicas: int) -> bool:
    """
    Raises:
        NotDoneError: somebody else wants another number by now.
    """
    if now.wanted != replicas:
        raise NotDoneError(f"the server is to have {now.wanted} replicas by now, and not {replicas}")
    states = Counter(state_of(one) for one in wanted(now))
    return states["serving"] == replicas and states.total() - states["ended"] == replicas


def _not_replaced(now: GetStatusResponse, before: set[str]) -> str:
    """What is amiss after a rolling restart; empty if nothing is."""
    old = [one.name for one in now.replicas if one.name in before and state_of(one) != "ended"]
    if old:
        return f"{', '.join(old)} was not replaced"
    serve = serving(now)
    return f"{serve} of {now.wanted} replicas serve" if serve < now.wanted else ""


def _wait(client: Client, done: Callable[[GetStatusResponse], bool], timeout: float | None) -> GetStatusResponse:
    """The first status of which ``done`` is true. Tells on stderr whatever changes until then.

    Raises:
        NotDoneError: none was within ``timeout`` seconds.
    """
    deadline, told = None if timeout is None else time.monotonic() + timeout, ""
    while True:
        now = client.status()
        said = ", ".join(f"{one.name} {state_of(one)}" for one in now.replicas)
        if said != told:
            told = said
            print(said, file=sys.stderr, flush=True)
        if done(now):
            return now
        if deadline is not None and time.monotonic() >= deadline:
            raise NotDoneError(f"not done after {timeout:g} s: {said}; it goes on in the server")
        time.sleep(LOOK_S)
