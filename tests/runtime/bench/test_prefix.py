"""What the prefix cache saves and costs: that a reading is of what it says, and the command from end to end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from headwise.runtime import LLM
from headwise.runtime.bench import prefix
from headwise.runtime.bench.prefix import (
    MissCosts,
    MissRun,
    UnexpectedHitError,
    hit_lengths,
    manager_cost,
    measure_hits,
    measure_misses,
    measure_restore,
)
from headwise.runtime.bench.workload import prompts
from headwise.runtime.kv.cost import RestoreCost
from headwise.workers.errors import InvalidValueError
from tests.runtime.conftest import LOCAL, Run

ENGINE: dict[str, Any] = {"executor": "local", "kv_memory": "8MiB", "cpus_per_rank": 1.0, "quiet": True}
PNG = b"\x89PNG\r\n\x1a\n"
FEW = ["--prompt-tokens", "100", "--repeats", "1", "--batch", "2", "--pairs", "1"]


@pytest.fixture
def bar() -> tqdm[Any]:
    return tqdm(file=io.StringIO())


@pytest.fixture(scope="module")
def small_llm(checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    """Its device has room for one prompt of 100 tokens, and host memory for several."""
    with LLM(checkpoint("gqa"), max_model_len=101, num_blocks=7, host_kv_memory="4MiB", **ENGINE) as made:
        yield made


@pytest.fixture(autouse=True)
def a_short_prompt_for_the_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "manager_cost", lambda block_size: manager_cost(1600, block_size))


@pytest.fixture
def restoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Decides whether restoring is worth it, which of a model this small is left to chance."""
    return lambda worth: monkeypatch.setattr(RestoreCost, "worth", lambda *_: worth)


def test_hits_are_whole_blocks_and_never_the_last() -> None:
    assert hit_lengths(2048, 16) == [0, 512, 1024, 1536, 2032]
    assert hit_lengths(2049, 16) == [0, 512, 1024, 1536, 2048]
    assert hit_lengths(100, 16) == [0, 16, 48, 64, 96]
    assert hit_lengths(17, 16) == [0, 16] and hit_lengths(32, 16) == [0, 16]
    with pytest.raises(InvalidValueError, match="--prompt-tokens=16: must be more than a block of 16"):
        hit_lengths(16, 16)


def test_a_reading_finds_what_was_put_there(llm: LLM, bar: tqdm[Any]) -> None:
    hits = hit_lengths(200, 16)
    before = llm.stats()["prefix_cache"]["hit_tokens"]
    seconds = measure_hits(llm, prompts(2 * len(hits) + 1, 200, 256), hits, bar)
    assert [*seconds] == hits and {len(readings) for readings in seconds.values()} == {2}
    assert all(reading > 0 for readings in seconds.values() for reading in readings)
    assert llm.stats()["prefix_cache"]["hit_tokens"] - before == 2 * sum(hits)
    assert bar.n == 2 * len(hits)


def test_a_reading_that_found_something_else_is_an_error(checkpoint: Callable[..., Path], bar: tqdm[Any]) -> None:
    with (
        LLM(checkpoint("gqa"), enable_prefix_caching=False, **ENGINE) as llm,
        pytest.raises(UnexpectedHitError, match=r"0 tokens of 100 were found .* where 48 should be; .*--kv-memory"),
    ):
        measure_hits(llm, prompts(2, 100, 256), [48], bar)


def test_a_prompt_that_lost_its_memory_is_restored(
    small_llm: LLM, bar: tqdm[Any], restoring: Callable[[bool], None]
) -> None:
    restoring(True)
    restores = measure_restore(small_llm, prompts(6, 100, 256), 96, bar)
    assert (len(restores.restored), len(restores.computed), bar.n) == (2, 2, 2)
    assert min(*restores.restored, *restores.computed) > 0


def test_a_prompt_that_is_faster_to_compute_is_not_counted_as_restored(
    small_llm: LLM, bar: tqdm[Any], restoring: Callable[[bool], None]
) -> None:
    restoring(False)
    restores = measure_restore(small_llm, prompts(4, 100, 256), 96, bar)
    assert restores.restored == [] and len(restores.computed) == 1


def test_a_prompt_that_still_is_on_the_device_is_no_reading(llm: LLM, bar: tqdm[Any]) -> None:
    with pytest.raises(UnexpectedHitError, match="96 tokens were still on the device"):
        measure_restore(llm, prompts(2, 100, 256), 96, bar)


def test_a_restore_of_a_part_is_no_reading(small_llm: LLM, bar: tqdm[Any], restoring: Callable[[bool], None]) -> None:
    restoring(True)
    with pytest.raises(UnexpectedHitError, match=r"96 tokens of 100 .* where 80 should be"):
        measure_restore(small_llm, prompts(2, 100, 256), 80, bar)


def test_pairs_run_with_the_cache_and_without(checkpoint: Callable[..., Path], bar: tqdm[Any]) -> None:
    costs = measure_misses(checkpoint("gqa"), ENGINE, prompts(2 * 4, 42, 256), 2, bar)
    assert len(costs.pairs) == 2 and bar.n == 4
    for pair in costs.pairs:
        for run in pair:
            assert 0 < run.engine_s < run.seconds


def test_a_pair_is_with_the_cache_and_then_without(
    checkpoint: Callable[..., Path], bar: tqdm[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def run(llm: LLM, rows: list[list[int]]) -> MissRun:
        order.append(llm.config.enable_prefix_caching)
        return MissRun(2.0 if order[-1] else 1.0, 0.0)

    monkeypatch.setattr(prefix, "_run_batch", run)
    costs = measure_misses(checkpoint("gqa"), ENGINE, prompts(4, 42, 256), 1, bar)
    assert costs.pairs == [(MissRun(2.0, 0.0), MissRun(1.0, 0.0))] * 2
    assert order == [False, True, True, False, False, True]  # they take turns in who is first


def test_prompts_that_hit_are_no_misses(checkpoint: Callable[..., Path], bar: tqdm[Any]) -> None:
    rows = prompts(1, 42, 256) * 3
    with pytest.raises(UnexpectedHitError, match=r"32 tokens of 42 .* where 0 should be"):
        measure_misses(checkpoint("gqa"), ENGINE, rows, 1, bar)


def test_the_cost_of_misses_is_that_of_the_pair_in_the_middle() -> None:
    pairs = [(MissRun(2.0, 0.04), MissRun(1.0, 0.02)), (MissRun(1.25, 0.03), MissRun(1.0, 0.02))]
    costs = MissCosts([*pairs, (MissRun(1.0, 0.02), MissRun(1.0, 0.02))])
    assert costs.ratio == pytest.approx(0.8) and costs.engine_share == pytest.approx(0.01)


def test_the_cache_alone() -> None:
    found = manager_cost(tokens=1600, repeats=2)
    assert [*found] == ["digests", "match", "insert", "release", "hit"]
    assert all(0 < us < 1000 for us in found.values())


def test_json_and_a_picture(
    headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path, restoring: Callable[[bool], None]
) -> None:
    restoring(True)
    picture, model = tmp_path / "out.png", str(checkpoint("gqa"))
    flags = [*FEW, "--host", "4MiB", "--repeats", "2", *LOCAL]
    code, out, _ = headwise("bench", "prefix", "--model", model, *flags, "--json", "--plot", str(picture))
    assert code == 0
    *results, closing = [json.loads(line) for line in out.splitlines()]
    assert [result["case"] for result in results] == [*["device"] * 5, "host", "no hits", "manager"]
    *device, host, misses, manager = results
    assert [result["hit_tokens"] for result in device] == [0, 16, 48, 64, 96] and host["hit_tokens"] == 96
    for result in device:
        assert len(result["readings_s"]) == 2 and result["ttft_s"] > 0
        assert result["times"] == pytest.approx(device[0]["ttft_s"] / result["ttft_s"], rel=0.05)
    assert misses["ratio"] > 0 and len(misses["ratios"]) == 1 and misses["batch"] == 2
    assert closing["benchmark"] == "prefix" and closing["settings"]["prompt_tokens"] == 100
    assert closing["restore_s"] == host["ttft_s"] and closing["recompute_s"] > 0
    assert closing["ttft_times"] == device[-1]["times"] and closing["miss_ratio"] == misses["ratio"]
    parts = manager["us_per_token"]
    assert closing["manager_us_per_token"] == pytest.approx(
        parts["digests"] + parts["match"] + parts["insert"], abs=1e-3
    )
    assert picture.read_bytes().startswith(PNG)


def test_a_table_says_that_nothing_was_restored(
    headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path, restoring: Callable[[bool], None]
) -> None:
    restoring(False)
    flags = [*FEW, "--host", "4MiB", *LOCAL, "--plot", str(tmp_path / "out.svg")]
    code, out, _ = headwise("bench", "prefix", "--model", str(checkpoint("gqa")), *flags)
    words = ("on the device", "in host memory", "computed", "times faster", "without", "ratio", "digests")
    assert code == 0 and all(word in out for word in words)


def test_the_tiny_model_without_what_can_be_left_out(
    headwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flags = ["--prompt-tokens", "64", "--repeats", "1", "--host", "none", "--pairs", "0", *LOCAL, "--json"]
    code, out, _ = headwise("bench", "prefix", *flags)
    assert code == 0
    *results, closing = [json.loads(line) for line in out.splitlines()]
    assert {result["case"] for result in results} == {"device", "manager"} and closing["model"] == "tiny"
    assert "restore_s" not in closing and "miss_ratio" not in closing
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []  # the tiny model is gone


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt-tokens", "16"], "--prompt-tokens=16"),
        (["--repeats", "0"], "--repeats"),
        (["--host", "lots"], "--host='lots'"),
        (["--batch", "0"], "--batch"),
        (["--pairs", "-1"], "--pairs"),
        (["--pipeline-depth", "3"], "pipeline_depth=3"),
    ],
)
def test_bad_flags_exit_with_2_before_anything_is_measured(
    headwise: Run, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.setattr(LLM, "__init__", lambda *_, **__: pytest.fail("an engine was started"))
    code, out, err = headwise("bench", "prefix", "--model", str(checkpoint("gqa")), *flags)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_a_picture_without_matplotlib_is_refused(headwise: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(prefix, "model_directory", lambda *_: pytest.fail("a model was made"))
    code, out, err = headwise("bench", "prefix", "--plot", "out.png")
    assert (code, out) == (2, "") and "pip install 'headwise[plot]'" in err


@pytest.mark.parametrize("command", [["throughput", "--max-model-len", "256", "--no-bound"], ["kv-cache"]])
def test_benchmarks_that_repeat_their_prompts_do_without_a_prefix_cache(
    headwise: Run, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    seen = []
    start = LLM.__init__

    def watched(self: LLM, *arguments: Any, **settings: Any) -> None:
        seen.append(settings["enable_prefix_caching"])
        start(self, *arguments, **settings)

    monkeypatch.setattr(LLM, "__init__", watched)
    code, _, _ = headwise("bench", *command, "--model", str(checkpoint("gqa")), "--tokens", "4", *LOCAL)
    assert code == 0 and seen == [False]


def test_help_lists_it(headwise: Run) -> None:
    code, out, _ = headwise("bench", "--help")
    assert code == 0 and "prefix" in out
