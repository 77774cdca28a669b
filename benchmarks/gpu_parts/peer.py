"""The same weights in transformers, in the same run."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpu_parts.cases import Case, WrongNumbersError
from gpu_parts.served import Served
from headwise.workers.model.model_config import ModelConfig

_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""The largest difference of log-probabilities: two orders of rounding, in all layers one after another."""


def measure(served: Served, ours_tokens_per_s: float | None) -> Iterator[Case]:
    """Tokens a second of its decode steps, with a static cache, compiled where that works; and whether its
    log-probabilities are ours.

    Args:
        ours_tokens_per_s: ours at the same number of rows and about the same context; None where it was not measured.

    Raises:
        WrongNumbersError: its log-probabilities are others.
    """
    rows, prompt, tokens = served.sizes.peer
    model = _model(served)
    difference = _difference(served, model)
    yield {"rows": rows, "prompt": prompt, "difference": difference}
    seconds, compiled, why = 0.0, False, ""
    try:
        seconds = _seconds_a_step(served, model, rows, prompt, tokens, compiled=True)
        compiled = hasattr(model, "_compiled_call")
    except Exception as error:  # a compiler may fail with anything
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"[:200]
        seconds = _seconds_a_step(served, model, rows, prompt, tokens, compiled=False)
    yield {"compiled": compiled, "not_compiled_because": why, "wall_ms": seconds * 1e3, "tokens_per_s": rows / seconds}
    yield {"ours_over_theirs": None if ours_tokens_per_s is None else ours_tokens_per_s / (rows / seconds)}
    if not difference <= _LIMITS[served.cache.dtype]:
        raise WrongNumbersError(f"log-probabilities differ from those of transformers by {difference:.3g}")


def _difference(served: Served, model: Any) -> float:
    """The largest, over the tokens that are the most likely of ours after a prompt."""
    prompt = served.tokens(served.sizes.compared)
    ours = served.logprobs(prompt)
    with torch.inference_mode():
        logits_V = model(torch.tensor([prompt], device=served.device.at), logits_to_keep=1).logits[0, -1]
    theirs: list[float] = logits_V.float().log_softmax(-1)[list(ours.top_ids)].tolist()
    return max(abs(one - other) for one, other in zip(ours.top, theirs, strict=True))


def _seconds_a_step(served: Served, model: Any, rows: int, prompt: int, tokens: int, compiled: bool) -> float:
    """The median of the second half of the steps of a call to `generate`, after a call that compiles and warms up."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Ends(StoppingCriteria):
        """Takes the time of each step, and stops nothing."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            served.device.wait()
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor([served.tokens(prompt + row)[-prompt:] for row in range(rows)], device=served.device.at)
    for _ in range(2):
        times: list[float] = []
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            disable_compile=not compiled,
            stopping_criteria=StoppingCriteriaList([Ends()]),
        )
    ends = times[len(times) // 2 :]
    return statistics.median(after - before for before, after in pairwise(ends))


def _model(served: Served) -> Any:
    """Views of the weights that we serve, so that they are there once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**_fields(served.config))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(_named(served), assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(served.device.at)  # its buffers are no weights
    model.generation_config.pad_token_id = 0
    model.train(False)
    return model


def _fields(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": config.rope.type, "rope_theta": config.rope.theta}
    if config.rope.type == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {name: getattr(config.rope, name) for name in names}
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }


def _named(served: Served) -> dict[str, Tensor]:
    weights, config = served.weights, served.config
    named = {"model.embed_tokens.weight": weights.embed_VE, "model.norm.weight": weights.final_norm_E}
    named["lm_head.weight"] = weights.lm_head_VE
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        q, k, v = torch.split(layer.qkv_weight, [heads, keys, keys])
        gate, up = layer.gate_up_weight.chunk(2)
        parts = {
            "input_layernorm": layer.attn_norm_E,
            "post_attention_layernorm": layer.mlp_norm_E,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o_weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down_weight,
        }
        named |= {f"model.layers.{index}.{name}.weight": x for name, x in parts.items()}
    return named
