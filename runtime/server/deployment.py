"""DeploymentService: what whoever runs a server can see of it and have done to it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from headwise.runtime.deployment.control import Control, ReplicaStatus
from headwise.runtime.server.errors import abort
from headwise.runtime.server.sessions import Context, Sessions
from headwise.v1 import deployment_pb2 as pb
from headwise.v1.deployment_pb2_grpc import DeploymentServiceServicer

_logger = logging.getLogger(__name__)


class DeploymentService(DeploymentServiceServicer):
    """The service of proto/headwise/v1/deployment.proto. Who is no admin is kept out before it is called; see
    :func:`~headwise.runtime.server.auth.check_method`."""

    def __init__(self, sessions: Sessions, control: Control) -> None:
        self._sessions, self._control = sessions, control

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        try:
            status = await asyncio.to_thread(self._control.status)
            bounds = {name: status[name] for name in ("min_replicas", "max_replicas")}
            return pb.GetStatusResponse(
                wanted=status["wanted"],
                waiting=status["waiting"],
                draining=self._sessions.draining,
                restarting=status["restarting"],
                replicas=[_replica(replica) for replica in status["replicas"]],
                routing=status["routing"],
                **{name: bound for name, bound in bounds.items() if bound is not None},
            )
        except Exception as error:
            await abort(context, error)

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        try:
            await asyncio.to_thread(self._control.scale, request.replicas)
            _logger.info("replicas=%d from now on: %s has asked for it", request.replicas, self._who(context))
            return pb.ScaleResponse()
        except Exception as error:
            await abort(context, error)

    async def Restart(self, request: pb.RestartRequest, context: Context) -> pb.RestartResponse:
        try:
            message = await asyncio.to_thread(self._control.restart)
            _logger.info("rolling restart: %s; %s has asked for it", message, self._who(context))
            return pb.RestartResponse(message=message)
        except Exception as error:
            await abort(context, error)

    def _who(self, context: Context) -> str:
        return self._sessions.tenant(context).name or "an admin"


def _replica(status: ReplicaStatus) -> pb.Replica:
    given: dict[str, Any] = dict(status)
    return pb.Replica(
        **{
            **{name: value for name, value in given.items() if name != "since_s"},
            "since": status["since_s"],
            "role": pb.ReplicaRole.Value(f"REPLICA_ROLE_{status['role'].upper()}"),
            "state": pb.ReplicaState.Value(f"REPLICA_STATE_{status['state'].upper()}"),
            "shards": [pb.Shard(**place) for place in status["shards"]],
        }
    )
