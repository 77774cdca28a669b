"""``headwise status``: how a server and each of its replicas are."""

from __future__ import annotations

import sys
from time import sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.runtime.cli.options import AsJson, FlagError, option
from headwise.runtime.cli.printing import print_json
from headwise.runtime.cli.server import DEFAULT_SERVER, Server, TlsCa, TlsCert, TlsKey, Token, connected

if TYPE_CHECKING:
    from rich.table import Table

    from headwise.runtime.client import Client
    from headwise.v1.deployment_pb2 import GetStatusResponse, Replica

TIMEOUT_S = 30.0
"""For one call."""
_STYLES = {"serving": "green", "starting": "yellow", "draining": "yellow", "rebuilding": "bold red", "ended": "dim"}


def status(
    server: Server = DEFAULT_SERVER,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, option("seconds", "Between two looks of --watch.", min=0.1)] = 2.0,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: AsJson = False,
) -> None:
    """Show how a server and its replicas are.

    Replicas, shards, epochs, use of KV memory, queues and hits of the prefix cache: a table on a terminal, a line for
    each replica on a pipe, an object with --json. Takes an admin's token where there are tokens.
    """
    if watch and as_json and is_terminal():
        raise FlagError("--json", "does not go with --watch on a terminal", "leave one of them out")
    with connected(server, token, tls_ca, tls_cert, tls_key, TIMEOUT_S) as client:
        if not watch:
            _show(client.status(), as_json)
        elif is_terminal():
            _redraw(client, interval)
        else:
            while True:
                _show(client.status(), as_json)
                sys.stdout.flush()
                sleep(interval)


def is_terminal() -> bool:
    return sys.stdout.isatty()


def as_dict(found: GetStatusResponse) -> dict[str, Any]:
    """A status with the names of proto/headwise/v1/deployment.proto; states and roles in lower case."""
    replicas = [
        {field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields}
        | {
            "role": role_of(one),
            "state": state_of(one),
            "shards": [{"rank": shard.rank, "node": shard.node, "pid": shard.pid} for shard in one.shards],
        }
        for one in found.replicas
    ]
    return {
        "wanted": found.wanted,
        "min_replicas": found.min_replicas if found.HasField("min_replicas") else None,
        "max_replicas": found.max_replicas if found.HasField("max_replicas") else None,
        "waiting": found.waiting,
        "draining": found.draining,
        "restarting": found.restarting,
        "replicas": replicas,
        "routing": dict(found.routing),
    }


def state_of(replica: Replica) -> str:
    from headwise.v1.deployment_pb2 import ReplicaState

    return str(ReplicaState.Name(replica.state)).removeprefix("REPLICA_STATE_").lower()


def wanted(found: GetStatusResponse) -> list[Replica]:
    """The replicas that its ``wanted`` is about: all but those that only compute prompts for others."""
    return [one for one in found.replicas if role_of(one) != "prefill"]


def serving(found: GetStatusResponse) -> int:
    """How many of them serve."""
    return sum(state_of(one) == "serving" for one in wanted(found))


def role_of(replica: Replica) -> str:
    from headwise.v1.deployment_pb2 import ReplicaRole

    return str(ReplicaRole.Name(replica.role)).removeprefix("REPLICA_ROLE_").lower()


def _show(found: GetStatusResponse, as_json: bool) -> None:
    if as_json:
        print_json(as_dict(found))
    elif is_terminal():
        from rich.console import Console

        Console().print(_table(found))
    else:
        print("\n".join(_lines(found)))


def _redraw(client: Client, interval: float) -> None:
    from rich.live import Live

    with Live(_table(client.status()), auto_refresh=False) as live:
        while True:
            sleep(interval)
            live.update(_table(client.status()), refresh=True)


def _lines(found: GetStatusResponse) -> list[str]:
    """A line for the deployment, one for each replica, and one for each that has a problem."""
    lines = [_summary(found)]
    for one in found.replicas:
        cells = " ".join(f"{name}={value}" for name, value in _cells(one).items() if name != "replica")
        lines.append(f"{one.name}: {cells}")
        if one.problem:
            lines.append(f"{one.name}: problem: {one.problem}")
    return lines


def _table(found: GetStatusResponse) -> Table:
    """What fits 80 columns; problems are under it."""
    from rich.table import Table
    from rich.text import Text

    problems = [f"{one.name}: {one.problem}" for one in found.replicas if one.problem]
    said = "\n".join([_summary(found), *problems])
    # As Text: to Rich, brackets in a problem would be markup.
    made = Table(caption=Text(said), caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("replica", "state", "shards", "epoch", "requests", "queued", "kv", "hits"):
        made.add_column(name, overflow="fold")
    for one in found.replicas:
        cells, state = _cells(one), state_of(one)
        made.add_row(
            cells["replica"],
            Text(f"{state} {cells['for']}", style=_STYLES.get(state, "")),
            cells["shards"].replace(",", " "),
            f"…{cells['epoch'][-6:]}",  # the time in ns: the last digits tell one from another
            f"{one.running} + {one.waiting}",
            *(cells[name] for name in ("queued", "kv", "hits")),
        )
    return made


def _summary(found: GetStatusResponse) -> str:
    bounds = f" ({found.min_replicas} to {found.max_replicas})" if found.HasField("max_replicas") else ""
    said = f"{serving(found)} of {found.wanted}{bounds} replicas serve, {found.waiting} requests wait for one"
    return f"{said}{', rolling restart' * found.restarting}{', draining' * found.draining}"


def _cells(one: Replica) -> dict[str, str]:
    """What is shown of a replica, by column."""
    role = role_of(one)
    return {
        "replica": one.name if role == "both" else f"{one.name} ({role})",
        "state": state_of(one),
        "for": _duration(one.since),
        "node": one.node,
        "shards": ",".join(_places(one)) or "-",
        "epoch": str(one.epoch),
        "recoveries": str(one.recoveries),
        "running": str(one.running),
        "waiting": str(one.waiting),
        "queued": str(one.queued_tokens),
        "kv": _share(one.kv_blocks - one.kv_free_blocks, one.kv_blocks),
        "hits": _share(one.hit_tokens, one.queried_tokens),
        "generated": str(one.generated_tokens),
    }


def _places(one: Replica) -> list[str]:
    """Nodes with how many ranks each has."""
    nodes = [shard.node for shard in one.shards]
    return [f"{nodes.count(node)}x{node}" for node in dict.fromkeys(nodes)]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"
