"""From settings to the KV policy and format of a model, and what requests may ask for under them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime import SamplingParams
from headwise.runtime.config import EngineConfig, engine_config
from headwise.runtime.engine.request import Request
from headwise.runtime.kv_settings import (
    MAX_FILE_BYTES,
    heads_notes,
    kv_name,
    model_format,
    model_policy,
    with_streaming_heads,
)
from headwise.runtime.prepare import PreparedModel, prepare
from headwise.runtime.sampling_params import MAX_ENDLESS_TOKENS
from headwise.runtime.sides import check_side, decode_config, prefill_config
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import resolve_policy
from headwise.workers.model.checkpoint import model_fingerprint
from headwise.workers.model.model_config import ModelConfig
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint

LAYERS, KV_HEADS = 4, 2
MODEL = ModelConfig(64, LAYERS, 4, KV_HEADS, 16, 150, 256, 512, 1e-5)
RULE = "sinks:4,60"


def settings(**fields: Any) -> EngineConfig:
    return engine_config(model="", **fields)


def heads_file(folder: Path, **changes: Any) -> str:
    path = folder / "heads.json"
    path.write_text(json.dumps({"kv_policy": RULE, "heads": [[1, 0], [3, 1]], "tokens": 4096} | changes))
    return str(path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_policy": "sinks:4"}, "kv_policy='sinks:4': must be dense, window:L"),
        ({"kv_policy": "window:0"}, "kv_policy='window:0': must be dense"),
        ({"kv_dtype": "int3"}, "kv_dtype='int3': must be one of float32, bfloat16, float16, int8, int4, int8/int4"),
        ({"kv_dtype": "auto"}, "kv_dtype='auto': must be one of"),
        ({"kv_policy": 7}, "kv_policy=7: "),
        ({"streaming_heads": ""}, "streaming_heads='': "),
    ],
)
def test_settings_that_are_wrong_for_every_model_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValueError) as raised:
        settings(**fields)
    assert str(raised.value).startswith(said) and raised.value.field == next(iter(fields))


def test_the_default_keeps_everything_in_the_dtype_of_the_model() -> None:
    assert model_policy(settings(), MODEL).plain
    assert str(model_format(settings(), MODEL, "bfloat16")) == "bfloat16"
    assert str(model_format(settings(kv_dtype="int8/int4"), MODEL, "float32")) == "int8/int4"


def test_a_form_that_the_models_heads_cannot_have_is_refused() -> None:
    wide = ModelConfig(96, 2, 2, 2, 48, 150, 256, 512, 1e-5)
    with pytest.raises(InvalidValueError, match=r"^kv_dtype='int4': .*multiple of 32.*48"):
        model_format(settings(kv_dtype="int4"), wide, "float32")


@pytest.mark.parametrize("setting", [{"kv_policy": "window:64"}, {"kv_dtype": "int8"}, {"streaming_heads": "x"}])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_both_sides_of_a_handoff_keep_the_same(setting: dict[str, str], side: str) -> None:
    with pytest.raises(InvalidValueError, match="is the same for prefill and decode"):
        check_side(side, setting)


def test_both_sides_get_what_is_set() -> None:
    config = settings(kv_policy="window:64", kv_dtype="int8", streaming_heads="x", prefill={}, executor="local")
    for side in (prefill_config(config), decode_config(config, "127.0.0.1:1")):
        assert (side.kv_policy, side.kv_dtype, side.streaming_heads) == ("window:64", "int8", "x")


# streaming heads


def test_streaming_heads_stand_before_the_policy(tmp_path: Path) -> None:
    config = settings(kv_policy="dense@0;window:100@*", streaming_heads=heads_file(tmp_path))
    merged = with_streaming_heads(config)
    assert merged.kv_policy == f"{RULE}@1.0,3.1;dense@0;window:100@*" and merged.streaming_heads is None
    policy = model_policy(config, MODEL)
    assert policy == model_policy(merged, MODEL) == resolve_policy(merged.kv_policy, LAYERS, KV_HEADS)
    of = [[str(policy.reaches[group]) for group in row] for row in policy.groups_LK]
    assert of == [["dense"] * 2, [RULE, "window:100"], ["window:100"] * 2, ["window:100", RULE]]


def test_without_heads_the_file_changes_nothing(tmp_path: Path) -> None:
    assert model_policy(settings(streaming_heads=heads_file(tmp_path, heads=[])), MODEL).plain


def test_all_heads_make_one_group(tmp_path: Path) -> None:
    every = [[layer, head] for layer in range(LAYERS) for head in range(KV_HEADS)]
    policy = model_policy(settings(streaming_heads=heads_file(tmp_path, heads=every)), MODEL)
    assert policy.text == RULE and policy.bounded


@given(
    heads=st.sets(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, KV_HEADS - 1))),
    rest=st.sampled_from(["dense", "window:32", "sinks:4,100"]),
)
def test_each_head_has_the_policy_of_the_file_or_the_other(
    tmp_path_factory: pytest.TempPathFactory, heads: set[tuple[int, int]], rest: str
) -> None:
    file = heads_file(tmp_path_factory.mktemp("heads"), kv_policy="window:8", heads=[list(head) for head in heads])
    policy = model_policy(settings(kv_policy=rest, streaming_heads=file), MODEL)
    for layer, row in enumerate(policy.groups_LK):
        for head, group in enumerate(row):
            assert str(policy.reaches[group]) == ("window:8" if (layer, head) in heads else rest)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_policy": None}, "kv_policy=null in it: must be window:L or sinks:S,L"),
        ({"kv_policy": 5}, "kv_policy=5 in it: "),
        ({"kv_policy": "sinks:4"}, 'kv_policy="sinks:4" in it: must be dense, window:L'),
        ({"kv_policy": "dense"}, 'kv_policy="dense" in it: must be window:L or sinks:S,L alone'),
        ({"kv_policy": "window:8@0"}, 'kv_policy="window:8@0" in it: must be window:L or sinks:S,L alone; heads'),
        ({"kv_policy": "window:8;dense"}, "kv_policy="),
        ({"heads": None}, "heads=null in it: must be a list"),
        ({"heads": [[1, 0], [1]]}, "heads[1]=[1] in it: must be [layer, KV head]"),
        ({"heads": [[1, -1]]}, "heads[0]=[1, -1] in it: "),
        ({"heads": [[1, True]]}, "heads[0]=[1, true] in it: "),
        ({"heads": [[0, 0], [LAYERS, 0]]}, f"heads[1]=[{LAYERS}, 0] in it: the model has layers 0 to {LAYERS - 1}"),
        ({"heads": [[0, KV_HEADS]]}, f"heads[0]=[0, {KV_HEADS}] in it: the model has layers 0 to {LAYERS - 1} and KV"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_name_and_the_field(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValueError) as raised:
        model_policy(settings(streaming_heads=heads_file(tmp_path, **changes)), MODEL)
    assert raised.value.field == "streaming_heads" and raised.value.value == str(tmp_path / "heads.json")
    assert raised.value.limit.startswith(said) and "headwise calibrate" in raised.value.fix


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * (MAX_FILE_BYTES + 1), f"is larger than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes | None, said: str) -> None:
    path = tmp_path / "heads.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InvalidValueError, match=f"^streaming_heads=.*heads.json.*: {said}"):
        model_policy(settings(streaming_heads=str(path)), MODEL)


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/heads.json"])
def test_a_path_that_can_be_none_is_refused(path: str) -> None:
    with pytest.raises(InvalidValueError, match=r"^streaming_heads=.*: cannot be read: .*; give a file of headwise"):
        model_policy(settings(streaming_heads=path), MODEL)


def test_a_file_of_another_model_is_said_to_be_one(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def notes(**changes: Any) -> list[str]:
        return [*heads_notes(settings(streaming_heads=heads_file(tmp_path, **changes)), checkpoint("gqa"))]

    assert notes() == notes(model=model_fingerprint(checkpoint("gqa"))) == notes(model=7) == []
    [said] = notes(model=model_fingerprint(checkpoint("mha")))
    assert said.startswith(f"streaming_heads={tmp_path}") and "headwise calibrate" in said
    assert [*heads_notes(settings(), checkpoint("gqa"))] == []


# policies with several groups


@pytest.mark.parametrize(
    "other",
    [{"host_kv_memory": "1GiB"}, {"disk_kv_path": "/kv"}, {"prefill": {}}, {"handoff": {"role": "prefill"}}],
)
def test_several_groups_do_not_go_where_blocks_are_moved(other: dict[str, Any]) -> None:
    [name] = other
    with pytest.raises(InvalidValueError, match=rf"^kv_policy=.*2 groups here, do not work with {name}; leave out"):
        model_policy(settings(kv_policy="dense@0;window:32", **other), MODEL)
    assert model_policy(settings(kv_policy="window:32@0-1;window:32", **other), MODEL).text == "window:32"


# what a shard and the prefix cache are told


@pytest.fixture(scope="module")
def prepared(checkpoint: Callable[..., Path]) -> Callable[..., PreparedModel]:
    def make(**fields: Any) -> PreparedModel:
        return prepare(engine_config(model=str(checkpoint("gqa")), executor="local", device="cpu", **fields))

    return make


def test_shards_are_told_the_canonical_text(prepared: Callable[..., PreparedModel]) -> None:
    spec = prepared(kv_policy=" window:32@1 ; window:32", kv_dtype="int8/int4").spec
    assert (spec.kv_policy, spec.kv_dtype) == ("window:32", "int8/int4")
    assert (prepared().spec.kv_policy, prepared().spec.kv_dtype) == ("dense", "float32")
    with pytest.raises(InvalidValueError, match=r"^kv_policy=.*names layers 7 to 7"):
        prepared(kv_policy="window:8@7;dense")


def test_what_blocks_hold_is_in_their_namespace(prepared: Callable[..., PreparedModel]) -> None:
    def namespace(dtype: str = "float32", **fields: Any) -> bytes:
        return prepared(**fields).identity(dtype).namespace()

    different = [
        namespace(),
        namespace("bfloat16"),
        namespace(kv_dtype="bfloat16"),
        namespace("bfloat16", kv_dtype="float32"),
        namespace(kv_dtype="int8"),
        namespace("bfloat16", kv_dtype="int8"),
        namespace(kv_policy="window:32"),
        namespace(kv_policy="sinks:4,32"),
        namespace(kv_policy="window:32@0;dense"),
        namespace(kv_policy="window:32", kv_dtype="int8"),
    ]
    assert len(set(different)) == len(different)
    assert namespace(kv_dtype="float32") == namespace()  # whoever asked for it
    assert namespace(kv_policy="window:32@0-1") == namespace(kv_policy="window:32")


def test_the_name_of_a_form_says_what_it_was_computed_in() -> None:
    assert kv_name("float32", "float32") == "float32" and kv_name("int8", "bfloat16") == "int8 of bfloat16"


# endless texts


def asked(model: PreparedModel, prompt: int, **params: Any) -> Request:
    inputs = model.inputs(0, None)
    try:
        ids = inputs.token_ids([5] * prompt)
        return next(inputs.requests("a", ids, SamplingParams(**params), 0))
    finally:
        inputs.close()


@pytest.mark.parametrize("policy", ["window:32", "sinks:4,60", "window:32@0;sinks:4,60"])
def test_with_windows_an_output_may_go_on_past_max_model_len(
    prepared: Callable[..., PreparedModel], policy: str
) -> None:
    model = prepared(kv_policy=policy, max_model_len=64)
    assert asked(model, 10, max_tokens=50_000, min_tokens=40_000).max_tokens == 50_000
    assert asked(model, 63, max_tokens=2).max_tokens == 2
    assert asked(model, 10, max_tokens=None).max_tokens == 54  # as without: nobody asked for more
    with pytest.raises(InvalidValueError, match=r"^prompt='64 tokens'"):
        asked(model, 64, max_tokens=2)
    for name in ("max_tokens", "min_tokens"):
        params = {"max_tokens": None} | {name: MAX_ENDLESS_TOKENS + 1}
        with pytest.raises(InvalidValueError, match=rf"^{name}=1000001: must be at most 1000000"):
            asked(model, 10, **params)
    assert asked(model, 10, max_tokens=125_000, n=8).max_tokens == 125_000
    with pytest.raises(InvalidValueError, match=r"^max_tokens=125001: must be at most 125000 with n=8"):
        asked(model, 10, max_tokens=125_001, n=8)


@pytest.mark.parametrize("policy", ["dense", "dense@0;sinks:4,60"])
def test_where_a_head_keeps_everything_it_may_not_and_is_told_why(
    prepared: Callable[..., PreparedModel], policy: str
) -> None:
    model = prepared(kv_policy=policy, max_model_len=64)
    assert asked(model, 60, max_tokens=64).max_tokens == 4
    said = (
        r"^max_tokens=65: must be at most max_model_len=64, .* grows with it; .*kv_policy=sinks:4,1020 \(--kv-policy\)"
    )
    with pytest.raises(InvalidValueError, match=said):
        asked(model, 10, max_tokens=65)


def test_an_endless_text_can_be_decoded(tmp_path: Path) -> None:
    write_byte_tokenizer(write_checkpoint(tmp_path, vocab_size=VOCAB))
    texts = {}
    for policy in ("dense", "window:32"):
        config = engine_config(model=str(tmp_path), kv_policy=policy, max_model_len=64, device="cpu")
        inputs = prepare(config).inputs(0, None)
        try:
            texts[policy] = inputs.decode([9] * 64)
            if policy == "dense":
                with pytest.raises(InvalidValueError, match=r"^token_ids='65 tokens': at most max_model_len=64"):
                    inputs.decode([9] * 65)
            else:
                assert len(inputs.decode([9] * 1000)) > len(texts[policy])
        finally:
            inputs.close()
    assert texts["dense"] == texts["window:32"]
