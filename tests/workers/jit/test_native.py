"""What the machine's operations become on processors other than the tests' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from headwise.workers.jit import native
from headwise.workers.jit.vectors import I64

TRIPLES = {"aarch64": "aarch64-unknown-linux-gnu", "x86_64": "x86_64-unknown-linux-gnu"}


def assembly(machine: str, emit: Callable[..., Any], num_args: int) -> list[str]:
    """The instructions of a function of integers that does nothing else."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(I64, [I64] * num_args), "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    result = emit(builder, *function.args)
    builder.ret(result if result is not None and result.type == I64 else I64(0))
    target = llvm.Target.from_triple(TRIPLES[machine]).create_target_machine()
    text: str = target.emit_assembly(llvm.parse_assembly(str(module)))
    lines = (line.split("//")[0].split("#")[0].split() for line in text.splitlines() if line.startswith("\t"))
    return [words[0] for words in lines if words and not words[0].startswith(".")]


@pytest.mark.parametrize(("machine", "instruction"), [("x86_64", "pause"), ("aarch64", "isb")])
def test_a_waiting_loop_tells_the_core(monkeypatch: pytest.MonkeyPatch, machine: str, instruction: str) -> None:
    monkeypatch.setattr(native, "_MACHINE", machine)
    assert instruction in assembly(machine, native._emit_pause, 0)


def test_a_core_that_is_not_known_waits_without_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_MACHINE", "riscv64")
    assert not {"pause", "isb"} & set(assembly("x86_64", native._emit_pause, 0))


def test_what_is_published_and_read_is_in_order_on_a_core_that_reorders() -> None:
    assert "stlr" in assembly("aarch64", native._emit_store_release, 2)
    assert {"ldar", "ldapr"} & set(assembly("aarch64", native._emit_load_acquire, 1))
    assert not {"stlr", "ldar"} & set(assembly("aarch64", lambda b, a: native._emit_store_int(b, a, I64(0), I64(1)), 1))
