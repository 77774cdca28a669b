"""What a replica takes of its front."""

from __future__ import annotations

import pytest

from headwise.runtime.deployment.admission import request_of
from headwise.runtime.deployment.messages import Add
from headwise.runtime.engine.request import Request
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling


def taken(prompt: int, generated: int, max_tokens: int, endless: bool) -> Request:
    add = Add(1, [5] * prompt, [6] * generated, RowSampling(seed=1), max_tokens)
    return request_of(add, vocab_size=256, max_model_len=64, block_size=16, endless=endless)


def test_a_text_ends_at_max_model_len() -> None:
    assert taken(40, 3, 24, endless=False).max_tokens == 24
    with pytest.raises(InvalidValueError, match=r"^prompt and max_tokens='65 tokens'.*max_model_len=64"):
        taken(40, 3, 25, endless=False)


def test_an_endless_one_goes_on_from_wherever_it_was() -> None:
    request = taken(40, 500, 50_000, endless=True)
    assert request.max_tokens == 50_000 and len(request.generated) == 500
    with pytest.raises(InvalidValueError, match=r"^prompt and max_tokens='65 tokens'"):
        taken(64, 0, 50_000, endless=True)
