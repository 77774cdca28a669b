"""The floors and their folders: imports only point down, none runs in a circle, and everything is in the package."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("proto", "workers", "cluster", "runtime")  # from the ground up
NO_TORCH = tuple(ROOT / "runtime" / name for name in ("kv", "handoff", "routing"))


def modules(root: Path = ROOT) -> list[Path]:
    return [path for floor in FLOORS for path in sorted((root / floor).rglob("*.py")) if "_pb2" not in path.name]


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
        assert name.split(".")[0] != "torch" or path.parent not in NO_TORCH


def test_no_module_is_imported_in_a_circle() -> None:
    TopologicalSorter(module_graph(ROOT)).prepare()


def test_no_folder_is_imported_in_a_circle() -> None:
    check_folders(module_graph(ROOT))


def test_a_circle_between_two_folders_is_found(tmp_path: Path) -> None:
    """No module of this plant is in a circle, but the folders red and blue are."""
    for name, source in {
        "red/one.py": "from headwise.workers.blue.two import TWO",
        "red/three.py": "THREE = 3",
        "blue/two.py": "from headwise.workers.red.three import THREE\nTWO = 2",
        "shard.py": "from headwise.workers.red.one import TWO",
    }.items():
        (tmp_path / "workers" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "workers" / name).write_text(source)
    graph = module_graph(tmp_path)
    TopologicalSorter(graph).prepare()
    with pytest.raises(CycleError, match=r"headwise\.workers\.red"):
        check_folders(graph)


def module_graph(root: Path) -> dict[str, set[str]]:
    """Which of our modules each of them imports with itself: not inside functions, nor for type checkers only."""
    names = {f"headwise.{'.'.join(path.relative_to(root).with_suffix('').parts)}": path for path in modules(root)}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                graph[name] |= inner or ({node.module} & names.keys())
    return graph


def check_folders(graph: Mapping[str, set[str]]) -> None:
    """In every folder, its modules and the folders in it import each other in one direction only.

    Raises:
        CycleError: with the names of those that do not.
    """
    for folder in {parent for name in graph for parent in parents(name)}:
        inside: dict[str, set[str]] = {}
        for name, targets in graph.items():
            child = child_of(folder, name)
            if child is not None:
                reached = {child_of(folder, target) for target in targets} - {child, None}
                inside.setdefault(child, set()).update(name for name in reached if name is not None)
        TopologicalSorter(inside).prepare()


def parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def child_of(folder: str, name: str) -> str | None:
    """The module or folder right in ``folder`` that a module is, or is in."""
    if not name.startswith(folder + "."):
        return None
    return f"{folder}.{name.removeprefix(folder + '.').split('.')[0]}"


def test_every_folder_with_modules_is_packaged_and_typed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in modules()} - {Path("proto")}
    expected = {f"headwise.{'.'.join(folder.parts)}" for folder in folders} | {"headwise.v1"}
    assert set(config["packages"]) == expected
    for folder in [*folders, Path("proto/headwise/v1")]:
        assert (ROOT / folder / "py.typed").is_file(), folder
