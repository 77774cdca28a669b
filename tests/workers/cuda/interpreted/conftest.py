"""Triton's interpreter changes Triton for the whole process, so these tests have one of their own."""

import os

from tests.workers.cuda.fake_gpu import fake_gpu

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

__all__ = ["fake_gpu"]
