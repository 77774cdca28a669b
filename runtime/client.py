"""The gRPC client of a Headwise server: :class:`Client`, and :class:`AsyncClient` for asyncio programs."""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
from google.rpc import error_details_pb2, status_pb2

from headwise.runtime.addresses import leads_to_loopback
from headwise.runtime.completion import Completion, Increment, Sample, take
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.server.convert import messages_message, sampling_message
from headwise.runtime.tls import channel_credentials
from headwise.v1 import deployment_pb2
from headwise.v1 import inference_pb2 as pb
from headwise.v1.deployment_pb2_grpc import DeploymentServiceStub
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from headwise.workers.errors import HeadwiseError, InvalidValueError

__all__ = ["AsyncClient", "Client", "Completion", "Increment", "Prompt", "Sample", "ServerError"]

T = TypeVar("T")
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation."""

RETRIES = 3
_MAX_BACKOFF_S = 5.0


class ServerError(HeadwiseError):
    """A call failed: the server refused it, ended it, or cannot be reached.

    Attributes:
        code: the gRPC status code.
        field: the field of the request that was wrong; empty if none was.
        retry_after_s: in how many seconds to try again, if the server said so; else None.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, field: str = "", retry_after_s: float | None = None
    ) -> None:
        self.code, self.field, self.retry_after_s = code, field, retry_after_s
        super().__init__(f"{code.name}: {message}")


class AsyncClient:
    """A connection to a server, for one asyncio event loop. Close it, or use it as an async context manager.

    Every method but :meth:`close` raises ServerError if its call fails.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        tls: bool = False,
        insecure: bool = False,
        timeout: float | None = None,
        retries: int = RETRIES,
    ) -> None:
        """
        Args:
            address: ``host:port``.
            token: is sent with each call.
            ca: a PEM file with the certificate that signed the server's; None trusts what the system trusts.
            cert, key: PEM files with the client's own certificate and its key, for servers that ask for one.
            tls: whether to connect by TLS. Default: if ca, cert or key is given.
            insecure: whether a token may go to another machine without TLS, where it can be read on the way. Default:
                False.
            timeout: seconds for each call that brings no timeout of its own. Default: None, no limit.
            retries: how often a call is repeated that finds the server UNAVAILABLE, unless part of an answer has come.
                Default: 3.

        Raises:
            InvalidValueError: the token would go to another machine in clear text, or a file cannot be used.
        """
        encrypted, here = bool(tls or ca or cert or key), leads_to_loopback(address)
        if token and not encrypted and not insecure and not here:
            limit = f"would go in clear text to {address}, which is not loopback"
            raise InvalidValueError("token", "...", limit, "connect by TLS, or say insecure=True")
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self._timeout, self._retries = timeout, retries
        options = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
        if here:  # by no proxy of the environment: to one on another machine, "localhost" is that machine
            options.append(("grpc.enable_http_proxy", 0))
        if encrypted:
            self._channel = grpc.aio.secure_channel(address, channel_credentials(ca, cert, key), options)
        else:
            self._channel = grpc.aio.insecure_channel(address, options)
        self._stub = InferenceServiceStub(self._channel)
        self._deployment = DeploymentServiceStub(self._channel)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        timeout: float | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[Increment | Completion]:
        """Completes a prompt, or answers a conversation: yields an Increment for each piece of the output, and at last
        the Completion.

        Leaving the stream early ends the request.

        Args:
            prompt: text, token ids, or a conversation, which is a list of ``{"role": …, "content": …}``.
            sampling_params: None is ``SamplingParams()``: temperature 1.0, at most 16 tokens.
            request_id: a name for :meth:`abort`; None makes one up.
            cache_salt: the request shares the prefix cache only with requests that have the same salt.
            timeout: seconds for the whole request; None is the client's timeout.
            whole: yield one Increment a sample, when it has ended; that costs less.

        Raises:
            ServerError: the call failed.
            InvalidValueError: the prompt is neither text, token ids nor a conversation.
        """
        name = request_id or secrets.token_hex(12)
        request = _request(prompt, sampling_params or SamplingParams(), name, cache_salt)
        request.stream = not whole
        deadline = _deadline(timeout if timeout is not None else self._timeout)
        completion = Completion(name, [Sample(i) for i in range(request.sampling_params.n)])
        attempt = 0
        while True:
            call = self._stub.Generate(request, timeout=_left(deadline), metadata=self._metadata)
            item: Increment | Completion | None = None
            try:
                async for response in call:
                    item = take(completion, response)
                    yield item
                if item is not completion:
                    raise ServerError(grpc.StatusCode.INTERNAL, "the server ended the stream without a result")
                return
            except grpc.aio.AioRpcError as error:
                # Nothing came, so nothing can come twice; and a server that still has the request refuses its id.
                attempt += 1
                if item is not None or error.code() is not grpc.StatusCode.UNAVAILABLE or attempt > self._retries:
                    raise _error(error) from None
                await asyncio.sleep(_backoff(attempt, deadline))
            finally:
                call.cancel()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Completion:
        """Completes a prompt, or answers a conversation; returns the result. Arguments and errors are those of
        :meth:`stream`."""
        items = [item async for item in self.stream(prompt, sampling_params, whole=True, **options)]
        return cast("Completion", items[-1])

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> Completion:
        """As :meth:`generate`, for a conversation."""
        return await self.generate(messages, sampling_params, **options)

    async def tokenize(self, text: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a text, or of a conversation by the model's chat template."""
        request = pb.TokenizeRequest()
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.CopyFrom(_messages(text))
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return str((await self._call(self._stub.Detokenize, request)).text)

    async def abort(self, *request_ids: str) -> None:
        """Ends requests, 1,024 at most; their callers get the output so far, with the finish_reason ``abort``."""
        await self._call(self._stub.Abort, pb.AbortRequest(request_ids=request_ids))

    async def model(self) -> pb.GetModelResponse:
        """The model that is served, and the limits for requests."""
        return await self._call(self._stub.GetModel, pb.GetModelRequest())

    async def stats(self) -> pb.GetStatsResponse:
        """What the server's engine holds and has done."""
        return await self._call(self._stub.GetStats, pb.GetStatsRequest())

    async def kv_events(self, capacity: int = 0) -> AsyncGenerator[pb.SubscribeKvEventsResponse]:
        """Yields a snapshot of the prefix cache, and then its changes, as described in ``headwise.runtime.kv.events``.

        Args:
            capacity: messages that may wait unread before a new snapshot takes their place; 0 is the server's default.

        Needs an admin's token where there are tokens.
        """
        call = self._stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest(capacity=capacity), metadata=self._metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _error(error) from None
        finally:
            call.cancel()

    async def drain(self, timeout: float | None = None) -> None:
        """Tells the server to take no more requests; returns when those that run have ended. Needs an admin's token
        where there are tokens."""
        await self._call(self._stub.Drain, pb.DrainRequest(), timeout)

    async def status(self) -> deployment_pb2.GetStatusResponse:
        """How the deployment and each of its replicas are. Needs an admin's token where there are tokens, as
        :meth:`scale` and :meth:`restart`."""
        return await self._call(self._deployment.GetStatus, deployment_pb2.GetStatusRequest())

    async def scale(self, replicas: int) -> None:
        """Sets how many replicas there are to be; :meth:`status` tells when there are."""
        try:
            request = deployment_pb2.ScaleRequest(replicas=replicas)
        except ValueError:
            raise InvalidValueError("replicas", replicas, "must be a number from 1") from None
        await self._call(self._deployment.Scale, request)

    async def restart(self) -> str:
        """Begins to replace every replica, one after another; :meth:`status` tells when it is over.

        Returns:
            What is being done, for people to read.
        """
        return str((await self._call(self._deployment.Restart, deployment_pb2.RestartRequest())).message)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        deadline = _deadline(timeout if timeout is not None else self._timeout)
        for attempt in range(1, self._retries + 2):
            try:
                return await method(request, timeout=_left(deadline), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt > self._retries:
                    raise _error(error) from None
            await asyncio.sleep(_backoff(attempt, deadline))
        raise AssertionError("unreachable")


class Client:
    """A connection to a server, for programs without asyncio. Close it, or use it as a context manager.

    Takes the arguments of :class:`AsyncClient`, and has its methods but ``kv_events``, for any thread to call.
    Closing the client ends the calls of other threads. A call on a closed client raises ServerError (UNAVAILABLE).
    """

    def __init__(self, address: str, **options: Any) -> None:
        # Reentrant: the garbage collector may end a stream while this thread holds it.
        self._lock, self._closed = threading.RLock(), False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headwise-client", daemon=True)
        self._thread.start()

        async def connect() -> AsyncClient:
            return AsyncClient(address, **options)

        try:
            self._client = self._run(connect())
        except BaseException:
            self._stop()
            raise

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Increment | Completion]:
        """As :meth:`AsyncClient.stream`."""
        stream = self._client.stream(prompt, sampling_params, **options)
        try:
            while (item := self._run(_next(stream))) is not None:
                yield item
        finally:
            # Nobody waits for it: where the garbage collector does this, it may be on the client's own thread.
            with suppress(ServerError):
                self._submit(stream.aclose())

    def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any) -> Completion:
        """As :meth:`AsyncClient.generate`."""
        return self._run(self._client.generate(prompt, sampling_params, **options))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> Completion:
        """As :meth:`AsyncClient.chat`."""
        return self.generate(messages, sampling_params, **options)

    def tokenize(self, text: str | Sequence[Mapping[str, str]]) -> list[int]:
        return self._run(self._client.tokenize(text))

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._run(self._client.detokenize(token_ids, skip_special_tokens))

    def abort(self, *request_ids: str) -> None:
        self._run(self._client.abort(*request_ids))

    def model(self) -> pb.GetModelResponse:
        return self._run(self._client.model())

    def stats(self) -> pb.GetStatsResponse:
        return self._run(self._client.stats())

    def drain(self, timeout: float | None = None) -> None:
        self._run(self._client.drain(timeout))

    def status(self) -> deployment_pb2.GetStatusResponse:
        return self._run(self._client.status())

    def scale(self, replicas: int) -> None:
        self._run(self._client.scale(replicas))

    def restart(self) -> str:
        return self._run(self._client.restart())

    def close(self) -> None:
        """Ends the connection. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        finally:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        except CancelledError:
            raise _closed() from None
        finally:
            future.cancel()  # where the wait was interrupted

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise _closed()

    async def _end(self) -> None:
        """Ends what runs on the loop; whoever waits for it gets an error."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._client.close()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _request(prompt: Prompt, params: SamplingParams, request_id: str, cache_salt: str) -> pb.GenerateRequest:
    request = pb.GenerateRequest(request_id=request_id, cache_salt=cache_salt, sampling_params=sampling_message(params))
    if isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
        request.messages.CopyFrom(_messages(cast("Sequence[Mapping[str, str]]", prompt)))
        return request
    try:
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt if not isinstance(prompt, bytes) else [prompt])
    except (TypeError, ValueError):
        raise InvalidValueError("prompt", prompt, "must be text, a list of whole token ids or messages") from None
    return request


def _messages(conversation: Sequence[Mapping[str, str]]) -> pb.Messages:
    try:
        return messages_message(conversation)
    except (KeyError, TypeError, ValueError):
        limit = "each must have a role and a content, both strings"
        raise InvalidValueError("messages", conversation, limit) from None


async def _next(stream: AsyncGenerator[Increment | Completion]) -> Increment | Completion | None:
    return await anext(stream, None)


def _error(error: grpc.aio.AioRpcError) -> ServerError:
    field, retry_after_s = "", None
    details = next((v for k, v in error.trailing_metadata() or () if k == "grpc-status-details-bin"), b"")
    for detail in status_pb2.Status.FromString(details).details:
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return ServerError(error.code(), error.details() or "", field, retry_after_s)


def _closed() -> ServerError:
    return ServerError(grpc.StatusCode.UNAVAILABLE, "the client is closed")


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _backoff(attempt: int, deadline: float | None) -> float:
    """Doubles from 0.1 s, with a random part so that clients do not come back all at once."""
    wait = min(_MAX_BACKOFF_S, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)
    left = _left(deadline)
    return wait if left is None else min(wait, left)
