"""Tokens and text agree with transformers, and text that comes in pieces is the text that comes at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headwise.runtime.inputs import tokenizer as module
from headwise.runtime.inputs.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from headwise.workers.errors import CheckpointError, InvalidValueError
from tests.effort import examples

TEXTS = [
    "Hello world, how are you?",
    "  two spaces\n\n\tand a tab ",
    "日本語とEnglishの混ざった文。",
    "👩‍👩‍👧‍👦 family, flag 🇩🇪, skin 👍🏽",
    "naïve café — “quotes” … \u0301combining",
    "<|im_start|>user\nHi<|im_end|>\n",
    "� itself",
]


def byte_level() -> Backend:
    """Each byte is a token, and a few longer ones cut characters in the middle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    merges = []
    for text in ("he", "lo", " w", "é", "😀", "你"):
        chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
        merges.append((chars[0], chars[1]))
        vocab.setdefault(chars[:2], len(vocab))
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<think>"), AddedToken("日本")])
    return backend


def byte_fallback() -> Backend:
    """As Llama 2's: words begin with ▁, characters outside the vocabulary are byte tokens."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁he", "llo", "▁▁", "é", "�", "a", "b", ".", "\n"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    return backend


def metaspace() -> Backend:
    backend = byte_fallback()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return backend


TINY: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
}
TOKENIZERS = {
    name: Tokenizer(PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")) for name, make in TINY.items()
}


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    """What comes out when ``ids`` go in, in chunks of the sizes ``cuts``, again and again; the last is the flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    out, start, turn = [], 0, 0
    while start < len(ids):
        size = cuts[turn % len(cuts)]
        out.append(detokenizer.add(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*out, detokenizer.flush(), detokenizer.flush()]


CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@pytest.mark.parametrize("name", TINY)
@examples(600)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_pieces_of_any_tokens_join_to_their_text(name: str, data: st.DataObject, cuts: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    # 280 is past every vocabulary here: ids without a token are left out.
    ids = data.draw(st.lists(st.integers(0, 280), max_size=60))
    assert "".join(pieces(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TINY)
@examples(300)
@given(data=st.data(), cuts=CUTS)
def test_pieces_of_a_few_tokens_again_and_again_join_to_their_text(
    name: str, data: st.DataObject, cuts: list[int]
) -> None:
    """Spaces, parts of characters, and whatever else is never certain: with a short memory of them."""
    few = data.draw(st.lists(st.sampled_from([3, 5, 7, 9]) | st.integers(0, 270), min_size=1, max_size=5))
    ids = data.draw(st.lists(st.sampled_from(few), max_size=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONGEST_WINDOW", 8)
        out = pieces(TOKENIZERS[name], ids, cuts, False)
    assert "".join(out) == TOKENIZERS[name].decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(("name", "token"), [("byte_level", "\ufffd"), ("byte_fallback", ""), ("metaspace", "")])
def test_a_token_again_and_again_is_not_decoded_again_and_again(name: str, token: str) -> None:
    """Outputs without end may be of it alone: of a part of a character, or of a space, which alone is no text."""
    tokenizer = TOKENIZERS[name]
    texts = ((i, tokenizer.decode([i], False), tokenizer.decode([i, i], False)) for i in range(3, 256))
    repeated = next(i for i, one, two in texts if one == token and two)
    detokenizer = IncrementalDetokenizer(tokenizer)
    out = [detokenizer.add([repeated]) for _ in range(1000)]
    assert len(detokenizer._window) <= 65
    assert "".join([*out, detokenizer.flush()]) == tokenizer.decode([repeated] * 1000, False)


@pytest.mark.parametrize("name", TINY)
@examples(200)
@given(text=st.text(alphabet="ahelo wé😀你日本\n▁.�<s>", max_size=60), cuts=CUTS)
def test_pieces_of_text_never_split_a_character(name: str, text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    out = pieces(tokenizer, ids, cuts, False)
    assert "".join(out) == whole
    assert sum(piece.count("�") for piece in out) == whole.count("�")


@examples(300)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_smollm2_pieces_join_to_the_text(
    smollm2_tokenizer: Tokenizer, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, 49151), max_size=40) | st.text(max_size=40).map(smollm2_tokenizer.encode))
    assert "".join(pieces(smollm2_tokenizer, ids, cuts, skip)) == smollm2_tokenizer.decode(ids, skip)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    return tokenizer


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    emoji = tokenizer.encode("😀")
    assert len(emoji) == 3
    assert [detokenizer.add([i]) for i in [*tokenizer.encode("hi"), *emoji]] == ["h", "i", "", "", "😀"]
    assert detokenizer.add(emoji[:1]) == ""
    assert detokenizer.add(tokenizer.encode("!")) == "�!"
    assert detokenizer.flush() == ""


def test_a_byte_run_waits_for_its_end() -> None:
    """One wrong byte changes how the whole run reads, so nothing of it may be given out before."""
    tokenizer = TOKENIZERS["byte_fallback"]
    run = tokenizer.encode("你")
    assert len(run) == 3
    [a] = tokenizer.encode("a")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.add([i]) for i in [a, *run, a]] == ["a", "", "", "", "你a"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.add([i]) for i in [*run, run[0], a]] == ["", "", "", "", "����a"]


def test_the_first_words_space_is_kept_as_decode_keeps_it() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    he, llo = 5, 6
    assert tokenizer.decode([he, llo, he]) == "hello he"
    assert pieces(tokenizer, [he, llo, he], [1], True) == ["he", "llo", " he", "", ""]


def test_a_long_text_is_not_decoded_again_and_again(
    smollm2_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    decode = Tokenizer.decode

    def counting(self: Tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(self, token_ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    ids = smollm2_tokenizer.encode("The quick brown fox jumps over the lazy dog 🦊. " * 20)
    assert "".join(pieces(smollm2_tokenizer, ids, [1], True)).endswith("🦊. ")
    assert longest < 30


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_those_of_transformers(smollm2: Path, smollm2_tokenizer: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    ids = smollm2_tokenizer.encode(text)
    assert ids == theirs(text).input_ids
    for skip in (True, False):
        assert smollm2_tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_chat_template_is_the_models_own(smollm2_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 👋"}]
    ids = smollm2_tokenizer.apply_chat_template(messages)
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 👋<|im_end|>\n"
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == turns + "<|im_start|>assistant\n"
    assert ids[0] == 1
    without = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert smollm2_tokenizer.decode(without, skip_special_tokens=False) == turns


def test_special_tokens_of_smollm2(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.eos_token_ids == (2,)
    assert smollm2_tokenizer.token(2) == "<|im_end|>"
    assert {0, 1, 2} <= smollm2_tokenizer.special_token_ids
    assert smollm2_tokenizer.token(49152) is None


def save(directory: Path, chat_template: str | None = None) -> Path:
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="</s>", chat_template=chat_template
    ).save_pretrained(directory)
    return directory


def loaded(directory: Path) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def test_a_saved_tokenizer_loads(tmp_path: Path) -> None:
    tokenizer = loaded(save(tmp_path))
    assert tokenizer.encode("hello 😀") == TOKENIZERS["byte_level"].encode("hello 😀")
    assert tokenizer.eos_token_ids == (tokenizer.encode("</s>")[0],)


def test_no_chat_template_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"messages=.*no chat template; give a prompt"):
        loaded(save(tmp_path)).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_template_that_refuses_is_told(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    tokenizer = loaded(save(tmp_path, template))
    assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])) == "x"
    with pytest.raises(InvalidValueError, match="refuses: no system role"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Hi"}])


def test_a_directory_may_have_no_tokenizer(checkpoint: Callable[..., Path]) -> None:
    assert load_tokenizer(checkpoint("gqa")) is None


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    (save(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_tokenizers_own_code_is_never_run(tmp_path: Path) -> None:
    path = save(tmp_path) / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    path.write_text(json.dumps(values))
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w')\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)
    assert not ran.exists()
