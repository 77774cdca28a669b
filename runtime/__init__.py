"""What a request lives through: the API, the scheduler, the engine and its KV blocks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.runtime.llm import LLM
    from headwise.runtime.output import CompletionOutput, Logprob, OutputDelta, RequestOutput
    from headwise.runtime.sampling_params import SamplingParams
    from headwise.runtime.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "OutputDelta",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]

_HOMES = {
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "structured_outputs",
}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the books of KV blocks, and a client, need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'output')}"), name)
