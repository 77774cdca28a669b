"""How a request's tokens are chosen and when it ends; every limit on it is here, for every entrance."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Never

from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling

MAX_N = 64
"""Samples of one prompt: each takes a row and its own KV blocks."""
MAX_TEMPERATURE = 100.0
"""Already close to uniform: it leaves a factor of 1.2 between two tokens whose logits differ by 20."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
"""Wide enough for any use, and no finite logit overflows for lack of a bound."""
MAX_ABS_PENALTY = 2.0
"""Of presence_penalty and frequency_penalty, as in OpenAI's API."""
MAX_LOGPROBS = 20
"""As in OpenAI's API; each token carries so many (id, value) pairs from the shards to the client."""
MAX_LOGIT_BIAS, MAX_LOGIT_BIAS_ENTRIES = 100.0, 1024
"""The value as in OpenAI's API: 100 in effect forces a token and -100 in effect bans it."""
MAX_STOP, MAX_STOP_CHARACTERS = 16, 256
"""Stop strings are searched at each token, and text that may begin one is held back from a stream."""
MAX_STOP_TOKEN_IDS = 128
MAX_TOKENS = 1 << 24
"""Beyond any model's context; :meth:`SamplingParams.check` applies the model's own."""
_SEED_BITS = 64


@dataclass(frozen=True, init=False)
class SamplingParams:
    """How a request's tokens are chosen and when it ends; names, defaults and meanings as in vLLM. Immutable.

    Attributes:
        n: samples of the prompt. All but the first get a seed derived from the request's.
        temperature: 0, or anything below 1e-5, takes the most likely token.
        top_p: only the most likely tokens that together reach this probability; 1 is off.
        top_k: only so many of the most likely tokens; 0 or -1 is off, kept as 0.
        min_p: only tokens with at least this share of the most likely token's probability; 0 is off.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens in prompt or output.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once or per occurrence.
        logit_bias: a dict of token id to the value added to its logit; kept as (id, value) pairs ordered by id.
        logprobs: report the chosen token's log-probability and those of so many most likely ones; None reports nothing.
        max_tokens: of the output; None is as many as the model's context has room for.
        min_tokens: nothing ends the output before it has so many.
        ignore_eos: end-of-sequence does not end the output.
        stop: strings that end the output; a single one may stand for itself. Kept as a tuple.
        stop_token_ids: token ids that end the output.
        include_stop_str_in_output: keep the stop string or the stop token's text at the end of the output's text.
        skip_special_tokens: leave special tokens out of the text.
        seed: the same seed gives the same tokens, whatever else runs. None, or -1 as in vLLM, leaves it to the engine.
        structured_outputs: what the output has to be, such as JSON of a schema; None is any text. It ends where that is
            complete, so goes neither with min_tokens nor with ignore_eos.

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
        """A copy with some fields changed, checked as if it were new."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingParams(**values | {"logit_bias": dict(self.logit_bias)} | changes)

    def check(self, vocab_size: int, max_model_len: int) -> None:
        """Check what depends on the model.

        Args:
            max_model_len: tokens of prompt and output together.

        Raises:
            InvalidValueError: a token id is not in the vocabulary, or more tokens are asked for than the context holds.
        """
        for name, ids in (("logit_bias", [t for t, _ in self.logit_bias]), ("stop_token_ids", self.stop_token_ids)):
            if wrong := [token for token in ids if token >= vocab_size]:
                raise InvalidValueError(name, wrong[0], f"a token id must be in [0, {vocab_size})")
        for name, count in (("max_tokens", self.max_tokens), ("min_tokens", self.min_tokens)):
            if count is not None and count > max_model_len:
                raise InvalidValueError(name, count, f"must be at most max_model_len={max_model_len}")

    def row_sampling(
        self, *, eos_token_ids: Collection[int], default_seed: int, index: int = 0, grammar: str = ""
    ) -> RowSampling:
        """What the shards need to know to sample a row of this request.

        Args:
            eos_token_ids: the model's; among the stop tokens unless ``ignore_eos``.
            default_seed: for a request that brings no seed.
            index: which of the ``n`` samples the row is.
            grammar: of structured_outputs, in the shards' form.
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
    """An unsigned 64-bit key; that of a later sample is a hash, so that no two requests' samples run in step."""
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
    if math.isnan(value) or not low <= value <= high or (above and value == low):
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
