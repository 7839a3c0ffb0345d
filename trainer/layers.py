"""Layers that drafts are made of, with the rounding of SGLang's own.

Shapes: N rows of a pack of samples, L roots of chains among them, H hidden, Q query heads, G key heads, P head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from trainer.attention import attend
from trainer.draft import Past
from trainer.fused import fusable, wide
from trainer.rotary import Rotary


class RMSNorm(nn.Module):
    """Computed in float32 and rounded once, after the weight, as SGLang's ``RMSNorm.forward_native`` does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Normed.apply(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the sum, taken before the sum is rounded, and the sum."""
        return _NormedSum.apply(x, residual, self.weight, self.eps)


class _Normed(torch.autograd.Function):
    """Keeps the input and one number a row, instead of each factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_grads(grad, *ctx.saved_tensors), None


class _NormedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total, scale = _norm_sum(x, residual, weight, eps)
        summands = (total,) if total.dtype == scale.dtype else (x, residual)  # the sum itself, where it isn't rounded
        ctx.save_for_backward(weight, scale, *summands)
        return normed, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = _norm_sum_grads(grad, grad_total, *ctx.saved_tensors)
        return dx, dx, dweight, None


@fusable
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` normed, and what its rows were scaled by [N, 1]."""
    rows = x.to(wide(x.dtype))
    scale = torch.rsqrt(torch.linalg.vecdot(rows, rows)[..., None] / x.shape[-1] + eps)
    return (rows * scale).mul_(weight).to(x.dtype), scale


@fusable
def _norm_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x.to(wide(x.dtype)) + residual
    normed, scale = _norm(total, weight, eps)
    return normed.to(x.dtype), total.to(x.dtype), scale


@fusable
def _norm_grads(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    normed = x.to(scale.dtype) * scale
    grad_wide = grad.to(scale.dtype)
    dweight = (grad_wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
    scaled = grad_wide * weight
    mean = torch.linalg.vecdot(scaled, normed)[..., None] / x.shape[-1]
    return scaled.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype), dweight


@fusable
def _norm_sum_grads(
    grad: Tensor, grad_total: Tensor, weight: Tensor, scale: Tensor, *summands: Tensor
) -> tuple[Tensor, Tensor]:
    dtotal, dweight = _norm_grads(grad, sum(summands[1:], summands[0].to(scale.dtype)), weight, scale)
    return (dtotal + grad_total).to(grad.dtype), dweight


class TTTAttention(nn.Module):
    """Reads the token's embedding beside the hidden state; see ``trainer.attention`` for what a row attends to.

    A projection of both is the sum of two: the embedding's is the same at every step but for its place, so it is made
    once (``read_embed``).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.H, self.P = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(2 * self.H, config.num_attention_heads * self.P, bias=False)
        self.k_proj = nn.Linear(2 * self.H, config.num_key_value_heads * self.P, bias=False)
        self.v_proj = nn.Linear(2 * self.H, config.num_key_value_heads * self.P, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.P, self.H, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.P, config.rms_norm_eps) if getattr(config, "qk_norm", False) else nn.Identity()
            for _ in range(2)
        )

    def read_embed(self, embed_NH: Tensor) -> Tensor:
        """The normed embedding's part of query, key and value, side by side."""
        return torch.cat([F.linear(embed_NH, p.weight[:, : self.H]) for p in self.projections()], -1)

    def forward(self, read_NF: Tensor, hidden_NH: Tensor, rotary: Rotary, past: Past) -> Tensor:
        """What each root attends to [L, H]; appends this step's keys and values to ``past``."""
        pick, widths = past.roots.pick, [p.out_features for p in self.projections()]
        query_NF, key_NF, value_NF = read_NF.split(widths, -1)
        q_QLP = self.q_norm(self._project(self.q_proj, pick(query_NF), pick(hidden_NH)))
        k_GNP = self.k_norm(self._project(self.k_proj, key_NF, hidden_NH))
        past.keys.append(rotate(k_GNP, *rotary))
        past.values.append(self._project(self.v_proj, value_NF, hidden_NH))
        q_QLP = rotate(q_QLP, *(pick(angles, dim=1) for angles in rotary))
        out_QLP = attend(q_QLP, past.keys, past.values, past.roots)
        return self.o_proj(out_QLP.transpose(0, 1).flatten(1))

    def _project(self, projection: nn.Linear, read_NF: Tensor, hidden_NH: Tensor) -> Tensor:
        """[heads, N, P]."""
        rows = torch.addmm(read_NF, hidden_NH, projection.weight[:, self.H :].mT)
        return rows.unflatten(-1, (-1, self.P)).transpose(0, 1)

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(H, intermediate, bias=False)
        self.up_proj = nn.Linear(H, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _GatedDown.apply(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class _GatedDown(torch.autograd.Function):
    """``(silu(gate) * up) @ down.T``; the product is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, gate_NI: Tensor, up_NI: Tensor, down_HI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NI, up_NI, down_HI)
        return F.linear(_gated(gate_NI, up_NI), down_HI)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_NI, up_NI, down_HI = ctx.saved_tensors
        gated_NI, dgate_NI, dup_NI = _gated_grads(grad_NH @ down_HI, gate_NI, up_NI)
        return dgate_NI, dup_NI, grad_NH.mT @ gated_NI


@fusable
def _gated(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    return F.silu(gate_NI) * up_NI


@fusable
def _gated_grads(grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product itself, and the gradients of gate and up."""
    silu_NI = F.silu(gate_NI)
    return silu_NI * up_NI, torch.ops.aten.silu_backward(grad_NI * up_NI, gate_NI), silu_NI.mul_(grad_NI)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_HNP: Tensor, cos_1NP: Tensor, sin_1NP: Tensor) -> Tensor:
        ctx.save_for_backward(cos_1NP, sin_1NP)
        return _rotate(x_HNP, cos_1NP, sin_1NP)

    @staticmethod
    def backward(ctx: Any, grad_HNP: Tensor) -> tuple[Tensor | None, ...]:
        # Both halves of a row's sines are the same, so the transpose of the rotation is the rotation back.
        cos_1NP, sin_1NP = ctx.saved_tensors
        return _rotate(grad_HNP, cos_1NP, -sin_1NP), None, None


def rotate(x_HNP: Tensor, cos_1NP: Tensor, sin_1NP: Tensor) -> Tensor:
    return _Rotated.apply(x_HNP, cos_1NP, sin_1NP)


@fusable
def _rotate(x_HNP: Tensor, cos_1NP: Tensor, sin_1NP: Tensor) -> Tensor:
    rows = x_HNP.to(wide(x_HNP.dtype))
    first, second = rows.chunk(2, -1)
    return (rows * cos_1NP + torch.cat([-second, first], -1) * sin_1NP).to(x_HNP.dtype)
