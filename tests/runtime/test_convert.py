"""Checkpoints with fewer KV heads: transformers and Headwise agree on them, and equal heads change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from headwise.runtime import LLM, SamplingParams, convert
from headwise.runtime.convert import ConversionError, convert_kv_heads, pool_heads
from headwise.workers.errors import CheckpointError, InvalidValueError
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import assert_greedy, reference_model, write_checkpoint
from tests.runtime.conftest import Run

PROMPT = list(range(5, 29))


def logits(directory: Path) -> torch.Tensor:
    with torch.inference_mode():
        return reference_model(directory)(torch.tensor([PROMPT])).logits[0]


@given(
    kept=st.integers(1, 4), each=st.integers(1, 7), width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), columns=st.sampled_from([None, 3]),
)  # fmt: skip
def test_a_head_is_the_mean_of_its_neighbours(
    kept: int, each: int, width: int, dtype: torch.dtype, columns: int | None
) -> None:
    x = torch.randn(kept * each * width, *([] if columns is None else [columns])).to(dtype)
    pooled = pool_heads(x, kept * each, kept)
    for head in range(kept):
        heads = [x[(head * each + i) * width :][:width].double() for i in range(each)]
        mean = torch.stack(heads).sum(0) / each
        torch.testing.assert_close(pooled[head * width : (head + 1) * width], mean.to(dtype))
    again = pooled.view(kept, 1, width, -1).expand(-1, each, -1, -1).reshape(kept * each * width, -1)
    assert torch.equal(pool_heads(again, kept * each, kept).view(pooled.shape), pooled)


@pytest.mark.parametrize(("shape", "kv_heads"), [("mha", 2), ("mha", 1), ("gqa", 2), ("uneven", 1), ("mqa", 1)])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": True}])
def test_transformers_and_headwise_agree_on_it(
    checkpoint: Callable[..., Path], tmp_path: Path, shape: str, kv_heads: int, changes: dict[str, bool]
) -> None:
    source, out = checkpoint(shape, **changes), tmp_path / "out"
    made = convert_kv_heads(source, kv_heads, out)
    assert made.path == out and made.new.num_kv_heads == kv_heads and made.new.num_heads == made.old.num_heads
    model = reference_model(out)
    assert model.config.num_key_value_heads == kv_heads
    with LLM(out, executor="local", device="cpu", kv_memory="4MiB", quiet=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert_greedy(model, PROMPT, output.outputs[0].token_ids)


@pytest.mark.parametrize("bias", [False, True])
def test_heads_that_are_equal_already_give_the_same_logits(tmp_path: Path, bias: bool) -> None:
    """Query heads go on with the KV heads that were theirs."""
    source = write_checkpoint(tmp_path / "source", 12, 6, attention_bias=bias)
    weights = load_file(source / "model.safetensors")
    for name, x in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            weights[name] = x.view(2, 3, 16, -1)[:, :1].repeat(1, 3, 1, 1).view(x.shape)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert_kv_heads(source, 2, tmp_path / "two")
    torch.testing.assert_close(logits(tmp_path / "two"), logits(source), rtol=0, atol=1e-5)
    convert_kv_heads(source, 1, tmp_path / "one")
    assert (logits(tmp_path / "one") - logits(source)).abs().max() > 0.1


def test_other_tensors_and_the_dtype_stay(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """In several files, and in bfloat16."""
    source, out = tmp_path / "source", tmp_path / "out"
    LlamaForCausalLM.from_pretrained(checkpoint("mha"), dtype=torch.bfloat16).save_pretrained(
        source, max_shard_size="100KB"
    )
    made = convert_kv_heads(source, 1, out)
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) > 1 and sorted(path.name for path in out.glob("*.safetensors")) == files
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    was = json.loads((source / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == was["weight_map"]
    assert index["metadata"]["total_size"] == made.weight_bytes < was["metadata"]["total_size"]
    for file in files:
        old, new = load_file(source / file), load_file(out / file)
        assert list(new) == list(old)
        for name, x in new.items():
            assert x.dtype == torch.bfloat16
            pooled = ".k_proj." in name or ".v_proj." in name
            assert torch.equal(x, pool_heads(old[name], 4, 1) if pooled else old[name])
    assert sum(x.nbytes for file in files for x in load_file(out / file).values()) == made.weight_bytes


def test_what_goes_with_a_model_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "source", vocab_size=VOCAB), tmp_path / "out"
    write_byte_tokenizer(source)
    for name in ("LICENSE", "README.md", "training_args.bin", "chat_template.jinja"):
        (source / name).write_text(name)
    convert_kv_heads(source, 1, out)
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == names - {"README.md", "training_args.bin"}
    assert "tokenizer.json" in names and (out / "LICENSE").read_text() == "LICENSE"
    fields, was = (json.loads((folder / "config.json").read_bytes()) for folder in (out, source))
    assert fields == was | {"num_key_value_heads": 1}
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out, source)]
    assert tokenizers[0].encode("hello") == tokenizers[1].encode("hello")
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_mistral_keeps_its_windows(tmp_path: Path) -> None:
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 12}
    torch.manual_seed(0)
    config = MistralConfig(**settings, **heads, max_position_embeddings=64, initializer_range=0.2)
    MistralForCausalLM(config).save_pretrained(tmp_path / "source")
    made = convert_kv_heads(tmp_path / "source", 2, tmp_path / "out")
    assert made.new.num_kv_heads == 2 and made.new.sliding_windows == made.old.sliding_windows == (12, 12)
    model = MistralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with LLM(tmp_path / "out", executor="local", device="cpu", kv_memory="4MiB", quiet=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert_greedy(model, PROMPT, output.outputs[0].token_ids)


@pytest.mark.parametrize("kv_heads", [0, -1, 3, 8])
def test_heads_go_into_whole_groups(checkpoint: Callable[..., Path], tmp_path: Path, kv_heads: int) -> None:
    with pytest.raises(InvalidValueError, match=rf"^--kv-heads={kv_heads}: must divide .* 4 KV heads: one of 1, 2, 4$"):
        convert_kv_heads(checkpoint("mha"), kv_heads, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_there_is_not_overwritten(checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    {"file": out.touch, "folder": out.mkdir, "link": lambda: out.symlink_to("nowhere")}[kind]()
    before = out.lstat()
    with pytest.raises(InvalidValueError, match=r"^OUT=.*exists, and is not overwritten"):
        convert_kv_heads(checkpoint("mha"), 1, out)
    assert out.lstat() == before and [*tmp_path.iterdir()] == [out]


def test_where_there_is_no_folder_or_no_room_it_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidValueError, match=r"^OUT=.*no directory; make it first: mkdir -p "):
        convert_kv_heads(checkpoint("mha"), 1, tmp_path / "no" / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InvalidValueError, match=r"^OUT=.* bytes, and 1000 are free there"):
        convert_kv_heads(checkpoint("mha"), 1, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_of_one_that_fails_nothing_is_left(
    checkpoint: Callable[..., Path], tmp_path: Path, error: type[BaseException] | OSError
) -> None:
    seen: list[list[str]] = []

    def fail(done: int, whole: int) -> None:
        if 2 * done > whole:
            seen.append([path.name for path in tmp_path.iterdir()])
            raise error

    with pytest.raises((KeyboardInterrupt, ConversionError)) as raised:
        convert_kv_heads(checkpoint("mha"), 1, tmp_path / "out", fail)
    assert isinstance(raised.value, KeyboardInterrupt) or "No space left on device" in str(raised.value)
    assert seen[0][0].startswith(".out.") and not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    with (source / "model.safetensors").open("ab") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError):
        convert_kv_heads(source, 1, tmp_path / "out")
    assert [*tmp_path.iterdir()] == [source]


# the command


def test_json(headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = str(checkpoint("mha")), str(tmp_path / "out")
    code, said, err = headwise("convert", "--kv-heads", "2", source, out, "--json")
    assert code == 0 and said.count("\n") == 1
    found = json.loads(said)
    assert found.pop("note") in err and "Writing out" in err
    size = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values())
    heads = {"query_heads": 4, "kv_heads_before": 4, "kv_heads": 2}
    assert found == {"model": source, "out": out, **heads, "weight_bytes": size}


def test_text_says_what_is_left_to_do(headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    code, said, err = headwise("convert", "--kv-heads", "1", str(checkpoint("mha")), str(tmp_path / "out"))
    assert code == 0 and said.startswith(f"{tmp_path / 'out'}: 1 KV heads for 4 query heads, of 4; ")
    assert "1/4 of the memory" in said and "until the model is trained further" in err
    code, said, err = headwise("convert", "--kv-heads", "4", str(checkpoint("mha")), str(tmp_path / "same"))
    assert code == 0 and "trained further" not in err


def test_what_is_wrong_is_a_line_and_an_exit_code(
    headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(checkpoint("mha")), str(tmp_path / "out")
    for arguments, said in [
        (["--kv-heads", "3", source, out], "--kv-heads=3"),
        (["--kv-heads", "1", source, str(tmp_path)], "OUT="),
        (["--kv-heads", "1", str(tmp_path / "none"), out], "nothing is at"),
    ]:
        code, text, err = headwise("convert", *arguments)
        assert code == 2 and not text and said in err.splitlines()[-1] and "Writing" not in err
    monkeypatch.setattr(convert, "pool_heads", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    code, text, err = headwise("convert", "--kv-heads", "1", source, out)
    assert code == 1 and not text and "cannot be written (gone)" in err and not list(tmp_path.iterdir())
