"""The flags of ``headwise serve`` that hand over prompts: what they ask for, and which of them are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from headwise.runtime.cli import serve as serve_module
from headwise.runtime.cli.handoff import Pools, handoff_fields, pools
from headwise.runtime.cli.options import FlagError
from headwise.workers.errors import HeadwiseError, InvalidValueError

OPTIONS: dict[str, Any] = {"min_tokens": None, "on_failure": "recompute", "host": "127.0.0.1", "shared_memory": True}


def fields(
    role: str | None = None, prefill: str | None = None, decode: str | None = None, token: Path | None = None
) -> dict[str, Any]:
    return handoff_fields(role, prefill, decode, OPTIONS, token)


def test_both_sides_have_settings_of_their_own() -> None:
    found = fields(prefill="tp=1,kv-memory=1GiB", decode="tp=2")
    assert found["prefill"] == {"tensor_parallel_size": 1, "kv_memory": "1GiB"}
    assert (found["tensor_parallel_size"], found["handoff"].role) == (2, "decode")


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        ("2x tp=1", "1x tp=2", Pools(2, 1)),
        ("2x", None, Pools(2, 1)),
        ("2x tp=1", "tp=2", Pools(2, 1)),
        ("tp=1", "3x,tp=2", Pools(1, 3)),
        ("tp=1", "tp=2", None),
        ("a:1", None, None),
        ("2x:1", None, None),
        (None, None, None),
    ],
)
def test_both_sides_may_be_so_many_replicas(prefill: str | None, decode: str | None, expected: Pools | None) -> None:
    assert pools(prefill, decode) == expected
    if expected is not None:
        found = fields(prefill=prefill, decode=decode)
        assert found["prefill"] == ({"tensor_parallel_size": 1} if "tp" in (prefill or "") else {})
        assert found.get("tensor_parallel_size") == (2 if "tp" in (decode or "") else None)
        assert found["handoff"].role == "decode" and found["handoff"].peers == ()


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        ("0x tp=1", None, "--prefill: must be from 1 to 64 replicas, not 0"),
        ("tp=1", "65x tp=1", "--decode: must be from 1 to 64 replicas, not 65"),
        (None, "2x tp=1", "--decode: .*--prefill"),
        ("a:1", "2x tp=1", "--decode: .*--prefill"),
    ],
)
def test_numbers_of_replicas_are_checked(prefill: str | None, decode: str | None, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        pools(prefill, decode)


@pytest.mark.parametrize("peers", ["a:1", "a:1,b-c.d:2", "127.0.0.1:1", "[::1]:50051,[fe80::1%eth0]:1"])
def test_peers_are_named_with_their_ports(peers: str) -> None:
    assert fields(prefill=peers)["handoff"].peers == tuple(peers.split(","))


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"prefill": "::1:50051"}, "--prefill: .*brackets"),
        ({"prefill": "http://a:1"}, "--prefill: .*https"),
        ({"prefill": "a b:1"}, "--prefill"),
        ({"prefill": "a:1,"}, "--prefill"),
        ({"prefill": "a:99999"}, "--prefill"),
        ({"prefill": "a:\u0661"}, "--prefill"),
        ({"prefill": "a:1,a:1"}, "--prefill: names a server twice"),
        ({"prefill": "tp=1,tp=2"}, "--prefill: has tensor_parallel_size twice"),
        ({"prefill": "=1"}, "--prefill"),
        ({"prefill": "2xtp=1"}, '--prefill: has no setting 2xtp; .* "2x tp=1"'),
        ({"prefill": "tp=1", "decode": "2xtp=1"}, '--decode: has no setting 2xtp; .* "2x tp=1"'),
        ({"prefill": ""}, "--role"),
        ({"role": "both"}, "--role: must be prefill or decode"),
        ({"role": "both", "prefill": "a:1"}, "--role: must be prefill or decode"),
        ({"role": "prefill", "prefill": "a:1"}, "--prefill"),
        ({"role": "decode", "prefill": "tp=1"}, "--role"),
        ({"decode": "tp=1"}, "--decode"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: dict[str, Any], flag: str) -> None:
    with pytest.raises(FlagError, match=flag):
        fields(**given)


@pytest.mark.parametrize("settings", ["tp=x", "bogus=1", "tp=", "max-num-seqs=0"])
def test_a_wrong_setting_of_a_side_names_the_flag(settings: str) -> None:
    for given in ({"prefill": settings}, {"prefill": "tp=1", "decode": settings}):
        with pytest.raises(InvalidValueError) as error:
            fields(**given)
        assert error.value.field.startswith(f"--{list(given)[-1]}[")


@pytest.mark.parametrize("text", ["", "\n", "secret-1 secret-2", "first-token-1234\nsecond-token-123", "t\u00f6ken"])
def test_a_token_file_holds_one_token_which_no_error_shows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(FlagError) as error:
        fields(prefill="a:1", token=path)
    assert not text.strip() or text.split()[0] not in str(error.value)


@pytest.fixture
def refused() -> Callable[..., str]:
    """The error of a command line of ``headwise serve``, which starts nothing."""
    app = typer.Typer()
    app.command()(serve_module.serve)

    def run(*flags: str) -> str:
        result = CliRunner().invoke(app, ["--model", "no such model", *flags])
        assert isinstance(result.exception, HeadwiseError), result.output
        return str(result.exception)

    return run


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ([], ["--handoff-min-tokens", "5"]),
        ([], ["--on-handoff-failure", "fail"]),
        ([], ["--handoff-ca", "x.pem"]),
        (["--prefill", "tp=1"], ["--handoff-host", "192.0.2.1"]),
        (["--prefill", "tp=1"], ["--handoff-token-file", "x"]),
        (["--role", "prefill"], ["--handoff-min-tokens", "5"]),
        (["--role", "prefill"], ["--handoff-token-file", "x"]),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(
    refused: Callable[..., str], given: list[str], idle: list[str]
) -> None:
    assert refused(*given, *idle).startswith(f"{idle[0]}: ")


def test_a_wrong_word_names_the_flag(refused: Callable[..., str]) -> None:
    assert refused("--prefill", "a:1", "--on-handoff-failure", "retry").startswith("on_handoff_failure=")
