from __future__ import annotations

import pytest

from headwise.runtime.jobs.command import job_environment, relative_output, secret_names, shell_command
from headwise.workers.errors import InvalidValueError


def test_words_reach_the_command_as_they_are() -> None:
    words = ["generate", "it's $HOME; `x`", "--stop", ""]
    assert shell_command(words, False) == "headwise generate 'it'\"'\"'s $HOME; `x`' --stop ''"
    assert shell_command(["plan"], True) == "python3 -m headwise.runtime.cli plan"


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["serve"], "60"),
        (["serve", "--drain-timeout", "100"], "130"),
        (["serve", "--drain-timeout=0.5"], "31"),
        (["serve", "--drain-timeout", "1", "--drain-timeout", "2"], "32"),
        (["serve", "--drain-timeout", "long"], "60"),
        (["serve", "--drain-timeout"], "60"),
        (["serve", "--drain-timeout", "nan"], "60"),
    ],
)
def test_ray_waits_longer_than_the_drain(words: list[str], seconds: str) -> None:
    assert job_environment([], words) == {"RAY_JOB_STOP_WAIT_TIME_S": seconds}


def test_variables_are_passed_on() -> None:
    assert job_environment(["A=b=c", "B="], ["plan"]) == {"RAY_JOB_STOP_WAIT_TIME_S": "60", "A": "b=c", "B": ""}
    assert job_environment(["RAY_JOB_STOP_WAIT_TIME_S=5"], ["plan"]) == {"RAY_JOB_STOP_WAIT_TIME_S": "5"}


@pytest.mark.parametrize("given", [["secret"], ["=secret"], ["1A=secret"], ["A B=secret"], ["A=1", "A=secret"]])
def test_a_variable_that_is_wrong_is_refused_without_its_value(given: list[str]) -> None:
    with pytest.raises(InvalidValueError, match="--env") as refused:
        job_environment(given, ["plan"])
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("value", ["", "-1", "1.5", "1m"])
def test_a_time_to_stop_that_ray_cannot_read_is_refused(value: str) -> None:
    with pytest.raises(InvalidValueError, match="--env='RAY_JOB_STOP_WAIT_TIME_S': must be a whole number of seconds"):
        job_environment([f"RAY_JOB_STOP_WAIT_TIME_S={value}"], ["plan"])


def test_secrets_are_known_by_their_names() -> None:
    names = ["HF_TOKEN", "db_password", "API_KEY", "OMP_NUM_THREADS", "KEYBOARD", "AWS_SECRET_ACCESS_KEY"]
    found = secret_names(dict.fromkeys(names, ""))
    assert found == ["HF_TOKEN", "db_password", "API_KEY", "AWS_SECRET_ACCESS_KEY"]


def test_an_output_that_depends_on_the_folder() -> None:
    assert relative_output(["generate", "--output", "a"]) == relative_output(["generate", "--output=a"]) == "a"
    assert relative_output(["generate", "--output", "/a"]) == relative_output(["serve"]) == ""
