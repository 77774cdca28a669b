"""What every benchmark prints."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from headwise.runtime.bench import figures, report
from headwise.workers.errors import InvalidValueError


def test_json_ends_with_the_machine_the_versions_and_what_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    shown = report.table("not printed", ["a"], [["1"]])
    results = [{"case": "x"}, {"case": "y"}]
    report.emit(
        "name", "model", {"tp": 2}, results, [shown], as_json=True, fraction_of_bound={"x": 0.5}, completed_per_s=1.5
    )
    *lines, closing = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == results
    assert closing["benchmark"] == "name" and closing["model"] == "model" and closing["settings"] == {"tp": 2}
    assert closing["machine"] == report.machine() and closing["versions"] == report.versions()
    assert closing["fraction_of_bound"] == {"x": 0.5} and closing["completed_per_s"] == 1.5


def test_without_a_bound_none_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    report.emit("name", "model", {}, [], [], as_json=True)
    assert "fraction_of_bound" not in json.loads(capsys.readouterr().out)


def test_tables_come_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    tables = [report.table("a title", ["first", "second"], [["1", "2"]], "a caption")]
    report.emit("name", "model", {}, [{"case": "x"}], tables, as_json=False)
    out = capsys.readouterr().out
    assert all(word in out for word in ("a title", "first", "second", "a caption", " cores, ", " GiB"))


def test_the_machine_and_its_versions() -> None:
    machine, versions = report.machine(), report.versions()
    assert machine["cpu"] and machine["cores"] >= 1 and machine["memory_gib"] > 0
    assert versions["torch"] == metadata.version("torch") and versions["python"].startswith("3.")


def test_the_cpus_name_where_linux_gives_one(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU: fast\n\nprocessor\t: 1\n")
    assert report._cpu_name(tmp_path / "cpuinfo") == "A CPU: fast"
    assert report._cpu_name(tmp_path / "none")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("torch", "no-such-package-of-ours"))
    assert report.versions().keys() == {"python", "torch"}


def test_a_picture_is_checked_before_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures.check_plot(None)
    figures.check_plot(tmp_path / "out.png")
    with pytest.raises(InvalidValueError, match=r"must end in \.png"):
        figures.check_plot(tmp_path / "out.gif")
    with pytest.raises(InvalidValueError, match="is not there"):
        figures.check_plot(tmp_path / "none" / "out.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidValueError, match=r"--plot=.*pip install 'headwise\[plot\]'"):
        figures.check_plot(tmp_path / "out.png")
    figures.check_plot(None)


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.0123"), (9.876, "9.88"), (123.4, "123"), (1002.9, "1003")])
def test_numbers_in_pictures_have_no_exponent(value: float, text: str) -> None:
    assert figures.short(value) == text
