"""Who a client is: tenants, and the bearer tokens and certificates that stand for them."""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from headwise.runtime.inputs.processor import check_salt
from headwise.runtime.server.errors import PermissionDeniedError, UnauthenticatedError, abort
from headwise.workers.errors import InvalidValueError

Details: TypeAlias = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_FOR_PEERS = "/headwise.v1.KvHandoffService/"
_FOR_ADMINS = "/headwise.v1.DeploymentService/"
_FOR_PEERS_TOO = ("/headwise.v1.InferenceService/SubscribeKvEvents", "/grpc.reflection.")

MIN_TOKEN_CHARACTERS = 16
"""Shorter ones can be guessed."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant: one of the parties that use a server. A token or a certificate stands for a tenant.

    Attributes:
        name: requests of different tenants share no cached blocks; empty on a server that does not tell them apart.
        admin: may see how the server is, scale, restart and drain it, read KV events and end the requests of other
            tenants.
        peer: is another engine: may have KV computed for it, and read KV events.
    """

    name: str = ""
    admin: bool = False
    peer: bool = False

    def cache_salt(self, salt: str) -> str:
        """The salt that a request gets of this tenant and of the salt that the client sent. No other tenant can have
        the same.

        Raises:
            InvalidValueError: the client's salt is too long, or not text.
        """
        check_salt(salt)
        return _digest(f"{self.name}\x1f{salt}").hex() if self.name else salt


class Tokens:
    """The tokens of a server. Only their SHA-256 is kept, and they are compared in constant time."""

    def __init__(self, tenants: dict[bytes, Tenant]) -> None:
        """
        Args:
            tenants: by the SHA-256 of their token.
        """
        self._tenants = tenants

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
        """The tenant of a call, by the call's metadata.

        Raises:
            UnauthenticatedError: there is no ``authorization: Bearer …``, or no tenant has that token.
        """
        value = next((value for key, value in metadata if key == "authorization"), "")
        scheme, _, token = (value.decode() if isinstance(value, bytes) else value).partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError('no token; send the metadata "authorization: Bearer TOKEN"')
        digest, found = _digest(token.strip()), None
        for known, tenant in self._tenants.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise UnauthenticatedError("nobody has this token")
        return found


@dataclass(frozen=True, slots=True)
class Access:
    """Which tenant a call is of.

    Attributes:
        tokens: where there are any, a call's token says it.
        by_certificate: whether else the client's certificate says it.
        admins, peers: the names of tenants that are admins, or peers, by their certificates.
        trusting: whether everybody is both where neither says it. Only for a server that no other machine reaches.
    """

    tokens: Tokens
    by_certificate: bool = False
    admins: frozenset[str] = frozenset()
    peers: frozenset[str] = frozenset()
    trusting: bool = False

    def tenant(self, context: grpc.aio.ServicerContext[Any, Any]) -> Tenant:
        """
        Raises:
            UnauthenticatedError: the call has no valid token, or its certificate names nobody.
        """
        if self.tokens:
            return self.tokens.tenant(context.invocation_metadata() or ())
        if self.by_certificate:
            name = _name(context.auth_context())
            return Tenant(name, name in self.admins, name in self.peers)
        return Tenant(admin=self.trusting, peer=self.trusting)


def check_method(tenant: Tenant, method: str) -> None:
    """Keeps clients from the services for peers and for admins, and peers, unless they are admins too, from all that is
    for clients.

    Args:
        method: an RPC's full name, such as ``/headwise.v1.KvHandoffService/Hello``.

    Raises:
        PermissionDeniedError: the tenant may not call it.
    """
    if method.startswith(_FOR_PEERS):
        if not tenant.peer:
            raise PermissionDeniedError("only a peer, another engine, may have KV handed over")
    elif method.startswith(_FOR_ADMINS):
        if not tenant.admin:
            raise PermissionDeniedError("only an admin may see how the server is, scale and restart it")
    elif tenant.peer and not tenant.admin and not method.startswith(_FOR_PEERS_TOO):
        raise PermissionDeniedError("a peer hands over KV and reads KV events; for this, come as a tenant")


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Turns away calls without a valid token, before their message is read. Health needs no token."""

    def __init__(self, tokens: Tokens, on_refusal: Callable[[BaseException, str], None]) -> None:
        """Args: ``on_refusal``: gets the error and the peer of each call that is turned away."""
        self._tokens, self._on_refusal = tokens, on_refusal

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler | None]], handler_call_details: Details
    ) -> Handler | None:
        if handler_call_details.method.startswith("/grpc.health.v1.Health/"):
            return await continuation(handler_call_details)
        try:
            self._tokens.tenant(handler_call_details.invocation_metadata or ())
        except UnauthenticatedError as error:
            return grpc.stream_stream_rpc_method_handler(partial(self._turn_away, error))
        return await continuation(handler_call_details)

    async def _turn_away(self, error: UnauthenticatedError, messages: object, context: Any) -> None:
        self._on_refusal(error, context.peer())
        await abort(context, error)


def read_tokens(path: Path | None) -> Tokens:
    """Reads a file with a line for each token: ``TENANT TOKEN``, ``TENANT TOKEN admin`` or ``TENANT TOKEN peer``. A
    word that starts with # starts a comment; a token may hold one.

    Raises:
        InvalidValueError: the file cannot be read, or a line has another form; names the line, never the token.
    """
    if path is None:
        return Tokens({})
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError("--token-file", str(path), f"cannot be read: {error}") from None
    tenants: dict[bytes, Tenant] = {}
    for number, line in enumerate(lines, start=1):
        fields = list(takewhile(lambda word: not word.startswith("#"), line.split()))
        if not fields:
            continue
        if len(fields) not in (2, 3) or fields[2:] not in ([], ["admin"], ["peer"]):
            limit = 'must be "TENANT TOKEN", "TENANT TOKEN admin" or "TENANT TOKEN peer"'
            raise InvalidValueError("--token-file", f"{path}:{number}", limit)
        if len(fields[1]) < MIN_TOKEN_CHARACTERS:
            raise InvalidValueError(
                "--token-file",
                f"{path}:{number}",
                f"a token has at least {MIN_TOKEN_CHARACTERS} characters",
                'make one with: python -c "import secrets; print(secrets.token_urlsafe())"',
            )
        if (digest := _digest(fields[1])) in tenants:
            raise InvalidValueError("--token-file", f"{path}:{number}", "has the token of an earlier line")
        tenants[digest] = Tenant(fields[0], "admin" in fields[2:], "peer" in fields[2:])
    if not tenants:
        raise InvalidValueError("--token-file", str(path), "holds no token")
    return Tokens(tenants)


def _name(certificate: Mapping[str, Iterable[bytes]]) -> str:
    """The name in a client's certificate: the common name, or else the first alternative name.

    Raises:
        UnauthenticatedError: there is none, or it is not printable. No other name takes its place then: whoever signed
            the certificate may have looked at that one alone.
    """
    common = next(iter(certificate.get("x509_common_name", ())), b"")
    value = common or next(iter(certificate.get("x509_subject_alternative_name", ())), b"")
    name = value.decode(errors="replace")
    if not name:
        raise UnauthenticatedError("the certificate names nobody: it has no common name and no alternative name")
    if not name.isprintable() or _is_cut(certificate, None if common else value):
        raise UnauthenticatedError("the name in the certificate is not printable")
    return name


def _is_cut(certificate: Mapping[str, Iterable[bytes]], alternative: bytes | None) -> bool:
    """Whether a name holds a NUL: gRPC for Python tells only what comes before it, which may be the name of another.

    Args:
        alternative: the alternative name that was told; None: the common name was.
    """
    # https://www.rfc-editor.org/rfc/rfc4514#section-2.4: the subject as text, where only a NUL is written so.
    if any(re.search(rb"(?<!\\)(?:\\\\)*\\00", subject) for subject in certificate.get("x509_subject", ())):
        return True
    if alternative is None:
        return False
    # An e-mail address, a host or a URI (RFC 5280, section 4.2.1.6): tag, length, and then more than was told.
    longer = rb"[\x81\x82\x86](?:[\x00-\x7f]|\x81.|\x82..)" + re.escape(alternative) + rb"\x00"
    chains = (pem.decode() for pem in certificate.get("x509_pem_cert", ()))
    return any(re.search(longer, ssl.PEM_cert_to_DER_cert(pem), re.DOTALL) for pem in chains)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
