"""Small random checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from headwise.workers.spec import ShardSpec

SHAPES = {
    "mha": (4, 4),
    "gqa": (8, 4),
    "mqa": (4, 1),
    "uneven": (9, 3),
    "grouped": (6, 2),  # 3 and 4 ranks are more than its KV heads
}
"""Query and KV heads by name."""


def small_spec(directory: Path, **changes: Any) -> ShardSpec:
    """Of one rank with such a model, in memory of 1 MiB."""
    settings: dict[str, Any] = {
        "model_dir": str(directory),
        "tensor_parallel_size": 1,
        "dtype": "float32",
        "device": "cpu",
        "block_size": 16,
        "max_num_seqs": 4,
        "max_model_len": 64,
        "kv_memory": "1MiB",
    }
    return ShardSpec(**settings | changes)


def write_checkpoint(directory: Path, heads: int = 4, kv_heads: int = 2, **changes: Any) -> Path:
    """A random Llama of 2 layers, head_dim 16 and a vocabulary of 256; ``changes`` go into its config."""
    settings: dict[str, Any] = {
        "hidden_size": 12 * heads,
        "intermediate_size": 150,
        "num_hidden_layers": 2,
        "vocab_size": 256,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # wide enough that the best tokens are not nearly ties
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    if changes.get("attention_bias") or changes.get("mlp_bias"):
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(directory)
    return directory


def write_mistral(directory: Path, llama: Path, window: int) -> Path:
    """A Mistral with the weights of a Llama."""
    weights = reference_model(llama)
    fields = {name: value for name, value in weights.config.to_dict().items() if name not in _KINDS}
    model = MistralForCausalLM(MistralConfig(**fields, sliding_window=window))
    model.load_state_dict(weights.state_dict())
    model.save_pretrained(directory)
    return directory


_KINDS = ("model_type", "architectures")


def reference_model(directory: Path) -> LlamaForCausalLM:
    """transformers' own model in float32, ready to generate."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def reference_tokens(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """``count`` greedy tokens after a prompt, end-of-sequence ignored."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def assert_greedy(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the model's most likely one after all before it: greedy generation, checked in one forward pass."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    assert logits_TV.argmax(-1).tolist() == tokens
