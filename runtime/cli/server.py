"""The options of commands that ask a running server, and the connection to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from headwise.runtime.cli.options import option
from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from headwise.runtime.client import Client

DEFAULT_SERVER = "127.0.0.1:50051"

Server = Annotated[str, option("host:port", "The server.")]
Token = Annotated[str | None, option("text", "Your token for the server.", envvar="HEADWISE_TOKEN")]
TlsCa = Annotated[
    Path | None,
    option("file", "Connect by TLS; the certificate (PEM) that signed the server's.", exists=True, dir_okay=False),
]
TlsCert = Annotated[
    Path | None,
    option("file", "Your certificate (PEM), for servers that ask for one.", exists=True, dir_okay=False),
]
TlsKey = Annotated[Path | None, option("file", "The key of that certificate (PEM).", exists=True, dir_okay=False)]

CONNECTION_PARAMETERS = ("token", "tls_ca", "tls_cert", "tls_key")
"""Names of the commands' parameters that are for a server."""


@contextmanager
def connected(
    server: str,
    token: str | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    timeout: float | None = None,
) -> Iterator[Client]:
    """A client of a server, for the length of the block. What the server refuses as wrong ends the program with 2, as
    a wrong flag does.

    Args:
        timeout: seconds for each call; None: no limit.

    Raises:
        InvalidValueError: the token would go to another machine in clear text, or a file cannot be used.
        ServerError: a call failed.
    """
    from grpc import StatusCode

    from headwise.runtime.client import Client, ServerError

    check_token(server, token, tls_ca, tls_cert, tls_key)
    try:
        with Client(server, token=token, timeout=timeout, ca=tls_ca, cert=tls_cert, key=tls_key) as client:
            yield client
    except ServerError as error:
        if error.code is not StatusCode.INVALID_ARGUMENT:
            raise
        print(f"headwise: {error}", file=sys.stderr)
        sys.exit(2)


def check_token(server: str, token: str | None, *tls: Path | None) -> None:
    """
    Raises:
        InvalidValueError: the token would go to another machine in clear text.
    """
    from headwise.runtime.addresses import leads_to_loopback

    if token and not any(tls) and not leads_to_loopback(server):
        limit = f"would go in clear text to {server}, which is not loopback"
        raise InvalidValueError("--token", "...", limit, "use TLS: give --tls-ca")
