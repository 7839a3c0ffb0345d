"""EAGLE3 drafts that norm each query and key head before it is turned, as Qwen3 does: ``qk_norm`` in config.json.

SGLang's ``LlamaForCausalLMEagle3`` has no such norms, and would leave their weights out without a word. Shapes: T
tokens, Q query heads of size P.
"""

from typing import Any

from sglang.srt.layers.layernorm import RMSNorm
from torch import Tensor, nn


def add_norms(result: None, layer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``llama_eagle3.LlamaDecoderLayer.__init__``."""
    if getattr(config, "qk_norm", False):
        attention = layer.self_attn
        attention.q_norm, attention.k_norm = (RMSNorm(attention.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        attention.rotary_emb = _NormedRotary(attention.rotary_emb, attention.q_norm, attention.k_norm)


class _NormedRotary(nn.Module):
    """In the place of a rotary embedding, which ``LlamaAttention`` hands its queries and keys."""

    def __init__(self, rotary: nn.Module, *norms: RMSNorm) -> None:
        super().__init__()
        self._rotary = rotary
        self._norms = norms  # the attention's, by whose names their weights are loaded

    def forward(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, Q P], and keys likewise."""
        normed = (_normed(norm, x) for norm, x in zip(self._norms, heads, strict=True))
        return self._rotary(positions, *normed)


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    return norm(x.reshape(-1, norm.weight.numel())).view(x.shape)
