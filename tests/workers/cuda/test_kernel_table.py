"""benchmarks/gpu_kernels.py: what kernels become, as a table."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_kernels

    return gpu_kernels


def test_forms_are_compiled_for_their_target(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    form = next(form for form in script.forms("bfloat16") if not form.head_dim)
    monkeypatch.setattr(script, "forms", lambda dtype: [form])
    found = script.compiled(("bfloat16", "sm_90a"))
    names = {"norm_rows", "add_and_norm_rows", "gate_rows", "best_keys", "gather", "scatter"}
    assert {one.kernel for one in found} == names
    assert all(one.registers and not one.spilled and one.target == "sm_90a" for one in found)


def test_a_line_stands_for_all_dtypes_and_head_dims_but_attention_s(script: ModuleType) -> None:
    found = [
        script.Became("attend", "decode", dtype, head_dim, "sm_80", head_dim + 10, spilled, 2048, 4)
        for dtype, spilled in (("bfloat16", 0), ("float32", 8))
        for head_dim in (64, 128)
    ]
    found += [script.Became("gate_rows", "both", dtype, 0, "sm_80", 30, 0, 0, 4) for dtype in ("bfloat16", "float32")]
    assert list(script.table(found, ["sm_80"], "bfloat16"))[2:] == [
        "| attend | decode | bfloat16 | 64 | 74, 2 KiB | 0 |",
        "| attend | decode | bfloat16 | 128 | 138, 2 KiB | 0 |",
        "| attend | decode | float32 | all | 74-138, 2 KiB | 8 |",
        "| gate_rows | both | all |  | 30 | 0 |",
    ]
