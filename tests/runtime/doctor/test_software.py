"""Versions against Headwise's own bounds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from headwise.runtime.doctor.finding import Level
from headwise.runtime.doctor.software import own_requirements, packages

INSTALLED = {"python": "3.11.4", "torch": "2.13.0+cpu", "ray": "2.60.0", "msgpack": "1.1"}
WANTED = ["python>=3.11", "torch>=2.13", "ray[default]>=2.60", "msgpack>=1.1", 'triton>=3.8; extra == "cuda"']


def test_all_are_within_their_bounds() -> None:
    [found] = packages(WANTED, INSTALLED.get)
    assert found.level is Level.PASS and found.said.startswith("4 are within") and "torch 2.13.0+cpu" in found.said


@pytest.mark.parametrize(
    ("package", "version", "said", "fix"),
    [
        ("ray", "2.9.3", "2.9.3 is installed, and Headwise needs >=2.60", 'pip install "ray>=2.60"'),
        ("msgpack", None, "is not installed", 'pip install "msgpack>=1.1"'),
        ("python", "3.10.12", "needs >=3.11", "install Python >=3.11"),
    ],
)
def test_too_old_or_missing_fails(package: str, version: str | None, said: str, fix: str) -> None:
    [found] = packages(WANTED, (INSTALLED | {package: version}).get)
    assert found.name == f"package {package}" and found.level is Level.FAIL
    assert said in found.said and fix in found.fix


def test_an_extra_may_be_missing_and_is_a_warning_if_it_is_too_old() -> None:
    [found] = packages(WANTED, (INSTALLED | {"triton": "3.6.0"}).get)
    assert found.level is Level.WARN and found.name == "package triton" and "extra cuda" in found.said


def test_what_developers_need_is_nobody_elses_matter() -> None:
    [found] = packages([*WANTED, 'mypy==2.4.1; extra == "dev"'], (INSTALLED | {"mypy": "0.1"}).get)
    assert found.level is Level.PASS


def test_the_bounds_are_those_of_pyproject() -> None:
    config = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    own = own_requirements()
    assert own[0] == f"python{config['requires-python']}"
    assert {one.partition(">=")[0] for one in config["dependencies"]} <= {one.partition(">=")[0] for one in own}
