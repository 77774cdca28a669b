"""A tokenizer.json of single bytes and a few longer tokens, some of which end in the middle of a character."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = 2
VOCAB = 288
"""Of the model: more than the tokenizer has tokens; the last ids mean nothing."""

_SPECIAL = ("<pad>", "<s>", "</s>")
_LONGER = ("ab", "abc", "bc", '{"', '":', '"}', "12", "true", "é", "😀", "日本", "  ")


def token_bytes() -> dict[int, bytes]:
    """What each token stands for; special ones, and ids without a meaning, are not in it."""
    known = [bytes([byte]) for byte in range(256)]
    for word in _LONGER:
        data = word.encode()
        known += [data[:size] for size in range(2, len(data) + 1) if data[:size] not in known]
    return dict(enumerate(known, len(_SPECIAL)))


def write_byte_tokenizer(directory: Path) -> Tokenizer:
    """Special ids: 0 is padding, 1 begins, 2 ends a sequence."""
    letters = dict(zip(_bytes_in_order(), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    spelled = {index: "".join(letters[byte] for byte in data) for index, data in token_bytes().items()}
    vocab = {name: index for index, name in enumerate(_SPECIAL)} | {text: index for index, text in spelled.items()}
    backend = Tokenizer(models.BPE(vocab, [(text[:-1], text[-1]) for text in spelled.values() if len(text) > 1]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    assert max(vocab.values()) < VOCAB
    backend.save(str(directory / "tokenizer.json"))
    return backend


def _bytes_in_order() -> list[int]:
    """The bytes by the character that byte-level BPE writes for them: printable ones stand for themselves, the others
    are 256 and up, in turn."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]
