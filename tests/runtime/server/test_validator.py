"""Whatever a message of either service holds, it becomes requests, or an error that names a field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2

from headwise.runtime.engine.request import Request
from headwise.runtime.inputs.grammars import GrammarChecker
from headwise.runtime.inputs.processor import InputProcessor
from headwise.runtime.inputs.tokenizer import load_tokenizer
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.server import convert, vllm_engine
from headwise.v1 import inference_pb2 as pb
from headwise.workers.errors import InvalidValueError
from headwise.workers.model.model_config import load_model_config
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.effort import examples

MAX_MODEL_LEN = 128
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
TEXTS = st.text(max_size=12) | st.sampled_from(["user", "{}", '{"type": "object"}', "[a-z]+", 'start: "a"', "x" * 300])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InputProcessor]:
    path: Path = tmp_path_factory.mktemp("validator")
    write_byte_tokenizer(write_checkpoint(path, 8, 4, vocab_size=VOCAB))
    model = load_model_config(path)
    grammars = GrammarChecker(path, model.vocab_size, model.eos_token_ids)
    processor = InputProcessor(load_tokenizer(path), model, MAX_MODEL_LEN, 0, grammars)
    yield processor
    processor.close()


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Half of them such as a client that means well would send."""
    if field.cpp_type in RANGES:
        return st.integers(0, 20) | st.integers(*RANGES[field.cpp_type])
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return st.floats(0, 1) | st.floats(width=32)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    assert field.cpp_type == FieldDescriptor.CPPTYPE_STRING, field
    return TEXTS


@st.composite
def messages(draw: st.DrawFn, kind: type[Any]) -> Any:
    """Any message of a type: each of its fields set or not, all of a oneof but the last in vain."""
    message = kind()
    fill(draw, message, kind.DESCRIPTOR)
    return message


def fill(draw: st.DrawFn, message: Any, descriptor: Descriptor) -> None:
    few = st.lists(st.sampled_from(list(descriptor.fields)), max_size=6, unique_by=lambda field: field.name)
    for field in draw(few):
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            pairs = st.dictionaries(scalars(entry.fields[0]), scalars(entry.fields[1]), max_size=3)
            getattr(message, field.name).update(draw(pairs))
        elif field.is_repeated and entry is not None:
            for _ in range(draw(st.integers(0, 2))):
                fill(draw, getattr(message, field.name).add(), entry)
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(scalars(field), max_size=20)))
        elif entry is not None:
            getattr(message, field.name).SetInParent()
            fill(draw, getattr(message, field.name), entry)
        else:
            setattr(message, field.name, draw(scalars(field)))


def requests_or_a_field(make: Callable[[], list[Request]]) -> None:
    refused, made = None, []
    try:
        made = make()
    except InvalidValueError as error:
        refused = error
    if refused is not None:
        assert refused.field and refused.limit
        return
    assert [request.index for request in made] == list(range(made[0].params.n))
    for request in made:
        assert 0 < len(request.prompt_token_ids) < MAX_MODEL_LEN
        assert 0 < request.max_tokens <= MAX_MODEL_LEN - len(request.prompt_token_ids)


fuzzing = examples(300, suppress_health_check=[HealthCheck.too_slow])


@fuzzing
@given(message=messages(pb.GenerateRequest), ids=st.lists(st.integers(0, VOCAB), max_size=MAX_MODEL_LEN))
def test_any_message_becomes_requests_or_names_a_field(
    inputs: InputProcessor, message: pb.GenerateRequest, ids: list[int]
) -> None:
    if message.WhichOneof("prompt") is None:
        message.token_ids.ids.extend(ids)

    def make() -> list[Request]:
        params = convert.sampling_params(message.sampling_params)
        prompt = convert.prompt_ids(inputs, message)
        return list(inputs.requests("fuzzed", prompt, params, 0, message.cache_salt))

    requests_or_a_field(make)


@fuzzing
@given(message=messages(vllm_engine_pb2.SamplingParams))
def test_so_do_the_gateways_parameters(inputs: InputProcessor, message: vllm_engine_pb2.SamplingParams) -> None:
    requests_or_a_field(lambda: list(inputs.requests("fuzzed", [1, 2, 3], vllm_engine.sampling_params(message), 0)))


@fuzzing
@given(message=messages(pb.SamplingParams))
def test_parameters_survive_the_wire(message: pb.SamplingParams) -> None:
    try:
        params = convert.sampling_params(message)
    except InvalidValueError:
        params = SamplingParams()
    assert convert.sampling_params(convert.sampling_message(params)) == params
