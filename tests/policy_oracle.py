"""What a Llama checkpoint computes under a KV policy, in plain torch: explicit positions, explicit masks, no cache.

Nothing of the engine is used but what a policy and a form of keys and values are called. All is float64 but for what is
kept: integers and narrow floats are rounded as the engine rounds them. A number close to the middle between two of
those may be rounded the other way there, because float32 is not float64, and is then off by a whole step. So logits are
compared to 1e-5 of the largest where float32 is kept, and to more otherwise. To more under the dense policy, too, whose
angles are float32 in the engine, as they are in transformers: 300 tokens of a tiny random model make that 2e-5.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import DENSE, KvPolicy, Reach

FLOATS = KvFormat("float32", "float32")


class Oracle:
    """One checkpoint. Its attention is written here, all other weights are applied as transformers names them."""

    def __init__(self, directory: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64, local_files_only=True).eval()
        self._model, self._config = model, model.config
        self._head_dim = model.config.head_dim
        self._inv_freq_D = model.model.rotary_emb.inv_freq.double()

    def logits(self, tokens: list[int], policy: KvPolicy | None = None, format: KvFormat = FLOATS) -> Tensor:
        """Of every position: float64 [T, V]. ``policy``: None is dense."""
        return self._forward(torch.tensor([tokens]), policy, format)[0]

    def recomputed(self, tokens: list[int], window: int) -> Tensor:
        """The same by sliding window with recomputation: each position from the last tokens alone, the first of them at
        position 0."""
        first_TV = self.logits(tokens[:window])
        if len(tokens) <= window:
            return first_TV
        windows_BT = torch.tensor(tokens).unfold(0, window, 1)[1:]
        rest = [self._forward(part_BT, None, FLOATS)[:, -1] for part_BT in torch.split(windows_BT, 64)]
        return torch.cat([first_TV, *rest])

    def greedy(
        self, prompt: list[int], count: int, policy: KvPolicy | None = None, format: KvFormat = FLOATS
    ) -> list[int]:
        """The most likely tokens after a prompt, each computed from all before it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, policy, format)[-1].argmax()))
        return tokens[len(prompt) :]

    def assert_greedy(
        self,
        prompt: list[int],
        tokens: list[int],
        policy: KvPolicy | None = None,
        format: KvFormat = FLOATS,
        tolerance: float = 1e-5,
    ) -> None:
        """Each token is the most likely one after all before it, or short of it by no more than the tolerance times the
        largest logit."""
        logits_TV = self.logits(prompt + tokens[:-1], policy, format)[len(prompt) - 1 :]
        chosen_T = logits_TV[torch.arange(len(tokens)), torch.tensor(tokens)]
        short_T = logits_TV.amax(-1) - chosen_T
        assert (short_T <= tolerance * logits_TV.abs().max()).all(), short_T.tolist()

    @torch.inference_mode()
    def _forward(self, tokens_BT: Tensor, policy: KvPolicy | None, format: KvFormat) -> Tensor:
        """[B, T, V] of texts of one length. On one thread: there is not enough to do for more."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._compute(tokens_BT, policy, format)
        finally:
            torch.set_num_threads(threads)

    def _compute(self, tokens_BT: Tensor, policy: KvPolicy | None, format: KvFormat) -> Tensor:
        x_BTE = self._model.model.embed_tokens(tokens_BT)
        for index, layer in enumerate(self._model.model.layers):
            row = [DENSE] * self._config.num_key_value_heads
            if policy is not None:
                row = [policy.reaches[group] for group in policy.groups_LK[index]]
            x_BTE = x_BTE + self._attend(layer.self_attn, self._norm(layer.input_layernorm, x_BTE), row, format)
            x_BTE = x_BTE + layer.mlp(self._norm(layer.post_attention_layernorm, x_BTE))
        logits_BTV: Tensor = self._model.lm_head(self._norm(self._model.model.norm, x_BTE))
        return logits_BTV

    def _norm(self, norm: nn.Module, x_BTE: Tensor) -> Tensor:
        return functional.rms_norm(x_BTE, (x_BTE.shape[-1],), norm.weight, self._config.rms_norm_eps)

    def _attend(self, attention: nn.Module, x_BTE: Tensor, reaches: list[Reach], format: KvFormat) -> Tensor:
        parts = (attention.q_proj(x_BTE), attention.k_proj(x_BTE), attention.v_proj(x_BTE))
        q_BHTD, k_BKTD, v_BKTD = (x_BTX.view(*x_BTX.shape[:2], -1, self._head_dim).transpose(1, 2) for x_BTX in parts)
        text_T = torch.arange(x_BTE.shape[1])
        # Keys are kept as they are at their place in the text.
        k_BKTD = _kept(self._rotate(k_BKTD, text_T), format.keys)
        v_BKTD = _kept(v_BKTD, format.values)
        group, heads = q_BHTD.shape[1] // len(reaches), []
        for head, reach in enumerate(reaches):
            q_BGTD = q_BHTD[:, head * group : (head + 1) * group]
            heads.append(self._attend_head(q_BGTD, k_BKTD[:, head], v_BKTD[:, head], reach))
        o_BTE: Tensor = attention.o_proj(torch.cat(heads, 1).transpose(1, 2).flatten(2))
        return o_BTE

    def _attend_head(self, q_BGTD: Tensor, k_BCD: Tensor, v_BCD: Tensor, reach: Reach) -> Tensor:
        """The query heads of one KV head. As long as the cache holds all of the text, everything is at 0, 1, ..."""
        length = k_BCD.shape[1]
        text_T = torch.arange(min(length, reach.span or length))
        q_BGAD = self._rotate(q_BGTD[:, :, : len(text_T)], text_T)
        k_B1AD, v_B1AD = k_BCD[:, None, : len(text_T)], v_BCD[:, None, : len(text_T)]
        scores_BGAA = q_BGAD @ k_B1AD.transpose(2, 3) * self._head_dim**-0.5
        unseen_AA = text_T > text_T[:, None]
        parts = [scores_BGAA.masked_fill(unseen_AA, float("-inf")).softmax(-1) @ v_B1AD]
        for start in range(len(text_T), length, 64):
            late_T = torch.arange(start, min(start + 64, length))
            parts.append(self._attend_late(q_BGTD[:, :, late_T], k_BCD, v_BCD, late_T, reach))
        return torch.cat(parts, dim=2)

    def _attend_late(self, q_BGTD: Tensor, k_BCD: Tensor, v_BCD: Tensor, late_T: Tensor, reach: Reach) -> Tensor:
        """The cache holds S sinks at 0 to S - 1 and L tokens at S to S + L - 1; the query is the last of those."""
        assert reach.window is not None
        sinks_TS = torch.arange(reach.sinks).expand(len(late_T), -1)
        window_TL = late_T[:, None] + torch.arange(1 - reach.window, 1)
        held_TX = torch.cat([sinks_TS, window_TL], dim=1)
        at_X = torch.arange(reach.sinks + reach.window)
        k_BTXD = self._rotate(k_BCD[:, held_TX], at_X - held_TX)  # from its place in the text to that in the cache
        q_BGTD = self._rotate(q_BGTD, at_X[-1:])
        scores_BGTX = torch.einsum("bgtd,btxd->bgtx", q_BGTD, k_BTXD) * self._head_dim**-0.5
        return torch.einsum("bgtx,btxd->bgtd", scores_BGTX.softmax(-1), v_BCD[:, held_TX])

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of [..., positions, D]."""
        angles = positions.double().unsqueeze(-1) * self._inv_freq_D
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def assert_logits(found_TV: Tensor, expected_TV: Tensor, tolerance: float = 1e-5) -> None:
    """They differ by no more than the tolerance times the largest logit."""
    assert found_TV.shape == expected_TV.shape
    error = (found_TV.double() - expected_TV).abs().max() / expected_TV.abs().max()
    assert error <= tolerance, f"off by {float(error):.2g} of the largest logit"


def _kept(x: Tensor, kind: str) -> Tensor:
    """What is left of numbers, [..., D], that are kept in some form."""
    if kind not in ("int8", "int4"):
        return x if kind == "float32" else x.to(getattr(torch, kind)).double()
    levels, size = (255, x.shape[-1]) if kind == "int8" else (15, min(32, x.shape[-1]))
    x_GS = x.float().reshape(*x.shape[:-1], -1, size)
    zero = x_GS.amin(-1, keepdim=True).half().float()
    step = ((x_GS.amax(-1, keepdim=True) - zero).clamp(min=0) / levels).half().float()
    code = ((x_GS - zero) / step).round().clamp(0, levels)
    return (torch.where(step == 0, 0, code) * step + zero).reshape(x.shape).double()
