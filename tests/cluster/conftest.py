"""One Ray for the tests of this folder: to start one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="package", autouse=True)
def ray_ends() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def one_ray() -> str:
    """The address of a Ray with 4 CPUs. Groups join it and leave it running; who wants none of it shuts it down."""
    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20
        )
    return str(ray.get_runtime_context().gcs_address)
