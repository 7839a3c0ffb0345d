"""The EAGLE3 draft as SGLang serves it (``LlamaForCausalLMEagle3``), unrolled for training-time test.

Parameter names are those of the checkpoint. Shapes: B samples, L rows, H hidden, D draft vocabulary, Q query
heads, G key heads, P head size, K steps so far.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


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
    """Row t at step k attends to the true prefix (step-0 keys up to t) and to its own key of each later step.

    That is what a served draft sees: the verified prefix, then its own chain (EAGLE-3, section 3.2).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H = config.hidden_size
        self.Q, self.G, self.P = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(2 * H, self.Q * self.P, bias=False)
        self.k_proj = nn.Linear(2 * H, self.G * self.P, bias=False)
        self.v_proj = nn.Linear(2 * H, self.G * self.P, bias=False)
        self.o_proj = nn.Linear(self.Q * self.P, H, bias=False)

    def forward(self, x_BL2H: Tensor, rotary: tuple[Tensor, Tensor], cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Appends this step's keys and values to ``cache``."""
        q_BQLP, k_BGLP, v_BGLP = (
            proj(x_BL2H).unflatten(-1, (-1, self.P)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BQLP, k_BGLP = _rotate(q_BQLP, *rotary), _rotate(k_BGLP, *rotary)
        cache.append((k_BGLP, v_BGLP))
        if len(cache) == 1:
            out_BQLP = F.scaled_dot_product_attention(q_BQLP, k_BGLP, v_BGLP, is_causal=True, enable_gqa=True)
        else:
            out_BQLP = self._attend_to_chain(q_BQLP, cache)
        return self.o_proj(out_BQLP.transpose(1, 2).flatten(2))

    def _attend_to_chain(self, q_BQLP: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        q_BGRLP = q_BQLP.unflatten(1, (self.G, -1)) * self.P**-0.5
        (k0_BGLP, v0_BGLP), later = cache[0], cache[1:]
        L = q_BQLP.shape[2]
        future_LL = torch.ones(L, L, dtype=torch.bool, device=q_BQLP.device).triu(1)
        prefix_BGRLL = (q_BGRLP @ k0_BGLP[:, :, None].transpose(-1, -2)).masked_fill(future_LL, float("-inf"))
        own_BGRLK = torch.stack([(q_BGRLP * k[:, :, None]).sum(-1) for k, _ in later], -1)
        probs = torch.cat([prefix_BGRLL, own_BGRLK], -1).softmax(-1, dtype=torch.float32).to(q_BQLP.dtype)
        out_BGRLP = probs[..., :L] @ v0_BGLP[:, :, None]
        for k, (_, v_BGLP) in enumerate(later):
            out_BGRLP = out_BGRLP + probs[..., L + k, None] * v_BGLP[:, :, None]
        return out_BGRLP.flatten(1, 2)


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

    def forward(self, embed_BLH: Tensor, hidden_BLH: Tensor, rotary: Any, cache: list) -> tuple[Tensor, Tensor]:
        """The MLP's output and the residual to add to it."""
        x_BL2H = torch.cat([self.input_layernorm(embed_BLH), self.hidden_norm(hidden_BLH)], -1)
        attended_BLH = self.self_attn(x_BL2H, rotary, cache)
        normed_BLH, residual_BLH = self.post_attention_layernorm.add(attended_BLH, hidden_BLH)
        return self.mlp(normed_BLH), residual_BLH


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

    def forward(self, embed_BLH: Tensor, aux_BL3H: Tensor, positions_BL: Tensor, steps: int) -> list[Tensor]:
        """Logits [B, L, D] of each step: row t of step k predicts token t+2+k of its sample.

        ``embed_BLH`` holds row t's input of step 0, the embedding of token t+1; step k reads k rows further on.
        """
        return list(self._unroll(embed_BLH, aux_BL3H, positions_BL, steps))

    def _unroll(self, embed_BLH: Tensor, aux_BL3H: Tensor, positions_BL: Tensor, steps: int) -> Iterator[Tensor]:
        hidden_BLH, cache = self.fc(aux_BL3H), []
        rotary_embedding = self._rotary[0].to(hidden_BLH.device)
        for k in range(steps):
            rotary = rotary_embedding(hidden_BLH.float(), positions_BL + k)
            later_embed_BLH = F.pad(embed_BLH, (0, 0, 0, k))[:, k:]
            normed_BLH, hidden_BLH = self.norm.add(*self.midlayer(later_embed_BLH, hidden_BLH, rotary, cache))
            yield self.lm_head(normed_BLH)


def _rotate(x_BHLP: Tensor, cos_BLP: Tensor, sin_BLP: Tensor) -> Tensor:
    first, second = x_BHLP.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x_BHLP.float() * cos_BLP[:, None] + turned * sin_BLP[:, None]).to(x_BHLP.dtype)
