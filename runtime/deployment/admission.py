"""From what a front tells of a request to the engine's own: checked, since a wrong number could end the shards."""

from __future__ import annotations

from headwise.runtime.deployment.messages import Add
from headwise.runtime.engine.request import Request
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import InvalidValueError


def request_of(add: Add, vocab_size: int, max_model_len: int, block_size: int, endless: bool = False) -> Request:
    """The request, named by its number, which goes on after the tokens that it has.

    Args:
        max_model_len: most tokens of prompt and output together, of the model and of the KV memory that there is.
        endless: whether the KV policy lets a text go on past max_model_len, from a prompt that is shorter.

    Raises:
        InvalidValueError: it cannot be computed.
    """
    _check_tokens("prompt_token_ids", add.prompt_token_ids, vocab_size)
    _check_tokens("generated", add.generated, vocab_size)
    _check_tokens("sampling.stop_token_ids", add.sampling.stop_token_ids, vocab_size)
    if len(add.generated) >= add.max_tokens:
        raise InvalidValueError("generated", f"{len(add.generated)} tokens", f"less than max_tokens={add.max_tokens}")
    total = len(add.prompt_token_ids) + (1 if endless else add.max_tokens)
    if total > max_model_len:
        limit = f"this replica computes at most max_model_len={max_model_len} with the KV memory that it has"
        raise InvalidValueError("prompt and max_tokens", f"{total} tokens", limit)
    params = _params(add)
    params.check(vocab_size, max_model_len, endless)
    blocks = None
    if add.namespace is not None:
        blocks = TokenBlocks(add.namespace, block_size, add.prompt_token_ids, owner=add.owner)
    return Request(
        request_id=str(add.number),
        prompt_token_ids=add.prompt_token_ids,
        params=params,
        sampling=add.sampling,
        max_tokens=add.max_tokens,
        streamed=add.streamed,
        tenant=add.tenant,
        token_blocks=blocks,
        generated=add.generated,
    )


def _params(add: Add) -> SamplingParams:
    """What the engine asks of parameters, and the checks of their limits."""
    s = add.sampling
    return SamplingParams(
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        logit_bias=dict(s.logit_bias),
        logprobs=None if s.num_logprobs < 0 else s.num_logprobs,
        max_tokens=None,
        min_tokens=add.min_tokens,
        stop_token_ids=add.stop_token_ids,
    )


def _check_tokens(name: str, token_ids: list[int] | tuple[int, ...], vocab_size: int) -> None:
    if token_ids and (largest := max(token_ids)) >= vocab_size:
        raise InvalidValueError(name, largest, f"a token id must be in [0, {vocab_size})")
