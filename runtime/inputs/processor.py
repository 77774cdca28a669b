"""From what a user hands in to requests: the one validator for every entrance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import TextStream
from headwise.runtime.inputs.grammars import GrammarChecker
from headwise.runtime.inputs.tokenizer import IncrementalDetokenizer, Tokenizer
from headwise.runtime.kv.identity import KvIdentity
from headwise.runtime.sampling_params import MAX_ENDLESS_TOKENS, SamplingParams
from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import DENSE_TEXT, KvPolicy
from headwise.workers.model.model_config import ModelConfig

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]

MAX_PROMPT_BYTES = 4 << 20
"""Of a prompt's text, or of all messages': a million tokens or so, and seconds to tokenize."""
MAX_MESSAGES, MAX_ROLE = 4096, 64
"""Of a conversation; and characters of a message's role."""
MAX_CACHE_SALT = 256
"""Characters of a cache salt: room for any tenant's name or key."""


class InputProcessor:
    """Checks prompts and parameters against the model's limits and turns them into requests.

    Attributes:
        kv_policy: its text, the same for the same policy.
        endless: whether it lets a text go on past max_model_len.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        model: ModelConfig,
        max_model_len: int,
        seed: int,
        grammars: GrammarChecker,
        identity: KvIdentity | None = None,
        policy: KvPolicy | None = None,
    ) -> None:
        """
        Args:
            identity: of the KV blocks; None: requests take no part in a prefix cache.
            policy: of keys and values; None is dense.
        """
        self.tokenizer = tokenizer
        self.kv_policy = policy.text if policy is not None else DENSE_TEXT
        self.endless = policy is not None and policy.bounded
        self.model, self.max_model_len = model, max_model_len
        self._seed, self._grammars, self.identity = seed, grammars, identity

    @property
    def takes_grammars(self) -> bool:
        """Whether requests may ask for structured outputs here."""
        return self._grammars.problem is None

    def knows_grammar(self, structured: StructuredOutputsParams) -> bool:
        """Whether it is known already if an output of this kind can be had; to find out takes a while."""
        return self._grammars.known(structured)

    def kv_namespace(self, cache_salt: str) -> bytes:
        """Of the blocks that requests with this salt share; empty where there is no prefix cache."""
        return self.identity.namespace(cache_salt) if self.identity is not None else b""

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens.

        Raises:
            InvalidValueError: it is empty, too long, not text or tokens, not in the vocabulary, or text where there is
                no tokenizer.
        """
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidValueError("prompt", prompt, "must be text or a list of whole token ids")
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidValueError("prompt", prompt, "must have at least one token")
        if len(ids) >= self.max_model_len:
            raise InvalidValueError(
                "prompt",
                f"{len(ids)} tokens",
                f"at most {self.max_model_len - 1} leave room for one more in max_model_len={self.max_model_len}",
                "shorten the prompt or raise max_model_len (--max-model-len)",
            )
        return self._checked_ids("prompt", ids)

    def encode(self, text: str) -> list[int]:
        """Text's tokens, however many.

        Raises:
            InvalidValueError: it is too long or no text, or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InvalidValueError(
                "prompt", text, "the model's directory has no tokenizer", "give a list of token ids instead"
            )
        self._check_text("prompt", [text])
        return self.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The tokens' text.

        Raises:
            InvalidValueError: there are more than a text can have, one is not in the vocabulary, or there is no
                tokenizer.
        """
        if self.tokenizer is None:
            raise InvalidValueError("token_ids", token_ids, "the model's directory has no tokenizer")
        most, name = self.max_model_len, "max_model_len="
        if self.endless:
            most, name = self.max_model_len + MAX_ENDLESS_TOKENS, ""
        if len(token_ids) > most:
            limit = f"at most {name}{most}"
            raise InvalidValueError("token_ids", f"{len(token_ids)} tokens", limit)
        return self.tokenizer.decode(self._checked_ids("token_ids", token_ids), skip_special_tokens)

    def chat_token_ids(self, messages: Messages) -> list[int]:
        """The tokens of a conversation, by the model's own template, up to where the assistant's answer starts.

        Raises:
            InvalidValueError: no messages, one without role or content, or no tokenizer or template.
        """
        if self.tokenizer is None:
            raise InvalidValueError("messages", messages, "the model's directory has no tokenizer")
        if not isinstance(messages, Sequence) or not messages:
            raise InvalidValueError("messages", messages, "must be a list of at least one message")
        if len(messages) > MAX_MESSAGES:
            raise InvalidValueError("messages", f"{len(messages)} messages", f"at most {MAX_MESSAGES}")
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise InvalidValueError("messages", message, "each must have a role and a content, both strings")
            if len(message["role"]) > MAX_ROLE:
                raise InvalidValueError("messages", message["role"], f"a role has at most {MAX_ROLE} characters")
        self._check_text("messages", [message[key] for message in messages for key in ("role", "content")])
        return self.tokenizer.apply_chat_template([dict(message) for message in messages])

    def requests(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        number: int,
        cache_salt: str = "",
        tenant: str = "",
    ) -> Iterator[Request]:
        """The ``n`` requests of a prompt.

        Args:
            number: of the call; the seed of one that brings none depends on it.
            cache_salt: the prefix cache is shared with requests that have the same, and no others.
            tenant: who asks, if tenants are told apart.

        Raises:
            InvalidValueError: a parameter, the name or the salt is wrong, or a grammar, which is compiled for it if it
                is new.
        """
        check_request_id(request_id)
        if not isinstance(params, SamplingParams):
            raise InvalidValueError("sampling_params", params, "must be SamplingParams")
        params.check(vocab_size=self.model.vocab_size, max_model_len=self.max_model_len, endless=self.endless)
        check_salt(cache_salt)
        blocks = self.identity.token_blocks(token_ids, cache_salt, tenant) if self.identity is not None else None
        structured = params.structured_outputs
        grammar = self._grammars.grammar(structured) if structured is not None else ""
        room = self.max_model_len - len(token_ids)
        for index in range(params.n):
            yield Request(
                request_id=request_id,
                prompt_token_ids=token_ids,
                params=params,
                sampling=params.row_sampling(
                    eos_token_ids=self.model.eos_token_ids,
                    default_seed=self._seed + number,
                    index=index,
                    grammar=grammar,
                ),
                max_tokens=self._max_tokens(params, room),
                index=index,
                tenant=tenant,
                token_blocks=blocks.copy() if blocks is not None else None,
            )

    def close(self) -> None:
        """Leaves nothing behind. Idempotent."""
        self._grammars.close()

    def text_stream(self, params: SamplingParams) -> TextStream | None:
        """For one request's output; None where there is no tokenizer."""
        if self.tokenizer is None:
            return None
        detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=params.skip_special_tokens)
        return TextStream(detokenizer, params.stop, params.include_stop_str_in_output)

    def _max_tokens(self, params: SamplingParams, room: int) -> int:
        """Args: ``room``: tokens of max_model_len that the prompt leaves."""
        if params.max_tokens is None:
            return room
        return params.max_tokens if self.endless else min(params.max_tokens, room)

    def _checked_ids(self, field: str, ids: Sequence[int]) -> list[int]:
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise InvalidValueError(field, token, "must be text or a list of whole token ids")
            if not 0 <= token < self.model.vocab_size:
                raise InvalidValueError(field, token, f"token ids are in [0, {self.model.vocab_size})")
        return list(ids)

    def _check_text(self, field: str, texts: Sequence[str]) -> None:
        """Refuses what is no text, and what is too long to be worth tokenizing: it cannot fit the model's context."""
        assert self.tokenizer is not None
        limit = min(MAX_PROMPT_BYTES, self.max_model_len * self.tokenizer.max_token_bytes)
        size = sum(map(len, texts))
        if size <= limit:
            size = sum(len(text.encode(errors="replace")) for text in texts)
        if size > limit:
            allowed = f"at most {limit} bytes of text, with max_model_len={self.max_model_len}"
            raise InvalidValueError(field, f"{size} bytes or more", allowed, "shorten it")
        for text in texts:
            _check_unicode(field, text)


def check_request_id(request_id: str) -> None:
    """
    Raises:
        InvalidValueError: it is no text.
    """
    if not isinstance(request_id, str):
        raise InvalidValueError("request_id", request_id, f"must be a string, not {type(request_id).__name__}")


def check_salt(cache_salt: str) -> None:
    """
    Raises:
        InvalidValueError: it is too long, or no text.
    """
    if not isinstance(cache_salt, str):
        raise InvalidValueError("cache_salt", cache_salt, f"must be a string, not {type(cache_salt).__name__}")
    if len(cache_salt) > MAX_CACHE_SALT:
        raise InvalidValueError(
            "cache_salt", f"{len(cache_salt)} characters", f"at most {MAX_CACHE_SALT}", "give a digest of it instead"
        )
    _check_unicode("cache_salt", cache_salt)


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValueError(
            field, text, f"character {error.start} is half of a surrogate pair, which is no text"
        ) from None
