"""Requests of the engine's own, which compute a prompt that nobody here reads an answer to."""

from __future__ import annotations

from headwise.runtime.engine.request import Request
from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling

_PARAMS = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def own_request(name: str, blocks: TokenBlocks, tenant: str = "", transfer: TransferKey | None = None) -> Request:
    """A request that computes a prompt of full blocks, and samples one token after them: if that token's logits are
    finite, so are all the keys and values that they have read.

    Args:
        name: of no other own request that runs.
    """
    # No client's request has such a name: it is not printable.
    return Request(
        own_name(name),
        blocks.tokens(len(blocks.digests)),
        _PARAMS,
        RowSampling(),
        max_tokens=1,
        streamed=False,
        tenant=tenant,
        token_blocks=blocks,
        transfer=transfer,
    )


def own_name(name: str) -> str:
    """The request id of an own request."""
    return f"\x1f{name}"
