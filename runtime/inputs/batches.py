"""One prompt or many, and the parameters of each."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.runtime.inputs.processor import Prompt
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import InvalidValueError


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts, of which there may be one that is not in a list.

    Raises:
        InvalidValueError: it is neither a prompt nor a list.
    """
    if isinstance(prompts, (str, bytes)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidValueError("prompts", prompts, "must be a string, a list of token ids, or a list of such")
    if prompts and not any(isinstance(item, Sequence) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """The parameters of each of ``count`` prompts.

    Args:
        params: of all prompts, or of each; None is the defaults.

    Raises:
        InvalidValueError: there are more or fewer of them than prompts.
    """
    if params is None:
        return [SamplingParams()] * count
    if not isinstance(params, Sequence):
        return [params] * count
    if len(params) != count:
        raise InvalidValueError("sampling_params", f"{len(params)} of them", f"one, or one for each of {count} prompts")
    return list(params)
