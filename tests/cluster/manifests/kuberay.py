"""The fields of KubeRay's resources that our manifests use, as JSON Schemas.

They are written by hand after KubeRay 1.5's API (ray.io/v1), for no package carries KubeRay's own schemas. A field that
is not here is refused; add it with the type that KubeRay gives it. Pod templates and services in them are Kubernetes'
own, and are checked as such.
"""

from __future__ import annotations

from typing import Any

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_KUBERNETES = {"type": "object"}
"""What Kubernetes' own schemas check."""


def _fields(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


_CLUSTER_SPEC = _fields(
    ("headGroupSpec",),
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=_fields(("mode",), mode={"enum": ["disabled", "token"]}),
    headGroupSpec=_fields(("template",), headService=_KUBERNETES, rayStartParams=_STRINGS, template=_KUBERNETES),
    workerGroupSpecs={
        "type": "array",
        "items": _fields(
            ("groupName", "template", "minReplicas", "maxReplicas"),
            groupName={"type": "string"},
            replicas={"type": "integer", "minimum": 0},
            minReplicas={"type": "integer", "minimum": 0},
            maxReplicas={"type": "integer", "minimum": 0},
            rayStartParams=_STRINGS,
            template=_KUBERNETES,
        ),
    },
)
_JOB_SPEC = _fields(
    ("entrypoint", "rayClusterSpec"),
    entrypoint={"type": "string"},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit={"type": "integer", "minimum": 0},
    rayClusterSpec=_CLUSTER_SPEC,
)


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _fields(("name",), name={"type": "string"}, annotations=_STRINGS, labels=_STRINGS)
    return _fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


SCHEMAS = {"RayCluster": _resource("RayCluster", _CLUSTER_SPEC), "RayJob": _resource("RayJob", _JOB_SPEC)}
