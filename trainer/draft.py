"""The EAGLE3 draft as SGLang serves it (``LlamaForCausalLMEagle3``), unrolled for training-time test.

Parameter names are those of the checkpoint. Shapes: N rows of a pack of samples, H hidden, D draft vocabulary, Q query
heads, G key heads, P head size, K steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trainer.attention import Bounds, attend


@dataclass
class Past:
    """Keys and values [Q, N, P] of the steps so far, over the samples that ``bounds`` tells apart."""

    bounds: Bounds
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class RMSNorm(nn.Module):
    """Computed in float32 and rounded once, after the weight, as SGLang's ``RMSNorm.forward_native`` does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the sum, taken before the sum is rounded, and the sum."""
        sum32 = x.float() + residual.float()
        return self._norm(sum32).to(x.dtype), sum32.to(x.dtype)

    def _norm(self, x32: Tensor) -> Tensor:
        return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight


class TTTAttention(nn.Module):
    """Reads the token's embedding beside the hidden state; see ``trainer.attention`` for what a row attends to."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H, self.P = config.hidden_size, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(2 * H, config.num_attention_heads * self.P, bias=False)
        self.k_proj = nn.Linear(2 * H, config.num_key_value_heads * self.P, bias=False)
        self.v_proj = nn.Linear(2 * H, config.num_key_value_heads * self.P, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.P, H, bias=False)

    def forward(self, x_N2H: Tensor, rotary: tuple[Tensor, Tensor], past: Past) -> Tensor:
        """Appends this step's keys and values to ``past``."""
        q_QNP, k_GNP, v_GNP = (
            proj(x_N2H).unflatten(-1, (-1, self.P)).transpose(0, 1) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        k_QNP = _rotate(k_GNP, *rotary).repeat_interleave(self.groups, 0)
        past.keys.append(k_QNP)
        past.values.append(v_GNP.repeat_interleave(self.groups, 0))
        out_QNP = attend(_rotate(q_QNP, *rotary), past.keys, past.values, past.bounds)
        return self.o_proj(out_QNP.transpose(0, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(H, intermediate, bias=False)
        self.up_proj = nn.Linear(H, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MidLayer(nn.Module):
    """The one decoder layer; reads the token's embedding beside the hidden state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.hidden_norm = RMSNorm(H, eps), RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)
        self.self_attn, self.mlp = TTTAttention(config), MLP(config)

    def forward(self, embed_NH: Tensor, hidden_NH: Tensor, rotary: Any, past: Past) -> tuple[Tensor, Tensor]:
        """The MLP's output and the residual to add to it."""
        x_N2H = torch.cat([self.input_layernorm(embed_NH), self.hidden_norm(hidden_NH)], -1)
        normed_NH, residual_NH = self.post_attention_layernorm.add(self.self_attn(x_N2H, rotary, past), hidden_NH)
        return self.mlp(normed_NH), residual_NH


class Eagle3Draft(nn.Module):
    """``config`` is the checkpoint's ``config.json``; ``d2t`` and ``t2d`` are kept as given."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        llama = LlamaConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
        H, D = llama.hidden_size, config["draft_vocab_size"]
        self.fc = nn.Linear(3 * H, H, bias=False)
        self.midlayer = MidLayer(llama)
        self.norm = RMSNorm(H, llama.rms_norm_eps)
        self.lm_head = nn.Linear(H, D, bias=False)
        self.register_buffer("d2t", torch.zeros(D, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config["vocab_size"], dtype=torch.bool))
        self._rotary = [LlamaRotaryEmbedding(llama)]  # in a list: no submodule, so nothing of it is saved or sharded

    @property
    def target_ids_D(self) -> Tensor:
        """The target's id of each draft id."""
        return self.d2t + torch.arange(self.d2t.numel(), device=self.d2t.device)

    def forward(
        self,
        embed_NH: Tensor,
        aux_N3H: Tensor,
        positions_N: Tensor,
        bounds: Bounds,
        steps: int,
        objective: Callable[[list[Tensor], Tensor], Any],
    ) -> Any:
        """``objective(hidden_KNH, head_DH)`` of the normed hidden states of each step and the draft's head.

        Row n of step k reads the embedding of token n+1+k and predicts token n+2+k of its sample. What a row reads
        beyond its sample's end is of no use, and no row with a teacher sees it. The objective runs in here because the
        head is whole only in here, under FSDP.
        """
        hidden_NH, past, hidden_KNH = self.fc(aux_N3H), Past(bounds), []
        rotary_embedding = self._rotary[0].to(hidden_NH.device)
        for k in range(steps):
            rotary = rotary_embedding(hidden_NH.float(), positions_N[None] + k)
            later_embed_NH = F.pad(embed_NH, (0, 0, 0, 1 + k))[1 + k :]
            normed_NH, hidden_NH = self.norm.add(*self.midlayer(later_embed_NH, hidden_NH, rotary, past))
            hidden_KNH.append(normed_NH)
        return objective(hidden_KNH, self.lm_head.weight)


def _rotate(x_HNP: Tensor, cos_1NP: Tensor, sin_1NP: Tensor) -> Tensor:
    wide = x_HNP.to(torch.promote_types(x_HNP.dtype, cos_1NP.dtype))
    first, second = wide.chunk(2, -1)
    return (wide * cos_1NP + torch.cat([-second, first], -1) * sin_1NP).to(x_HNP.dtype)
