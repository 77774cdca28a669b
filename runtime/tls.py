"""Certificates and keys, checked before they are used: of a wrong one gRPC says only that it cannot bind or connect."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from headwise.workers.errors import InvalidValueError

_FOREIGN_KEY = ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """
    Raises:
        InvalidValueError: a file cannot be read or used; names the flag.
    """
    chain = _key("--tls-key", key, _certificates("--tls-cert", cert), cert)
    ca = _certificates("--tls-client-ca", client_ca) if client_ca is not None else None
    return grpc.ssl_server_credentials([chain], ca, ca is not None)


def channel_credentials(ca: Path | None, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """
    Raises:
        InvalidValueError: a file cannot be read or used; names the argument.
    """
    trusted = _certificates("ca", ca) if ca is not None else None
    if cert is None or key is None:
        if cert is not None or key is not None:
            name, path = ("cert", cert) if cert is not None else ("key", key)
            raise InvalidValueError(name, str(path), "a certificate and its key go together")
        return grpc.ssl_channel_credentials(trusted)
    chain = _key("key", key, _certificates("cert", cert), cert)
    return grpc.ssl_channel_credentials(trusted, *chain)


def _certificates(name: str, path: Path) -> bytes:
    data = _read(name, path)
    try:
        _context().load_verify_locations(cadata=data.decode("ascii", "replace"))
    except (ValueError, ssl.SSLError):
        raise InvalidValueError(name, str(path), "must hold certificates (PEM)") from None
    return data


def _key(name: str, path: Path, certificate: bytes, certificate_path: Path) -> tuple[bytes, bytes]:
    """The key and its certificate."""
    data = _read(name, path)
    try:
        _context().load_cert_chain(certificate_path, path, password=lambda: "")  # or OpenSSL asks the terminal
    except (ValueError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None)
        if reason in _FOREIGN_KEY:
            raise InvalidValueError(name, str(path), f"is not the key of {certificate_path}") from None
        limit = (
            f"cannot be used with {certificate_path}: {reason}" if reason else "must hold a key (PEM, not encrypted)"
        )
        raise InvalidValueError(name, str(path), limit) from None
    return data, certificate


def _context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidValueError(name, str(path), f"cannot be read: {error.strerror}") from None
