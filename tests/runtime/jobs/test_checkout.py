from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from headwise.runtime.jobs import checkout
from headwise.runtime.jobs.checkout import packages_of
from headwise.workers.errors import HeadwiseError, InvalidValueError

ROOT = Path(__file__).parents[3]


@pytest.mark.thorough
def test_the_packages_of_this_checkout(tmp_path: Path) -> None:
    """And building them leaves nothing in it."""
    pytest.importorskip("build")
    before = {path.name for path in ROOT.iterdir()}
    found = packages_of(ROOT, tmp_path)
    assert [path.name.partition("-")[0] for path in found] == ["headwise", "headwise"]
    for file in ("runtime/cli/__main__.py", "workers/shard.py", "v1/inference_pb2.py"):
        assert (found[0] / file).is_file()
    assert (found[1] / "METADATA").is_file()
    assert {path.name for path in ROOT.iterdir()} == before


@pytest.mark.thorough
def test_a_checkout_of_which_no_wheel_can_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("build")
    folder, into = tmp_path / "checkout", tmp_path / "into"
    into.mkdir()
    for name in ("proto", "workers", "cluster", "runtime"):
        (folder / name).mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / name).write_text("[[")
    with pytest.raises(HeadwiseError, match=r"--checkout=.*no wheel can be built: .+"):
        packages_of(folder, into)
    monkeypatch.setattr(checkout, "BUILD_S", 0.0)
    with pytest.raises(HeadwiseError, match="no wheel was built within 0 s"):
        packages_of(folder, Path(shutil.copytree(into, tmp_path / "again", ignore=lambda *_: ["source"])))


def test_what_an_editor_left_in_a_checkout_and_what_cannot_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("build")
    folder = tmp_path / "checkout"
    for name in ("proto", "workers", "cluster", "runtime"):
        (folder / name).mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / name).write_text("")
    (folder / "runtime" / ".#llm.py").symlink_to("nowhere")
    monkeypatch.setattr(checkout, "BUILD_S", 0.0)
    for name, said in (("one", "no wheel was built within 0 s"), ("two", "cannot be copied: .*is a named pipe")):
        (tmp_path / name).mkdir()
        with pytest.raises(HeadwiseError, match=rf"--checkout=.*{said}"):
            packages_of(folder, tmp_path / name)
        if name == "one":
            os.mkfifo(folder / "runtime" / "pipe")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match=r"--checkout=.*is no checkout of Headwise: it has no pyproject.toml"):
        packages_of(tmp_path, tmp_path)
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidValueError, match="needs the package build"):
        packages_of(ROOT, tmp_path)
