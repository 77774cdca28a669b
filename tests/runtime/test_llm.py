"""The driver API on small checkpoints: prompts, parameters, streams, threads, failures and the end."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from headwise.cluster.group import ShardGroupDied
from headwise.runtime import LLM, OutputDelta, RequestOutput, SamplingParams, start
from headwise.runtime.config import EngineConfig, HandoffConfig
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.generation import Generation, GenerationFactory
from headwise.runtime.engine.loop import EngineStoppedError
from headwise.runtime.engine.recovery import Recovery
from headwise.runtime.engine.scheduler import Scheduler
from headwise.runtime.inputs.tokenizer import Tokenizer, load_tokenizer
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import StepOutput
from tests.checkpoints import reference_model, write_checkpoint
from tests.conftest import MakeLLM
from tests.runtime.inputs.test_tokenizer import byte_level
from tests.thread_group import ThreadShardGroup, thread_groups

DEADLINE_S = 60.0
EOS = 2
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a byte-level tokenizer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("spoken"), 8, 4, vocab_size=280)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(spoken: Path) -> Tokenizer:
    loaded = load_tokenizer(spoken)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def llm(spoken: Path, request: pytest.FixtureRequest) -> Any:
    depth = request.param
    with LLM(spoken, executor="local", cpus_per_rank=1, kv_memory="16MiB", pipeline_depth=depth, quiet=True) as llm:
        yield llm


def only(tokenizer: Tokenizer, text: str, **params: Any) -> SamplingParams:
    """Sampling from nothing but the characters' tokens."""
    bias = dict.fromkeys([i for char in text for i in tokenizer.encode(char)], 100.0)
    return SamplingParams(**{"logit_bias": bias, "seed": 3, "max_tokens": 30, "ignore_eos": True} | params)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


# Prompts and parameters


def test_a_string_and_its_token_ids_are_the_same_prompt(llm: LLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello you")
    [text], [listed], [nested] = (llm.generate(prompt, GREEDY) for prompt in ("hello you", ids, [ids]))
    assert tokens([text]) == tokens([listed]) == tokens([nested])
    assert (text.prompt, listed.prompt) == ("hello you", None)
    assert text.prompt_token_ids == ids and text.finished and text.num_cached_tokens == 0
    assert text.outputs[0].text == tokenizer.decode(text.outputs[0].token_ids)
    assert text.outputs[0].finish_reason == "length" and text.outputs[0].stop_reason is None
    assert 0 < text.metrics.arrival <= text.metrics.first_scheduled <= text.metrics.first_token
    assert text.metrics.first_token <= text.metrics.finished and text.metrics.time_to_first_token > 0


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["a long one that takes longer" * 4, [5, 6], "b", [7]]
    params = [GREEDY.clone(max_tokens=count) for count in (20, 3, 9, 1)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == [prompts[0], None, "b", None]
    assert [len(ids) for ids in tokens(outputs)] == [20, 3, 9, 1]
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        assert tokens(llm.generate(prompt, param)) == tokens([output])


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_default_params_are_those_of_sampling_params(llm: LLM) -> None:
    assert len(llm.generate([5, 6])[0].outputs[0].token_ids) <= 16


def test_chat_uses_the_template(llm: LLM, tokenizer: Tokenizer) -> None:
    one, two = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "you"}]
    expected = llm.generate(["user:hi ", "user:you "], GREEDY)
    assert tokens(llm.chat(one, GREEDY)) == tokens(expected[:1])
    both = llm.chat([one, two], GREEDY)
    assert tokens(both) == tokens(expected) and both[1].prompt_token_ids == tokenizer.encode("user:you ")
    assert [t for delta in llm.stream(two, GREEDY) for t in delta.token_ids] == tokens(expected)[1]


def test_samples_of_a_prompt_differ_and_can_be_repeated(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=9, max_tokens=20, ignore_eos=True)
    [first], [again] = llm.generate([5, 6], params), llm.generate([5, 6], params)
    samples = [sample.token_ids for sample in first.outputs]
    assert len({tuple(sample) for sample in samples}) == 3
    assert [sample.index for sample in first.outputs] == [0, 1, 2]
    assert samples == [sample.token_ids for sample in again.outputs]
    assert samples[0] == tokens(llm.generate([5, 6], params.clone(n=1)))[0]


def test_an_llms_seed_makes_it_repeatable(spoken: Path, thread_llm: MakeLLM) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    runs = []
    for seed in (5, 5, 6):
        llm = thread_llm(spoken, seed=seed)
        runs.append(tokens(llm.generate([[5, 6], [5, 6]], params)) + tokens(llm.generate([5, 6], params)))
    assert runs[0] == runs[1] and runs[0] != runs[2]
    assert len({tuple(ids) for ids in runs[0]}) == 3


@pytest.mark.parametrize("depth", [1, 2])
def test_max_tokens_none_goes_to_the_models_length(spoken: Path, thread_llm: MakeLLM, depth: int) -> None:
    llm = thread_llm(spoken, max_model_len=40, pipeline_depth=depth)
    for max_tokens in (None, 39, 40):
        [output] = llm.generate([5] * 10, GREEDY.clone(max_tokens=max_tokens))
        assert len(output.outputs[0].token_ids) == 30 and output.outputs[0].finish_reason == "length"
    [output] = llm.generate([5] * 39, GREEDY)
    assert len(output.outputs[0].token_ids) == 1


# How it ends


def test_a_stop_string_is_found_across_tokens(llm: LLM, tokenizer: Tokenizer) -> None:
    params = only(tokenizer, "abc")
    [free] = llm.generate("x", params)
    text = free.outputs[0].text
    assert text is not None and len(text) == 30
    stop = text[11:14]
    at = text.find(stop)
    [ended] = llm.generate("x", params.clone(stop=[stop, "never"]))
    sample = ended.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (text[:at], "stop", stop)
    assert sample.token_ids == free.outputs[0].token_ids[: at + 3]
    [kept] = llm.generate("x", params.clone(stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: at + 3]
    held = [delta.text for delta in llm.stream("x", params.clone(stop=stop))]
    assert "".join(held) == text[:at]


def test_a_stop_string_on_the_last_token_is_a_stop(llm: LLM, tokenizer: Tokenizer) -> None:
    params = only(tokenizer, "abcdefgh", max_tokens=3, seed=1)
    text = llm.generate("x", params)[0].outputs[0].text
    assert text is not None
    sample = llm.generate("x", params.clone(stop=text[1:]))[0].outputs[0]
    assert (sample.text, sample.finish_reason) == (text[: text.find(text[1:])], "stop")
    sample = llm.generate("x", params.clone(stop=text[2] + "?"))[0].outputs[0]
    assert (sample.text, sample.finish_reason) == (text, "length"), "text that was held back is missing"


def test_stop_token_ids(llm: LLM, tokenizer: Tokenizer) -> None:
    free = llm.generate([5, 6], GREEDY)[0].outputs[0]
    stop = free.token_ids[4]
    end = free.token_ids.index(stop) + 1
    sample = llm.generate([5, 6], GREEDY.clone(stop_token_ids=[stop]))[0].outputs[0]
    assert sample.token_ids == free.token_ids[:end]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.text == tokenizer.decode(free.token_ids[: end - 1])
    kept = llm.generate([5, 6], GREEDY.clone(stop_token_ids=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == tokenizer.decode(free.token_ids[:end])


def test_end_of_sequence_min_tokens_and_ignore_eos(llm: LLM) -> None:
    wants_eos = SamplingParams(temperature=0, max_tokens=10, logit_bias={EOS: 100.0})
    sample = llm.generate([5, 6], wants_eos)[0].outputs[0]
    assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == ([EOS], "stop", None)
    sample = llm.generate([5, 6], wants_eos.clone(ignore_eos=True))[0].outputs[0]
    assert (sample.token_ids, sample.finish_reason) == ([EOS] * 10, "length")
    sample = llm.generate([5, 6], wants_eos.clone(min_tokens=4))[0].outputs[0]
    assert len(sample.token_ids) == 5 and sample.token_ids[4] == EOS and EOS not in sample.token_ids[:4]


def test_logprobs_are_those_of_transformers(llm: LLM, spoken: Path) -> None:
    prompt = [5, 6, 7]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=5, logprobs=3, ignore_eos=True)
    sample = llm.generate(prompt, params)[0].outputs[0]
    ids = torch.tensor([prompt + sample.token_ids])
    with torch.inference_mode():
        logits_TV = reference_model(spoken)(ids).logits[0]
    expected_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    assert sample.logprobs is not None and len(sample.logprobs) == 5
    for chosen, table, expected_V in zip(sample.token_ids, sample.logprobs, expected_TV, strict=True):
        top = expected_V.topk(3).indices.tolist()
        assert set(table) == {chosen, *top}
        for token_id, entry in table.items():
            assert entry.logprob == pytest.approx(expected_V[token_id].item(), abs=1e-3)
            assert entry.rank == 1 + (expected_V > expected_V[token_id]).sum().item()
    assert llm.generate(prompt, GREEDY)[0].outputs[0].logprobs is None
    streamed = [delta.logprobs for delta in llm.stream(prompt, params)]
    assert streamed == sample.logprobs


# Without a tokenizer, quietly


def test_without_a_tokenizer_there_is_no_text(checkpoint: Callable[..., Path], thread_llm: MakeLLM) -> None:
    llm = thread_llm(checkpoint())
    [output] = llm.generate([5, 6], GREEDY.clone(logprobs=1))
    assert output.outputs[0].text is None and len(output.outputs[0].token_ids) == 12
    assert {entry.decoded_token for table in output.outputs[0].logprobs or [] for entry in table.values()} == {None}
    assert all(delta.text is None for delta in llm.stream([5, 6], GREEDY))


def test_the_bar_is_on_stderr_and_can_be_turned_off(spoken: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LLM(spoken, executor="local", kv_memory="16MiB") as llm:
        started = capfd.readouterr()
        assert started.out == "" and "KV memory" in started.err
        llm.generate([5, 6], GREEDY, use_tqdm=False)
        assert capfd.readouterr() == ("", "")
        llm.generate([5, 6], GREEDY)
        shown = capfd.readouterr()
        assert shown.out == "" and "generating" in shown.err
    assert capfd.readouterr() == ("", "")


# Streams


@pytest.mark.parametrize("alphabet", ["abc", "😀你é", "😀a"])
def test_a_streams_text_is_that_of_generate(llm: LLM, tokenizer: Tokenizer, alphabet: str) -> None:
    params = only(tokenizer, alphabet, max_tokens=60)
    whole = llm.generate("😀 you", params)[0].outputs[0]
    deltas = list(llm.stream("😀 you", params))
    pieces = [delta.text or "" for delta in deltas]
    assert whole.text is not None and "".join(pieces) == whole.text
    assert sum(piece.count("\ufffd") for piece in pieces) == whole.text.count("\ufffd")
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas] == [None] * 59 + ["length"]


def test_a_stream_of_samples_tells_them_apart(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=4, max_tokens=10, ignore_eos=True)
    [whole] = llm.generate("x", params)
    texts = ["", ""]
    for delta in llm.stream("x", params):
        texts[delta.index] += delta.text or ""
    assert texts == [sample.text for sample in whole.outputs]


def test_leaving_a_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream([5] * 40, GREEDY.clone(max_tokens=400))
    assert next(stream).token_ids
    stream.close()
    stats = llm.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"] and stats["num_running"] == 0
    with pytest.raises(KeyError):
        for _ in llm.stream([5] * 40, GREEDY.clone(max_tokens=400)):
            raise KeyError
    assert llm.stats()["num_running"] == 0


def test_a_stream_may_be_collected_on_the_engines_own_thread(llm: LLM) -> None:
    """The garbage collector runs on whichever thread it likes; the engine must not wait for itself."""
    stream = llm.stream([5] * 40, GREEDY.clone(max_tokens=400))
    next(stream)
    llm._loop.run(lambda engine: stream.close(), timeout_s=DEADLINE_S)
    assert llm.stats()["num_running"] == 0


def test_a_stream_that_was_never_begun_costs_nothing(llm: LLM) -> None:
    stream = llm.stream([5], GREEDY)
    assert llm.stats()["num_waiting"] == llm.stats()["num_running"] == 0
    stream.close()


# Threads


class PacedGroup(ThreadShardGroup):
    """A step takes at least 5 ms, so that 400 tokens leave time to do something meanwhile."""

    def collect(self) -> StepOutput:
        threading.Event().wait(0.005)
        return super().collect()


@pytest.fixture
def paced(spoken: Path, monkeypatch: pytest.MonkeyPatch, thread_llm: MakeLLM) -> LLM:
    monkeypatch.setattr(start, "make_factory", thread_groups(PacedGroup))
    return thread_llm(spoken)


def test_abort_of_a_stream_from_another_thread(paced: LLM) -> None:
    stream = paced.stream([5, 6], GREEDY.clone(max_tokens=400), request_id="mine")
    deltas: list[OutputDelta] = [next(stream)]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(paced.abort, "mine").result(DEADLINE_S)
    deltas += stream
    assert deltas[-1].finish_reason == "abort" and deltas[-1].request_id == "mine"
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert 1 <= sum(len(delta.token_ids) for delta in deltas) < 400
    assert paced.stats()["num_free_blocks"] == paced.stats()["num_blocks"]
    paced.abort("mine")
    paced.abort("never was")


def test_abort_of_a_generate_from_another_thread(paced: LLM) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(paced.generate, [[5, 6], [7, 8]], [GREEDY.clone(max_tokens=400), GREEDY])
        wait_until(lambda: paced.stats()["num_running"] == 2)
        paced.abort("request-0")
        aborted, other = running.result(DEADLINE_S)
    assert aborted.outputs[0].finish_reason == "abort" and len(aborted.outputs[0].token_ids) < 400
    assert other.outputs[0].finish_reason == "length"


def test_a_request_id_that_still_runs_is_refused(paced: LLM) -> None:
    first = paced.stream([5, 6], GREEDY.clone(max_tokens=100), request_id="same")
    next(first)
    with pytest.raises(ValueError, match=r"request_id='same'.*still runs"):
        next(paced.stream([7], GREEDY, request_id="same"))
    assert sum(len(delta.token_ids) for delta in first) == 99
    assert sum(len(delta.token_ids) for delta in paced.stream([7], GREEDY, request_id="same")) == 12


@pytest.mark.parametrize("name", [["a", "b"], {"a": 1}, 7, None, b"a"])
def test_names_of_requests_that_are_no_text_are_refused_and_end_nothing(llm: LLM, name: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"request_id=.* must be a string"):
        llm.abort(name)
    if name is not None:  # which asks for a name
        with pytest.raises(InvalidValueError, match=r"request_id=.* must be a string"):
            llm.stream([5, 6], GREEDY, request_id=name)
    assert tokens(llm.generate([[5, 6]], GREEDY, use_tqdm=False))[0]


def test_many_threads_generate_at_once(llm: LLM) -> None:
    prompts = [[5 + i] * (1 + 7 * i) for i in range(8)]
    expected = [tokens(llm.generate(prompt, GREEDY)) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: tokens(llm.generate(prompt, GREEDY)), prompts, timeout=DEADLINE_S))
    assert found == expected


def test_stats(llm: LLM) -> None:
    before = llm.stats()
    llm.generate([5, 6], GREEDY)
    after = llm.stats()
    assert after["num_generated_tokens"] - before["num_generated_tokens"] == 12
    assert after["num_steps"] - before["num_steps"] == 12
    assert after["num_free_blocks"] == after["num_blocks"] > 0
    assert all(after["engine_seconds"][part] > seconds for part, seconds in before["engine_seconds"].items())
    assert after["engine_cpu_seconds"] > before["engine_cpu_seconds"]
    assert len(after["shard_pids"]) == len(after["kv_bytes_per_rank"]) == 1
    # 2 layers of keys and values, 4 KV heads of 16 float32 for each token of each block.
    assert after["kv_bytes_per_rank"] == [after["num_blocks"] * 16 * 2 * 2 * 4 * 16 * 4]


# Ends and failures


def test_close_may_be_repeated_and_ends_everything(spoken: Path, thread_llm: MakeLLM) -> None:
    llm = thread_llm(spoken)
    stream = llm.stream([5, 6], GREEDY.clone(max_tokens=400))
    next(stream)
    for _ in range(2):
        llm.close()
    for use in (llm.stats, lambda: llm.generate([5, 6], GREEDY), lambda: llm.abort("x"), lambda: list(stream)):
        with pytest.raises(EngineStoppedError, match="closed"):
            use()
    stream.close()


def test_leaving_a_stream_after_close_raises_nothing(spoken: Path, thread_llm: MakeLLM) -> None:
    llm = thread_llm(spoken)
    stream = llm.stream([5, 6], GREEDY.clone(max_tokens=400))
    next(stream)
    llm.close()
    stream.close()


def test_close_reaches_a_generate_that_runs(paced: LLM) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(paced.generate, [5, 6], GREEDY.clone(max_tokens=400))
        wait_until(lambda: paced.stats()["num_running"] == 1)
        paced.close()
        with pytest.raises(EngineStoppedError):
            running.result(DEADLINE_S)


def test_a_forgotten_llm_ends_its_thread(spoken: Path, thread_llm: MakeLLM) -> None:
    llm = LLM(spoken, executor="local", kv_memory="16MiB", quiet=True)
    thread = llm._loop._thread
    llm.generate([5, 6], GREEDY)
    del llm
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


class DyingGroup(PacedGroup):
    steps_left = 10

    def collect(self) -> StepOutput:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise ShardGroupDied(1, "node-b", "killed by signal 9")
        return super().collect()


def test_a_shards_death_reaches_every_caller_now_and_later(
    spoken: Path, monkeypatch: pytest.MonkeyPatch, thread_llm: MakeLLM
) -> None:
    monkeypatch.setattr(start, "make_factory", thread_groups(DyingGroup))
    llm = thread_llm(spoken, pipeline_depth=2, on_shard_death="fail")
    long = GREEDY.clone(max_tokens=400)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(llm.generate, [5 + i], long) for i in range(3)]
        runs.append(pool.submit(lambda: list(llm.stream([9], long))))
        for run in runs:
            with pytest.raises(ShardGroupDied, match="rank 1 on node node-b died: killed by signal 9"):
                run.result(DEADLINE_S)
    for use in (llm.stats, lambda: llm.generate([5], long), lambda: list(llm.stream([5], long))):
        with pytest.raises(ShardGroupDied):
            use()
    llm.close()


def test_a_death_that_stats_meets_reaches_the_others_too(
    spoken: Path, monkeypatch: pytest.MonkeyPatch, thread_llm: MakeLLM
) -> None:
    class DeadOnQuery(PacedGroup):
        def query(self, method: str) -> list[Any]:
            if method == "stats":
                raise ShardGroupDied(0, "node-a", "gone")
            return super().query(method)

    monkeypatch.setattr(start, "make_factory", thread_groups(DeadOnQuery))
    llm = thread_llm(spoken, on_shard_death="fail")
    stream = llm.stream([5], GREEDY.clone(max_tokens=400))
    next(stream)
    with pytest.raises(ShardGroupDied):
        llm.stats()
    with pytest.raises(ShardGroupDied):
        list(stream)


@pytest.mark.parametrize(
    ("method", "use"),
    [("complete", lambda engine: engine.query_shards("stats")), ("finish", lambda engine: engine.abort("one"))],
    ids=["stats", "abort"],
)
def test_books_that_go_wrong_in_a_call_end_every_stream(
    paced: LLM, monkeypatch: pytest.MonkeyPatch, method: str, use: Callable[[Engine], object]
) -> None:
    """``stats`` processes the steps in flight, and ``abort`` ends a request: neither may lose what it was at."""
    streams = [paced.stream([5], GREEDY.clone(max_tokens=400), request_id=name) for name in ("one", "other")]
    for stream in streams:
        next(stream)

    def fail(*_: object) -> None:
        monkeypatch.undo()  # once only: no step may fail too
        raise KeyError("block 7")

    def call(engine: Engine) -> None:
        monkeypatch.setattr(Scheduler, method, fail)
        use(engine)

    with pytest.raises(EngineStoppedError, match="the engine has failed: KeyError"):
        paced._loop.run(call, DEADLINE_S)
    for stream in streams:
        with pytest.raises(EngineStoppedError, match="the engine has failed: KeyError"):
            list(stream)


@pytest.mark.parametrize(("tp", "attention", "depth"), [(1, "reference", 1), (1, "cpu", 2), (2, None, 2)])
def test_logits_that_are_not_finite_fail_one_request_alone(
    tmp_path: Path, thread_llm: MakeLLM, tp: int, attention: str | None, depth: int
) -> None:
    bad = 7
    directory = write_checkpoint(tmp_path, 8, 4, tie_word_embeddings=False)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][bad] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    llm = thread_llm(directory, tensor_parallel_size=tp, attention=attention, pipeline_depth=depth, num_blocks=32)
    params = GREEDY.clone(logit_bias={bad: -100.0}, max_tokens=20)
    good = [[10, 11, 12], [20] * 30, [31, 32]]
    expected = tokens(llm.generate(good, params))
    outputs = llm.generate([good[0], [bad] * 100, good[1], [5] * 40 + [bad], good[2]], params)
    assert tokens(outputs) == [expected[0], [], expected[1], [], expected[2]]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length", "error", "length"]
    assert outputs[1].error == "the model's logits are not finite" and outputs[0].error is None
    *_, last = llm.stream([bad] * 100, params)
    assert (last.finish_reason, last.error) == ("error", "the model's logits are not finite")
    assert [delta.error for delta in llm.stream(good[0], params)] == [None] * 20
    # Blocks that held what is no number hold other requests now, and must not spoil them.
    assert tokens(llm.generate(good * 4, params)) == expected * 4
    assert llm.stats()["num_free_blocks"] == 32


@pytest.mark.thorough
def test_smollm2_answers(smollm2: Path) -> None:
    with LLM(smollm2, executor="local", max_model_len=256, kv_memory="256MiB", quiet=True) as llm:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        sample = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)[0].outputs[0]
        assert sample.text is not None and "Paris" in sample.text and "<|im_" not in sample.text
        [stopped] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24, stop="ari"), use_tqdm=False)
        assert stopped.outputs[0].text == sample.text[: sample.text.find("ari")]
        assert (
            "".join(d.text or "" for d in llm.stream("😀 and 👍🏽:", GREEDY))
            == llm.generate("😀 and 👍🏽:", GREEDY, use_tqdm=False)[0].outputs[0].text
        )


def test_the_signature_is_the_config() -> None:
    parameters = dict(inspect.signature(LLM.__init__).parameters)
    for name in ("self", "model", "quiet"):
        del parameters[name]
    defaults = {name: field.default for name, field in EngineConfig.model_fields.items() if name != "model"}
    del defaults["handoff"]
    handoff = {name: HandoffConfig.model_fields[name].default for name in ("min_tokens", "on_failure", "shared_memory")}
    names = ("handoff_min_tokens", "on_handoff_failure", "handoff_shared_memory")
    defaults |= {"decode": None} | dict(zip(names, handoff.values(), strict=True))
    assert {name: parameter.default for name, parameter in parameters.items()} == defaults


def test_what_fails_once_the_shards_are_there_ends_them(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a line on a stderr that is closed; that no thread is left is seen by nothing_left_behind."""
    closed: list[str] = []
    monkeypatch.setattr(start, "_kv_memory", lambda generation: 1 / 0)
    for kind in (Generation, GenerationFactory):
        close = kind.close
        monkeypatch.setattr(kind, "close", lambda self, close=close: (closed.append(type(self).__name__), close(self)))
    with pytest.raises(ZeroDivisionError):
        LLM(checkpoint("gqa"), executor="local", cpus_per_rank=1, kv_memory="16MiB")
    assert closed == ["Generation", "GenerationFactory"]


def test_an_engine_that_cannot_be_looked_after_is_ended(spoken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Recovery, loop: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Recovery, "start", fail)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="can't start new thread"):
        LLM(spoken, executor="local", cpus_per_rank=1, kv_memory="16MiB", quiet=True)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"headwise-engine", "headwise-shard"}
