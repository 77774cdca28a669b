"""DeployedModel: a model in an asyncio program, on several replicas."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from headwise.cluster.replica import ReplicaFactory
from headwise.runtime.async_model import AsyncModel
from headwise.runtime.config import EngineConfig
from headwise.runtime.deployment.control import Role, Status
from headwise.runtime.deployment.deployment import Deployment
from headwise.runtime.deployment.front import Front
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.kv_settings import heads_notes, with_streaming_heads
from headwise.runtime.prepare import PreparedModel, prepare
from headwise.runtime.routing.router import Router
from headwise.runtime.sides import pool_configs
from headwise.workers.errors import HeadwiseError, InvalidValueError

T = TypeVar("T")
_logger = logging.getLogger(__name__)

ANSWER_S = 5.0
"""For the front to answer."""


class DeployedModel(AsyncModel[Deployment]):
    """A model that replicas compute; and the :class:`~headwise.runtime.deployment.control.Control` of these."""

    def __init__(
        self,
        config: EngineConfig,
        options: ReplicaOptions,
        factory: ReplicaFactory,
        *,
        max_queued_requests: int = 1024,
        router: Router | None = None,
    ) -> None:
        """Starts the replicas. That takes seconds and blocks the event loop: do it before anything is served.

        Args:
            config: of each replica.
            factory: starts them; closed with this.
            max_queued_requests: most requests that may wait for their first token, at all replicas together; each of
                ``n`` samples counts as one. A tenant may have half of what other tenants leave free. Default: 1024.
            router: as of :class:`Deployment`. Default: one that weighs what replicas have cached against their queues.

        Raises:
            InvalidValueError: the config is none for several engines.
            HeadwiseError: as :class:`~headwise.runtime.llm.LLM`, if no replica could be started.
        """
        try:
            configs = _configs(config, options)
            prepared = prepare(configs.get("decode", config))
            for note in heads_notes(config, prepared.path):
                _logger.warning(note)
            # Replicas on other hosts do not have the file.
            configs = {role: with_streaming_heads(one) for role, one in configs.items()}
        except BaseException:
            factory.close()
            raise
        # Until it is known what the replicas compute with, nobody asks for a namespace of the prefix cache.
        super().__init__(config, prepared.path, "", prepared.inputs(config.seed, None), max_queued_requests)
        self._options, self._max_model_len = options, prepared.max_model_len
        deployment = Deployment(options, config.block_size, config.max_num_seqs, router=router)

        def settings(role: Role, place: int) -> dict[str, Any]:
            return _settings(configs[role], role, place)

        self._front = Front(
            deployment, factory, settings, self._fail, Alike(prepared).check, prepared.config.vocab_size
        )
        try:
            self.dtype = self._front.await_start()["dtype"]
        except BaseException:
            self.shutdown()
            raise
        self._blocks = 0
        if config.enable_prefix_caching:
            self.inputs.identity = prepared.identity(self.dtype)
        self._front.on_change = self._take_over
        self._front.run(lambda _: self._take_over())

    @property
    def _loop(self) -> Front:
        return self._front

    @property
    def num_blocks(self) -> int:
        """How many KV blocks the replicas that serve have together."""
        return self._blocks

    @property
    def max_running(self) -> int:
        return self.config.max_num_seqs * self._options.most

    @property
    def is_handing_over(self) -> bool:
        return False  # between replicas alone

    @property
    def pause_reason(self) -> str | None:
        return None if self._front.deployment.abouts else "no replica serves, and others are started"

    @property
    def hang(self) -> str | None:
        return None

    def status(self) -> Status:
        """As of the protocol."""
        return self._ask(lambda deployment: deployment.status())

    def scale(self, replicas: int) -> None:
        """As of the protocol."""
        self._ask(lambda deployment: deployment.scale(replicas))

    def restart(self) -> str:
        """As of the protocol."""
        self._ask(lambda deployment: deployment.restart())
        return "each replica is replaced by another, one after another"

    def _ask(self, function: Callable[[Deployment], T]) -> T:
        """
        Raises:
            FrontBusyError: there is no answer in time; what ``function`` would do is not done later either, unless it
                has begun.
        """
        answer = self._front.submit(function)
        try:
            return answer.result(ANSWER_S)
        except TimeoutError:
            done = "nothing was done" if answer.cancel() else "it may still be done"
            raise FrontBusyError(f"the front has not answered within {ANSWER_S:g} s; {done}, try again") from None

    def shutdown(self) -> None:
        try:
            super().shutdown()
        finally:
            self.inputs.close()

    def handoff_service(self) -> None:
        return None

    def _take_over(self) -> None:
        """Called on the front's thread when replicas have come or gone."""
        if abouts := self._front.deployment.abouts:
            self._blocks = sum(about["num_blocks"] for about in abouts)
            self.inputs.max_model_len = min(self._max_model_len, *map(_most_tokens, abouts))


class FrontBusyError(HeadwiseError):
    """The front of a deployment has not answered in time."""


class UnlikeError(HeadwiseError):
    """A replica computes something else than the others."""


class Alike:
    """All replicas compute the same: with the weights that the front has read of, and with one dtype."""

    def __init__(self, prepared: PreparedModel) -> None:
        self._fingerprint = prepared.identity("").fingerprint
        self._dtype = ""
        self._lock = threading.Lock()

    def check(self, about: dict[str, Any]) -> None:
        """For any thread.

        Args:
            about: what a replica says of itself.

        Raises:
            UnlikeError: it is unlike the others.
        """
        with self._lock:
            self._dtype = self._dtype or about["dtype"]
        # A replica without a prefix cache has no fingerprint.
        for name, is_now, was in (
            ("weights", about["fingerprint"] or self._fingerprint, self._fingerprint),
            ("dtype", about["dtype"], self._dtype),
        ):
            if is_now != was:
                raise UnlikeError(
                    f"the {name} of a new replica ({is_now:.12}) are not those of the deployment ({was:.12}), so that "
                    "requests could not go on there; start a server of its own for it"
                )


def _most_tokens(about: dict[str, Any]) -> int:
    """Of a request that a replica can compute; of its prompt, where outputs may be endless."""
    if about["endless"]:
        return int(about["max_model_len"])
    return int(about["num_blocks"] * about["block_size"])


def make_replicas(config: EngineConfig, options: ReplicaOptions) -> ReplicaFactory:
    """Starts replicas on a Ray cluster, which is joined. Call it on a thread that lives as long as they.

    Raises:
        GroupStartError: no Ray answers.
        InvalidValueError: the config is for an engine without Ray.
    """
    if config.executor != "ray":
        limit = "each replica is a Ray actor, and so are its ranks"
        raise InvalidValueError("--executor", config.executor, limit, "leave out --executor, or have one engine")
    # Here and not above: one engine works where Ray is not installed.
    from headwise.cluster.ray_replicas import RayReplicas
    from headwise.runtime.deployment.host import ReplicaHost

    most = options.most if options.autoscale else options.replicas
    ranks = [config.tensor_parallel_size] * most
    if options.prefill:
        ranks += [_configs(config, options)["prefill"].tensor_parallel_size] * options.prefill
    return RayReplicas(ReplicaHost, ranks, config.address)


def _configs(config: EngineConfig, options: ReplicaOptions) -> dict[Role, EngineConfig]:
    """The settings of replicas by their role.

    Raises:
        InvalidValueError: the config is none for several engines.
    """
    if config.handoff is not None and config.handoff.role == "prefill":
        limit = "an engine that computes prompts for others is asked for them, and no front is between"
        raise InvalidValueError("--role", "prefill", limit, "leave out --replicas, and start several servers")
    if options.prefill:
        prefill, decode = pool_configs(config)
        return {"prefill": prefill, "decode": decode}
    if config.prefill is not None:
        limit = "needs the number of replicas that compute prompts, where there are several engines"
        fix = 'give both sides one, and leave out --replicas: --prefill "2x tp=1" --decode "4x tp=2"'
        raise InvalidValueError("--prefill", config.prefill, limit, fix)
    return {"both": config}


def _settings(config: EngineConfig, role: Role, place: int) -> dict[str, Any]:
    """Of the replica in a place."""
    settings = config.model_dump()
    if config.disk_kv_path is not None:  # a folder of files is one engine's
        name = "replica" if role == "both" else role
        settings["disk_kv_path"] = f"{config.disk_kv_path}/{name}-{place}"
    return settings
