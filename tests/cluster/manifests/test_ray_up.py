"""ray-up.yaml, as `ray up` itself reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config  # no other place has its schema

TEXT = (Path(__file__).parents[3] / "cluster" / "manifests" / "ray-up.yaml").read_text()


def prepared() -> dict[str, Any]:
    return dict(prepare_config(yaml.safe_load(TEXT)))


def test_ray_takes_it() -> None:
    config = prepared()
    validate_config(config)
    [(_, kind)] = config["available_node_types"].items()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


def test_a_field_that_there_is_not_is_found() -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared() | {"setup_command": []})


def test_every_node_asks_for_the_token() -> None:
    config = prepared()
    starts = [one for key in ("head", "worker") for one in config[f"{key}_start_ray_commands"] if "ray start" in one]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "~/.ray/auth_token" in config["file_mounts"]
