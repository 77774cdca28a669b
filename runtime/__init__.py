"""What a request lives through: the API, the scheduler, the engine and its KV blocks."""

from headwise.runtime.llm import LLM, OutputDelta
from headwise.runtime.output import CompletionOutput, Logprob, RequestOutput
from headwise.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "OutputDelta", "RequestOutput", "SamplingParams"]
