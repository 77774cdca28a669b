"""SamplingParams: how a request's tokens are chosen and when its output ends, with the limits of every field."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Never

from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling

MAX_N = 64
"""Samples of one prompt. Each takes a place in every step, and KV blocks of its own."""
MAX_TEMPERATURE = 100.0
"""Already close to uniform: of two tokens whose logits differ by 20, one is only 1.2 times as likely as the other."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
"""Wide enough for any use, and narrow enough that no finite logit overflows."""
MAX_ABS_PENALTY = 2.0
"""Of presence_penalty and frequency_penalty, as in OpenAI's API."""
MAX_LOGPROBS = 20
"""As in OpenAI's API. With each token so many (id, value) pairs travel from the shards to the client."""
MAX_LOGIT_BIAS, MAX_LOGIT_BIAS_ENTRIES = 100.0, 1024
"""The value as in OpenAI's API: 100 practically forces a token, -100 practically bans it."""
MAX_STOP, MAX_STOP_CHARACTERS = 16, 256
"""Each token's text is searched for stop strings, and a stream holds back text that may be the start of one."""
MAX_STOP_TOKEN_IDS = 128
MAX_TOKENS = 1 << 24
"""More than any model's context; :meth:`SamplingParams.check` applies the limit of the model."""
MAX_ENDLESS_TOKENS = 1_000_000
"""Of outputs that go on past max_model_len, those of a request together: hours of a CPU's. They do not end by
themselves where nothing ends them, and a call that is not streamed keeps them until then."""
_ENDLESS = "lower it, or start the engine with a window in every head, such as kv_policy=sinks:4,1020 (--kv-policy)"
_SEED_BITS = 64


@dataclass(frozen=True, init=False)
class SamplingParams:
    """How a request's tokens are chosen and when its output ends. Immutable.

    Names, defaults and meanings are those of vLLM. Without arguments: temperature 1.0, at most 16 tokens.

    Attributes:
        n: how many outputs (samples) to generate for the prompt. Default: 1. The seeds of all but the first are derived
            from the request's seed.
        temperature: divides the logits, so that a higher one makes less likely tokens more likely. Default: 1.0. At 0,
            or anything below 1e-5, the most likely token is taken each time.
        top_p: sample only from the most likely tokens that together reach this probability. Default: 1, from all.
        top_k: sample only from this many of the most likely tokens. Default: 0, from all; -1 means the same and is
            kept as 0.
        min_p: sample only from tokens with at least this share of the most likely token's probability. Default: 0, from
            all.
        repetition_penalty: for tokens in the prompt or the output, divides a positive logit and multiplies a negative
            one. Default: 1, no penalty.
        presence_penalty: subtracted once from the logits of tokens that are in the output. Default: 0.
        frequency_penalty: subtracted from the logit of a token once for each time it is in the output. Default: 0.
        logit_bias: a dict of token id to a value that is added to the token's logit; kept as (id, value) pairs ordered
            by id. Default: none.
        logprobs: how many of the most likely tokens to report with their log-probabilities, beside the chosen token.
            Default: None, which reports nothing.
        max_tokens: most tokens of the output. Default: 16. None is as many as the model's context has room for. It may
            be more than that, up to 1,000,000 for all n together, with a kv_policy that gives every head a window.
        min_tokens: fewest tokens of the output. Before that, stop strings, stop tokens and end-of-sequence do not end
            it. Default: 0.
        ignore_eos: whether the output goes on after end-of-sequence. Default: False.
        stop: a string that ends the output, or a list of such; kept as a tuple. Default: none.
        stop_token_ids: token ids that end the output. Default: none.
        include_stop_str_in_output: whether the output's text keeps the stop string, or the stop token's text, at its
            end. Default: False.
        skip_special_tokens: whether the text leaves special tokens out. Default: True.
        seed: the same seed gives the same tokens, whatever other requests run. Default: None, which, like -1, leaves
            the seed to the engine.
        structured_outputs: what the output has to be, such as JSON of a schema. The output ends when that is complete,
            so min_tokens and ignore_eos cannot be given too. Default: None, any text.

    Raises:
        InvalidValueError: an unknown name, a wrong type or a value outside its limit; names the field and the limit.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    logprobs: int | None
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    seed: int | None
    structured_outputs: StructuredOutputsParams | None

    def __init__(
        self,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        seed: int | None = None,
        structured_outputs: StructuredOutputsParams | None = None,
        **unknown: Never,
    ) -> None:
        if unknown:
            name = min(unknown)
            raise InvalidValueError(
                name, unknown[name], f"unknown; there are {', '.join(f.name for f in fields(self))}"
            )
        self._set(
            n=_integer("n", n, 1, MAX_N),
            temperature=_number("temperature", temperature, 0, MAX_TEMPERATURE),
            top_p=_number("top_p", top_p, 0, 1, above=True),
            top_k=max(0, _integer("top_k", top_k, -1, MAX_TOKENS)),
            min_p=_number("min_p", min_p, 0, 1),
            repetition_penalty=_number(
                "repetition_penalty", repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
            ),
            presence_penalty=_number("presence_penalty", presence_penalty, -MAX_ABS_PENALTY, MAX_ABS_PENALTY),
            frequency_penalty=_number("frequency_penalty", frequency_penalty, -MAX_ABS_PENALTY, MAX_ABS_PENALTY),
            logit_bias=_logit_bias(logit_bias),
            logprobs=None if logprobs is None else _integer("logprobs", logprobs, 0, MAX_LOGPROBS),
            max_tokens=None if max_tokens is None else _integer("max_tokens", max_tokens, 1, MAX_TOKENS),
            min_tokens=_integer("min_tokens", min_tokens, 0, MAX_TOKENS),
            ignore_eos=_flag("ignore_eos", ignore_eos),
            stop=_stop(stop),
            stop_token_ids=_token_ids("stop_token_ids", stop_token_ids),
            include_stop_str_in_output=_flag("include_stop_str_in_output", include_stop_str_in_output),
            skip_special_tokens=_flag("skip_special_tokens", skip_special_tokens),
            seed=_seed(seed),
            structured_outputs=_structured(structured_outputs),
        )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidValueError("min_tokens", self.min_tokens, f"must not be over max_tokens={self.max_tokens}")
        if self.structured_outputs is not None:
            for name, value in (("min_tokens", self.min_tokens), ("ignore_eos", self.ignore_eos)):
                if value:
                    raise InvalidValueError(
                        name, value, "an output with structured_outputs ends where that is complete"
                    )

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, which is checked like a new one."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingParams(**values | {"logit_bias": dict(self.logit_bias)} | changes)

    def check(self, vocab_size: int, max_model_len: int, endless: bool = False) -> None:
        """Checks what depends on the model.

        Args:
            vocab_size: number of token ids of the model.
            max_model_len: most tokens of prompt and output together.
            endless: whether the KV policy lets a text go on past max_model_len.

        Raises:
            InvalidValueError: a token id is not in the vocabulary, or max_tokens or min_tokens is over max_model_len,
                or, where texts may be endless, over its share of MAX_ENDLESS_TOKENS.
        """
        for name, ids in (("logit_bias", [t for t, _ in self.logit_bias]), ("stop_token_ids", self.stop_token_ids)):
            if wrong := [token for token in ids if token >= vocab_size]:
                raise InvalidValueError(name, wrong[0], f"a token id must be in [0, {vocab_size})")
        most = max(MAX_ENDLESS_TOKENS // self.n, max_model_len)
        for name, count in (("max_tokens", self.max_tokens), ("min_tokens", self.min_tokens)):
            if count is None:
                continue
            if endless and count > most:
                raise InvalidValueError(name, count, f"must be at most {most} with n={self.n}")
            if not endless and count > max_model_len:
                limit = f"must be at most max_model_len={max_model_len}, for KV memory of a text grows with it"
                raise InvalidValueError(name, count, limit, _ENDLESS)

    def row_sampling(
        self, *, eos_token_ids: Collection[int], default_seed: int, index: int = 0, grammar: str = ""
    ) -> RowSampling:
        """What the shards need to know to sample one of this request's ``n`` outputs.

        Args:
            eos_token_ids: the model's end-of-sequence tokens; they end the output unless ``ignore_eos`` is set.
            default_seed: the seed if the request brings none.
            index: which of the ``n`` outputs, from 0.
            grammar: the grammar that structured_outputs was compiled to, empty if there is none.
        """
        eos = () if self.ignore_eos else eos_token_ids
        return RowSampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            num_logprobs=-1 if self.logprobs is None else self.logprobs,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(sorted({*self.stop_token_ids, *eos})),
            seed=_sample_seed(default_seed if self.seed is None else self.seed, index),
            grammar=grammar,
        )

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _sample_seed(seed: int, index: int) -> int:
    """An unsigned 64-bit key. For index 1 and up it is a hash, so that the samples of two requests with neighbouring
    seeds do not come out alike."""
    key = seed % (1 << _SEED_BITS)
    if index == 0:
        return key
    data = key.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"headwise").digest(), "little")


def _integer(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidValueError(name, value, f"must be an int in [{low}, {high}], not {type(value).__name__}")
    if not low <= value <= high:
        raise InvalidValueError(name, value, f"must be in [{low}, {high}]")
    return value


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """``above``: ``low`` itself is excluded."""
    limit = f"in {'(' if above else '['}{low:g}, {high:g}]"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidValueError(name, value, f"must be a number {limit}, not {type(value).__name__}")
    if not low <= value <= high or (above and value == low):  # not a number either
        raise InvalidValueError(name, value, f"must be {limit}")
    return float(value)


def _seed(value: object) -> int | None:
    seed = -1 if value is None else _integer("seed", value, -(1 << 63), (1 << 63) - 1)
    return None if seed == -1 else seed


def _structured(value: object) -> StructuredOutputsParams | None:
    if value is not None and not isinstance(value, StructuredOutputsParams):
        limit = f"must be StructuredOutputsParams, not {type(value).__name__}"
        raise InvalidValueError("structured_outputs", value, limit)
    return value


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidValueError(name, value, f"must be True or False, not {type(value).__name__}")
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    ids = () if value is None else value
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise InvalidValueError(name, value, f"must be a list of token ids, not {type(value).__name__}")
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidValueError(name, f"{len(ids)} ids", f"at most {MAX_STOP_TOKEN_IDS}")
    return tuple(_integer(name, token, 0, (1 << 31) - 1) for token in ids)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    bias = {} if value is None else value
    if not isinstance(bias, Mapping):
        raise InvalidValueError("logit_bias", value, f"must be a dict of token id to bias, not {type(value).__name__}")
    if len(bias) > MAX_LOGIT_BIAS_ENTRIES:
        raise InvalidValueError("logit_bias", f"{len(bias)} entries", f"at most {MAX_LOGIT_BIAS_ENTRIES}")
    for token in bias:
        _integer("logit_bias", token, 0, (1 << 31) - 1)
    return tuple(
        (token, _number(f"logit_bias[{token}]", bias[token], -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)) for token in sorted(bias)
    )


def _stop(value: object) -> tuple[str, ...]:
    stop = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise InvalidValueError("stop", value, f"must be a string or a list of strings, not {type(value).__name__}")
    if len(stop) > MAX_STOP:
        raise InvalidValueError("stop", f"{len(stop)} strings", f"at most {MAX_STOP}")
    for text in stop:
        if not isinstance(text, str):
            raise InvalidValueError("stop", text, f"must be a string, not {type(text).__name__}")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidValueError("stop", text, f"must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(text)}")
    return tuple(stop)
