"""Converts between the messages of proto/headwise/v1 and the runtime's own types.

Of a list that is too long, only as much is converted as the validator needs to see that it is: a message has room for
millions of entries, which would take a second to copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta
from headwise.runtime.inputs.processor import MAX_MESSAGES, InputProcessor
from headwise.runtime.output import FinishReason
from headwise.runtime.sampling_params import MAX_LOGIT_BIAS_ENTRIES, MAX_STOP, MAX_STOP_TOKEN_IDS, SamplingParams
from headwise.runtime.structured_outputs import MAX_CHOICES, StructuredOutputsParams
from headwise.v1 import inference_pb2 as pb
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import TokenLogprobs

_SCALARS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logprobs", "max_tokens", "min_tokens", "ignore_eos", "seed"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """
    Raises:
        InvalidValueError: a field is outside its limits.
    """
    fields: dict[str, Any] = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    fields |= {"max_tokens": None} if fields.get("max_tokens") == 0 else {}
    if message.logit_bias:
        fields["logit_bias"] = dict(islice(message.logit_bias.items(), MAX_LOGIT_BIAS_ENTRIES + 1))
    if message.stop:
        fields["stop"] = message.stop[: MAX_STOP + 1]
    if message.stop_token_ids:
        fields["stop_token_ids"] = message.stop_token_ids[: MAX_STOP_TOKEN_IDS + 1]
    fields["structured_outputs"] = structured_outputs(message)
    return SamplingParams(**fields)


def structured_outputs(message: pb.SamplingParams) -> StructuredOutputsParams | None:
    """What a request's output has to be; None if the request does not say.

    Raises:
        InvalidValueError: what it says is malformed or too long.
    """
    if not message.HasField("structured_outputs"):
        return None
    if (kind := message.structured_outputs.WhichOneof("kind")) is None:
        return StructuredOutputsParams()  # which refuses
    value = getattr(message.structured_outputs, kind)
    fields: dict[str, Any] = {kind: value.choices[: MAX_CHOICES + 1] if kind == "choice" else value}
    return StructuredOutputsParams(**fields)


def sampling_message(params: SamplingParams) -> pb.SamplingParams:
    """The inverse of :func:`sampling_params`."""
    message = pb.SamplingParams(
        logit_bias=dict(params.logit_bias), stop=params.stop, stop_token_ids=params.stop_token_ids
    )
    for name in _SCALARS:
        if (value := getattr(params, name)) is not None:
            setattr(message, name, value)
    message.max_tokens = params.max_tokens or 0
    if params.structured_outputs is not None:
        [(kind, value)] = params.structured_outputs.given.items()
        given = {kind: pb.Choice(choices=value) if kind == "choice" else value}
        message.structured_outputs.CopyFrom(pb.StructuredOutputs(**given))
    return message


def messages(message: pb.Messages) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in message.messages[: MAX_MESSAGES + 1]]


def messages_message(conversation: Sequence[Mapping[str, str]]) -> pb.Messages:
    return pb.Messages(messages=[pb.Message(role=m["role"], content=m["content"]) for m in conversation])


def prompt_ids(inputs: InputProcessor, request: pb.GenerateRequest) -> list[int]:
    """The tokens of a request's prompt. Text is tokenized, which may take a while.

    Raises:
        InvalidValueError: the prompt is missing or wrong.
    """
    match request.WhichOneof("prompt"):
        case "text":
            return inputs.token_ids(request.text)
        case "token_ids":
            return inputs.token_ids(request.token_ids.ids)
        case "messages":
            return inputs.token_ids(inputs.chat_token_ids(messages(request.messages)))
    raise InvalidValueError("prompt", None, "must be one of text, token_ids and messages")


def increments(deltas: Sequence[Delta], with_text: bool) -> list[pb.GenerateIncrement]:
    """One message for each sample that has new tokens, however many deltas it has."""
    found: dict[int, pb.GenerateIncrement] = {}
    for delta in deltas:
        if not delta.token_ids and not delta.text:
            continue
        index = delta.request.index
        if index not in found:
            found[index] = pb.GenerateIncrement(index=index, text="" if with_text else None)
        found[index].token_ids.extend(delta.token_ids)
        if delta.text:
            found[index].text += delta.text
        if delta.logprobs is not None:
            found[index].logprobs.append(_logprobs(delta.logprobs))
    return list(found.values())


def result(requests: Sequence[Request]) -> pb.GenerateResult:
    """The last message of a request whose samples have all ended."""
    metrics = requests[0].metrics
    message = pb.GenerateResult(
        request_id=requests[0].request_id,
        usage=pb.Usage(
            prompt_tokens=len(requests[0].prompt_token_ids),
            completion_tokens=sum(len(request.generated) for request in requests),
            cached_tokens=metrics.num_cached_tokens,
        ),
        timings=pb.Timings(queued=metrics.queued, time_to_first_token=metrics.time_to_first_token, total=metrics.total),
    )
    if metrics.prefilled_by is not None:
        message.prefilled_by, message.handoff_tokens = metrics.prefilled_by, metrics.num_handoff_tokens
    for request in requests:
        assert request.finish_reason is not None
        sample = message.samples.add(
            index=request.index,
            finish_reason=FINISH_REASONS[request.finish_reason],
            num_tokens=len(request.generated),
            error=request.error or "",
        )
        if isinstance(request.stop_reason, str):
            sample.stop_string = request.stop_reason
        elif request.stop_reason is not None:
            sample.stop_token_id = request.stop_reason
    return message


def _logprobs(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=i, logprob=v) for i, v in zip(logprobs.top_ids, logprobs.top, strict=True)]
    return pb.TokenLogprobs(logprob=logprobs.chosen, rank=logprobs.rank, top=top)
