"""The floors: imports only point down, and everything is in the package."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("proto", "workers", "cluster", "runtime")  # from the ground up


def modules() -> list[Path]:
    return [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py")) if "_pb2" not in path.name]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = {f"headwise.{name}" for name in FLOORS[floor + 1 :]}
    for name in imports(path):
        assert ".".join(name.split(".")[:2]) not in above
        assert name.split(".")[0] != "ray" or FLOORS[floor] == "cluster"
        assert name.split(".")[0] not in ("pickle", "cloudpickle", "dill")
        assert name.split(".")[0] != "torch" or path.parent != ROOT / "runtime" / "kv"


def test_no_import_runs_in_a_circle() -> None:
    names = {f"headwise.{'.'.join(p.relative_to(ROOT).with_suffix('').parts)}": p for p in modules()}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {name: top_level_imports(path, names.keys()) for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def top_level_imports(path: Path, ours: Collection[str]) -> set[str]:
    """Which of our modules are imported with the module: not inside functions, nor for type checkers only."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in ours else node.module)
    return found & set(ours)


def test_every_folder_with_modules_is_packaged_and_typed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in modules()} - {Path("proto")}
    expected = {f"headwise.{'.'.join(folder.parts)}" for folder in folders} | {"headwise.v1"}
    assert set(config["packages"]) == expected
    for folder in [*folders, Path("proto/headwise/v1")]:
        assert (ROOT / folder / "py.typed").is_file(), folder
