"""Text to tokens and back: the model's tokenizer, its chat template, and text piece by piece."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.workers.errors import CheckpointError, InvalidValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"
_LONG_WINDOW, _LONGEST_WINDOW = 8, 64


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a model's directory, None if there is none. Never runs code from it.

    Raises:
        CheckpointError: there are tokenizer files, but transformers cannot make a fast tokenizer of them.
    """
    if not any((directory / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the loader meets damaged files with whatever its parsing trips over
        raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"the tokenizer in {directory} has no fast form; add its tokenizer.json")
    return Tokenizer(tokenizer)


class Tokenizer:
    """A transformers fast tokenizer, reduced to what serving needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        # Straight to the Rust tokenizer: the same text as transformers' decode, without its Python around it.
        self._backend: Any = self._tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        # Asked for each token that is generated.
        self._token = functools.cache(self._backend.id_to_token)
        self._is_byte = functools.cache(lambda i: _BYTE_TOKEN.fullmatch(self._token(i) or "") is not None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end of sequence; empty if it has none. Generation goes by the model's, not by this."""
        token_id = self._tokenizer.eos_token_id
        return () if token_id is None else (token_id,)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that are not text, such as end of sequence."""
        return self._special

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """How much text one token may stand for, at most."""
        return max(len(token.encode()) for token in self._backend.get_vocab())

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """The text's tokens and what the tokenizer puts around them: transformers' ``tokenizer(text).input_ids``."""
        ids: list[int] = self._tokenizer(text, verbose=False).input_ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens, as transformers' ``decode`` without cleaning up of spaces; unknown ids are left out."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for an unknown id."""
        token: str | None = self._token(token_id)
        return token

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character, as Llama 2's vocabulary writes it: ``<0x0A>``."""
        return self._is_byte(token_id)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """The tokens of a conversation by the model's own template, up to where the next answer starts.

        Raises:
            InvalidValueError: the model has no template, or the template refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidValueError(
                "messages",
                list(messages),
                "the model has no chat template",
                "give a prompt (text or token ids) instead",
            )
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
            )
        except Exception as error:  # the template is a program, and raises what it likes
            raise InvalidValueError("messages", list(messages), f"the model's chat template refuses: {error}") from None
        return ids


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come; the pieces joined are ``decode`` of all tokens.

    A piece never ends inside a character. (tokenizers' own DecodeStream is not used: it cannot give out what it
    holds back at the end, and raises where an invalid byte token changes how the ones before it read.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        # The last few tokens, enough that text grows at its end when one more is decoded with them, and how many
        # characters of their text are given out:    | given out ... sent | held back |
        self._window: list[int] = []
        self._sent = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before; empty while a character is incomplete."""
        new = [i for i in token_ids if i not in self._skipped and self._tokenizer.token(i) is not None]
        if not new:
            return ""
        self._window += new
        # One invalid byte turns a whole run of byte tokens into replacement characters, so none of it is certain.
        if self._tokenizer.is_byte(new[-1]):
            return ""
        text = self._text()
        # The next token may complete the last character, or show that it is none.
        certain = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if certain == len(text) and len(self._window) > _LONG_WINDOW:
            self._shorten()
        if len(self._window) > _LONGEST_WINDOW:
            self._keep_last(text)
        return piece

    def flush(self) -> str:
        """What was held back, once no token will follow."""
        text = self._text()
        piece, self._sent = text[self._sent :], len(text)
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def _shorten(self) -> None:
        """Keep only the last token. It must have text of its own, or the next one would read as a sequence's first."""
        text = self._tokenizer.decode(self._window[-1:], skip_special_tokens=False)
        if text:
            self._window, self._sent = self._window[-1:], len(text)

    def _keep_last(self, text: str) -> None:
        """Keep the last few tokens if the text ends as theirs does, for a model may go on for ever with what is never
        certain, or has no text of its own: a part of a character again and again, or a space."""
        last = self._window[-_LONG_WINDOW:]
        end = self._tokenizer.decode(last, skip_special_tokens=False)
        before = len(text) - len(end)
        if end and text.endswith(end) and before <= self._sent:
            self._window, self._sent = last, self._sent - before
