"""The options of ``headwise serve`` by which prompts are computed by one engine and continued by another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from headwise.runtime.cli.options import FlagError, option, refuse_flags
from headwise.runtime.deployment.options import MAX_REPLICAS

Role = Annotated[
    str | None,
    option("role", "prefill: compute prompts for decode servers; decode: have them computed by --prefill."),
]
Prefill = Annotated[
    str | None,
    option(
        "servers|settings",
        "Who computes prompts: servers with --role prefill, host:port[,host:port]; or, of an engine that this command "
        'starts beside this one, in what it differs: tp=1[,kv-memory=1GiB]; or so many replicas: "2x tp=1".',
    ),
]
Decode = Annotated[
    str | None, option("settings", 'In what the engine that generates differs: tp=2; or so many replicas: "2x tp=2".')
]
HandoffMinTokens = Annotated[
    int | None,
    option("n", "Prompts with fewer tokens to compute are computed here; default: what is faster.", min=0),
]
OnHandoffFailure = Annotated[
    str, option("what", "recompute: compute a prompt here if its handoff fails; fail: end the request.")
]
HandoffLease = Annotated[
    float | None,
    option(
        "seconds",
        "Time after which either side gives a prompt up if it does not hear of the other; default: 30.",
        min=0.1,
        max=120,
    ),
]
HandoffHost = Annotated[str, option("address", "Where ranks of a decode server listen for keys and values.")]
HandoffCa = Annotated[
    Path | None, option("file", "Who signed the certificates of the other side (PEM); default: clear text.")
]
HandoffTokenFile = Annotated[
    Path | None, option("file", "Holds the token that this decode server shows to prefill servers.")
]
HandoffSharedMemory = Annotated[
    bool, typer.Option(help="Ranks on one host hand over keys and values in shared memory.")
]

_SHORT = {"tp": "tensor_parallel_size"}
_FOR_DECODE = ("handoff_min_tokens", "on_handoff_failure", "handoff_host", "handoff_token_file")
_FOR_SERVERS = ("handoff_host", "handoff_ca", "handoff_token_file")


class Pools(NamedTuple):
    """How many replicas compute prompts, and how many generate."""

    prefill: int
    decode: int


def pools(prefill: str | None, decode: str | None) -> Pools | None:
    """What ``--prefill "2x tp=1" --decode "4x tp=2"`` asks for; a side that names no number has one replica. None: no
    replicas are asked for.

    Raises:
        FlagError: a number is 0, or decode replicas have nobody to compute prompts.
    """
    counts = [_counted("--prefill", prefill or "")[0], _counted("--decode", decode or "")[0]]
    if counts == [None, None]:
        return None
    if prefill is None or _names_servers(prefill):
        raise FlagError("--decode", "has a number, and --prefill asks for no replicas", 'give --prefill "1x tp=1", too')
    return Pools(*(1 if count is None else count for count in counts))


def refuse_idle_flags(ctx: typer.Context, role: str | None, prefill: str | None) -> None:
    """
    Raises:
        FlagError: a flag of handoffs is given that would change nothing.
    """
    if role is None and prefill is None:
        idle = {*_FOR_DECODE, *_FOR_SERVERS, "handoff_shared_memory"}
        refuse_flags(ctx, idle, "is for a server that hands over prompts", "give --prefill or --role with it")
    elif prefill is not None and not _names_servers(prefill):
        # Replicas may be on several hosts.
        idle = set(_FOR_SERVERS) - ({"handoff_ca"} if _counted("--prefill", prefill)[0] is not None else set())
        refuse_flags(ctx, idle, "is for servers, and this command starts both sides", "leave it out")
    elif role == "prefill":
        refuse_flags(ctx, _FOR_DECODE, "is for a decode server", "leave it out")


def handoff_fields(
    role: str | None,
    prefill: str | None,
    decode: str | None,
    options: dict[str, Any],
    token_file: Path | None,
) -> dict[str, Any]:
    """The fields of EngineConfig that the flags ask for.

    Args:
        options: of :class:`~headwise.runtime.config.HandoffConfig`, but for role, peers and token.

    Raises:
        FlagError, InvalidValueError: a flag is wrong, or does not go with the others.
    """
    from headwise.runtime.config import handoff_config
    from headwise.runtime.sides import check_side

    given = {name: value for name, value in options.items() if value is not None}
    if role not in (None, "prefill", "decode"):
        raise FlagError("--role", "must be prefill or decode", "without it, a server does both itself")
    if prefill is not None and not _names_servers(prefill):
        if role is not None:
            raise FlagError(
                "--role", "this command starts both sides", "leave --role out, or name servers in --prefill"
            )
        texts = {"prefill": prefill, "decode": decode or ""}
        sides = {name: _settings(f"--{name}", _counted(f"--{name}", text)[1]) for name, text in texts.items()}
        for name, settings in sides.items():
            check_side(f"--{name}", settings)
        return {**sides["decode"], "prefill": sides["prefill"], "handoff": handoff_config(role="decode", **given)}
    if decode is not None:
        raise FlagError("--decode", "is for a command that starts both sides", "give --prefill tp=1 with it")
    if role is None and prefill is None:
        return {}
    if (role or "decode") == "decode":
        if not prefill:
            raise FlagError("--role", "a decode server needs prefill servers", "name them: --prefill host:port")
        return {"handoff": handoff_config(role="decode", peers=_peers(prefill), token=_token(token_file), **given)}
    if prefill is not None:
        raise FlagError("--prefill", "a prefill server has its prompts from others", "leave --prefill out")
    return {"handoff": handoff_config(role=role, **given)}


def _names_servers(prefill: str) -> bool:
    return "=" not in prefill and _counted("--prefill", prefill)[0] is None


def _counted(flag: str, text: str) -> tuple[int | None, str]:
    """``2x tp=1`` as a number of replicas and the settings of each; None: no number is given.

    Raises:
        FlagError: the number is 0, or too large.
    """
    match = re.fullmatch(r"\s*([0-9]{1,4})x(?:[\s,]+(.*))?", text)
    if match is None:
        return None, text
    if not 1 <= (count := int(match[1])) <= MAX_REPLICAS:
        raise FlagError(flag, f"must be from 1 to {MAX_REPLICAS} replicas, not {count}", "give another number before x")
    return count, match[2] or ""


def _peers(text: str) -> tuple[str, ...]:
    peers = tuple(peer.strip() for peer in text.split(","))
    for peer in peers:
        host, _, port = peer.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise FlagError("--prefill", "must be host:port[,host:port] or settings such as tp=1", "name the port, too")
        if not re.fullmatch(r"\[[0-9A-Fa-f:.]+(%\w+)?\]|[\w.-]+", host):
            raise FlagError("--prefill", "must name hosts", "leave out https://; put an IPv6 address in brackets")
        if peers.count(peer) > 1:
            raise FlagError("--prefill", "names a server twice", "leave it out once")
    return peers


def _settings(flag: str, text: str) -> dict[str, Any]:
    """``tp=1,kv-memory=1GiB`` as settings of an engine."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise FlagError(flag, "must be settings such as tp=1,kv-memory=1GiB", "put = between name and value")
        if re.match("[0-9]+x", name):
            raise FlagError(
                flag, f"has no setting {name}", f'for several replicas put a space after x: {flag} "2x tp=1"'
            )
        setting = _SHORT.get(name, name.replace("-", "_"))
        if setting in found:
            raise FlagError(flag, f"has {setting} twice", "leave it out once")
        found[setting] = _value(value)
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError("--handoff-token-file", "cannot be read", str(error)) from None
    if not re.fullmatch("[!-~]+", token):
        raise FlagError("--handoff-token-file", "must hold one token", "in ASCII, without spaces, and nothing else")
    return token
