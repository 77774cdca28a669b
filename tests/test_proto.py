"""The generated modules are those of the .proto files, and messages survive the wire."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from headwise.v1 import deployment_pb2, deployment_pb2_grpc, inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).parent.parent / "proto"
FOLDER = ROOT / "headwise" / "v1"


def test_the_generated_modules_have_not_drifted(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    protos = [str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}", *outputs, *protos]
    subprocess.run(command, check=True, timeout=60)
    generated = {path.name: path.read_bytes() for path in (tmp_path / "headwise" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in FOLDER.glob("*_pb2*.py*")}
    assert len(protos) * 3 == len(generated)
    assert generated.keys() == committed.keys()
    assert [name for name in generated if generated[name] != committed[name]] == [], "run make proto"


def test_a_request_survives_the_wire() -> None:
    request = inference_pb2.GenerateRequest(
        request_id="a",
        token_ids=inference_pb2.TokenIds(ids=[1, 2, 2**32 - 1]),
        sampling_params=inference_pb2.SamplingParams(
            temperature=0.0, top_k=-1, logit_bias={5: -1.5}, stop=["x", "é"], seed=2**63 - 1
        ),
    )
    parsed = inference_pb2.GenerateRequest.FromString(request.SerializeToString())
    assert parsed == request and parsed.WhichOneof("prompt") == "token_ids"
    # What was set to its default is not the same as what was not set.
    assert parsed.sampling_params.HasField("temperature") and not parsed.sampling_params.HasField("top_p")
    assert list(parsed.token_ids.ids) == [1, 2, 2**32 - 1] and parsed.sampling_params.seed == 2**63 - 1


def test_finish_reasons_are_those_of_the_runtime() -> None:
    from headwise.runtime.output import FinishReason

    names = {name.removeprefix("FINISH_REASON_").lower() for name in inference_pb2.FinishReason.keys()}  # noqa: SIM118
    assert names == {str(reason) for reason in FinishReason} | {"unspecified"}
    assert inference_pb2.FinishReason.Value("FINISH_REASON_UNSPECIFIED") == 0


def test_the_service_has_a_stub_and_a_servicer() -> None:
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    assert service.full_name == "headwise.v1.InferenceService"
    streaming = {method.name for method in service.methods if method.server_streaming}
    assert streaming == {"Generate", "SubscribeKvEvents"} and len(service.methods) == 8
    for method in service.methods:
        assert method.input_type.name == f"{method.name}Request" and method.output_type.name == f"{method.name}Response"
        assert hasattr(inference_pb2_grpc.InferenceServiceServicer, method.name)


def test_the_service_for_admins_has_a_stub_and_a_servicer() -> None:
    service = deployment_pb2.DESCRIPTOR.services_by_name["DeploymentService"]
    assert service.full_name == "headwise.v1.DeploymentService"
    assert [method.name for method in service.methods] == ["GetStatus", "Scale", "Restart"]
    for method in service.methods:
        assert method.input_type.name == f"{method.name}Request" and method.output_type.name == f"{method.name}Response"
        assert hasattr(deployment_pb2_grpc.DeploymentServiceServicer, method.name)


def test_a_replica_has_the_fields_of_the_runtime() -> None:
    from headwise.runtime.deployment.control import ReplicaStatus, Role, ShardPlace, State, Status

    def fields(name: str) -> set[str]:
        return {field.name for field in deployment_pb2.DESCRIPTOR.message_types_by_name[name].fields}

    assert fields("GetStatusResponse") == Status.__annotations__.keys() | {"draining"}
    assert fields("Replica") == ReplicaStatus.__annotations__.keys() - {"since_s"} | {"since"}
    assert fields("Shard") == set(ShardPlace.__annotations__)
    for enum, prefix, names in (
        (deployment_pb2.ReplicaRole, "REPLICA_ROLE_", get_args(Role)),
        (deployment_pb2.ReplicaState, "REPLICA_STATE_", get_args(State)),
    ):
        assert {name.removeprefix(prefix).lower() for name in enum.keys()} == {*names, "unspecified"}  # noqa: SIM118
