"""What clients ask, drawn from a seed: the same seed asks the same of every engine with the same vocabulary."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass

from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.structured_outputs import StructuredOutputsParams

NUM_QUESTIONS = 24
"""Each is asked again and again; what its answer has to be is computed once, undisturbed."""
MAX_PROMPT, MAX_OUTPUT = 320, 64
"""In tokens; so that attention divides some contexts into parts, and others not."""

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog", None]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, in tokens, and how it is to be answered."""

    prompt: tuple[int, ...]
    params: SamplingParams


class Way(enum.StrEnum):
    """How a client asks."""

    STREAM = "stream"
    WHOLE = "whole"
    """Several questions in one call of ``generate``."""
    LEAVE = "leave"
    """A stream that the client leaves before its end."""
    ABORT = "abort"
    """A stream that is aborted by its name, and read to its end."""
    PIN = "pin"
    """The prompt is pinned for a while, then asked."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks next.

    Attributes:
        questions: their numbers; one but for WHOLE.
        salt: requests with the same one share the prefix cache.
        increments: of LEAVE and ABORT: after how many.
    """

    questions: tuple[int, ...]
    way: Way
    salt: str
    increments: int = 0


def questions(seed: int, vocab_size: int, max_model_len: int, structured: bool) -> list[Question]:
    """
    Args:
        max_model_len: prompt and output keep within it.
        structured: whether there may be any with a JSON schema, which takes a tokenizer.
    """
    chance = random.Random(f"{seed}-questions")
    lowest = min(100, vocab_size // 8)  # above most models' special tokens
    longest = max(1, min(MAX_PROMPT, max_model_len // 2))
    beginning = [chance.randrange(lowest, vocab_size) for _ in range(longest)]
    made = []
    for number in range(NUM_QUESTIONS):
        prompt = [chance.randrange(lowest, vocab_size) for _ in range(chance.randint(1, longest))]
        shared = chance.randrange(longest) if chance.random() < 0.5 else 0
        params = _params(number, chance, min(MAX_OUTPUT, max_model_len - longest), structured)
        made.append(Question(tuple((beginning[:shared] + prompt)[:longest]), params))
    return made


def asks(seed: int, client: int) -> Iterator[Ask]:
    """What a client asks, one after another, without end."""
    chance = random.Random(f"{seed}-client-{client}")
    ways = (Way.STREAM, Way.WHOLE, Way.LEAVE, Way.ABORT, Way.PIN)
    while True:
        [way] = chance.choices(ways, (5, 2, 1, 1, 1))
        count = chance.randint(1, 4) if way is Way.WHOLE else 1
        chosen = tuple(chance.randrange(NUM_QUESTIONS) for _ in range(count))
        # Most prompts are computed by several, so that some of them are found and some are computed anew.
        salt = chance.choice(("", "", "one", "two", f"own-{chance.getrandbits(32)}"))
        yield Ask(chosen, way, salt, chance.randint(1, 24) if way in (Way.LEAVE, Way.ABORT) else 0)


def _params(number: int, chance: random.Random, longest: int, structured: bool) -> SamplingParams:
    """By turns greedy, seeded, and, if there may be any, JSON, of which every other is seeded too."""
    max_tokens, seed = max(1, chance.randint(longest // 4, longest)), chance.getrandbits(32)
    warm = SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=max_tokens)
    cold = SamplingParams(temperature=0, max_tokens=max_tokens)
    match number % 3:
        case 0:
            return cold.clone(ignore_eos=number % 2 == 0)
        case 1:
            return warm.clone(ignore_eos=True, n=2 if number % 4 == 1 else 1, frequency_penalty=0.3)
        case _ if structured:
            form = StructuredOutputsParams(json=SCHEMA)
            return (warm if number % 2 else cold).clone(structured_outputs=form)
        case _:
            return warm.clone(top_k=20, repetition_penalty=1.2)
