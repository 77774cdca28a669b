"""Two engines of one program, with a small model: what is done to both, and what is left when one does not start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import start
from headwise.runtime.config import EngineConfig, HandoffConfig
from headwise.runtime.engine.generation import GenerationFactory, ReadyGroup
from headwise.runtime.engine.tier_sizes import TierSizes
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.llm import LLM
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import KvEndpoint
from tests.plain_group import PlainGroup
from tests.runtime.handoff.engines import IDENTITY

PROMPT = list(range(3, 60))
SETTINGS: dict[str, Any] = {"executor": "local", "quiet": True, "kv_memory": "8MiB", "max_model_len": 128}


def test_resetting_the_prefix_cache_resets_that_of_prefill(checkpoint: Callable[..., Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(checkpoint("gqa"), prefill={}, handoff_min_tokens=0, **SETTINGS) as llm:
        first = llm.generate([PROMPT], params, use_tqdm=False)[0]
        llm.reset_prefix_cache()
        assert llm.stats()["prefill"]["prefix_cache"]["cached_blocks"] == 0
        again = llm.generate([PROMPT], params, use_tqdm=False)[0]
        assert again.outputs[0].token_ids == first.outputs[0].token_ids
        assert [output.metrics.prefilled_by for output in (first, again)] == ["prefill", "prefill"]
        assert llm.stats()["prefill"]["prefix_cache"]["hit_tokens"] == 0


def test_a_prefill_engine_that_cannot_be_asked_leaves_no_thread(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(service: object) -> None:
        raise InvalidValueError("TMPDIR", "long", "is too long")

    monkeypatch.setattr(start, "LocalServer", refuse)
    before = set(threading.enumerate())
    with pytest.raises(InvalidValueError, match="TMPDIR"):
        LLM(checkpoint("gqa"), prefill={}, **SETTINGS)
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("headwise")] == []


def test_a_peer_that_must_not_be_called_leaves_no_connection_to_those_before_it() -> None:
    peers = ("127.0.0.1:1", "192.0.2.1:5")  # where the token would go in clear text
    handoff = HandoffConfig(role="decode", peers=peers, token="token-0123456789abcdef")
    config = EngineConfig(model="", handoff=handoff)
    groups: Any = None
    factory = GenerationFactory(config, groups, 64, TierSizes(0, 0, 1), KvEvents(1), IDENTITY)
    with pytest.raises(InvalidValueError, match="token"):
        factory.open(ReadyGroup(PlainGroup(), 8, ([], []), [KvEndpoint((0, 1), "127.0.0.1:1", b"")]))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("headwise-link")]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prefill": {"tp": 1}}, "prefill['tp']"),
        ({"prefill": {"tensor_parallel_size": "two"}}, "prefill['tensor_parallel_size']"),
        ({"prefill": {"model": "x"}}, "prefill['model']"),
        ({"decode": {"tp": 1}}, "decode['tp']"),
        ({"decode": {"max_num_seqs": 0}}, "decode['max_num_seqs']"),
        ({"prefill": {}, "max_num_seqs": 0}, "max_num_seqs"),
    ],
)
def test_a_wrong_setting_of_a_side_is_named_as_it_was_given(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValueError) as error:
        LLM("no such model", **SETTINGS | settings)
    assert error.value.field == field


@pytest.mark.parametrize("handoff", [HandoffConfig(role="prefill"), HandoffConfig(role="decode", peers=("a:1",))])
def test_an_engine_with_prefill_has_no_other_role_and_no_other_peers(handoff: HandoffConfig) -> None:
    with pytest.raises(InvalidValueError, match="handoff"):
        start.start_engine(EngineConfig(model="", prefill={}, handoff=handoff), quiet=True)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"ca": "/nowhere/ca.pem"}, "ca"),
        ({"host": "192.0.2.1"}, "handoff_host"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(start, "make_factory", lambda config, spec: pytest.fail("too late"))
    handoff = HandoffConfig(role="decode", peers=("127.0.0.1:1",), **settings)
    config = EngineConfig(model=str(checkpoint("gqa")), executor="local", handoff=handoff)
    with pytest.raises(InvalidValueError) as error:
        start.start_engine(config, quiet=True)
    assert error.value.field == field
