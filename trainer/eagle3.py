"""The EAGLE3 draft as SGLang serves it (``LlamaForCausalLMEagle3``), and the variants that its config.json names.

``bias`` gives ``fc`` one; EAGLE 3.1 sets ``fc_norm`` (a norm for each captured layer before ``fc``) and ``norm_output``
(the next step reads the normed hidden state); ``norm_before_fc`` norms all captured states at once; ``qk_norm`` norms
each query and key head before it is turned, as Qwen3 does (served by ``server_patches.common.qk_norm``). Shapes: N rows
of a pack of samples, or the L roots of chains among them; H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from sglang_specforge.llama import as_llama
from trainer.draft import Draft, Past
from trainer.layers import MLP, RMSNorm, TTTAttention
from trainer.rotary import Rotary, RotaryEmbedding


class MidLayer(nn.Module):
    """The one decoder layer; ``read_NF`` is what it reads of the token's embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.hidden_norm = RMSNorm(H, eps), RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)
        self.self_attn, self.mlp = TTTAttention(config), MLP(config)

    def weights(self) -> tuple[int, int, int, int]:
        """How many a state meets for its query, key and value, as many as a token does; and after attention."""
        query, key, value = (p.weight.numel() // 2 for p in self.self_attn.projections())
        mlp = sum(p.numel() for p in self.mlp.parameters())
        return query, key, value, self.self_attn.o_proj.weight.numel() + mlp

    def read_embed(self, embed_NH: Tensor) -> Tensor:
        return self.self_attn.read_embed(self.input_layernorm(embed_NH))

    def forward(self, read_NF: Tensor, hidden_NH: Tensor, rotary: Rotary, past: Past) -> tuple[Tensor, Tensor]:
        """The MLP's output at the roots, and the residual to add to it."""
        attended_LH = self.self_attn(read_NF, self.hidden_norm(hidden_NH), rotary, past)
        normed_LH, residual_LH = self.post_attention_layernorm.add(attended_LH, past.roots.pick(hidden_NH))
        return self.mlp(normed_LH), residual_LH


class Eagle3Draft(Draft):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        llama = as_llama(config)
        H, eps = llama.hidden_size, llama.rms_norm_eps
        self.input_norm = RMSNorm(3 * H, eps) if config.get("norm_before_fc") else None
        self.fc_norm = nn.ModuleList(RMSNorm(H, eps) for _ in range(3)) if config.get("fc_norm") else None
        self.fc = nn.Linear(3 * H, H, bias=bool(config.get("bias")))
        self.midlayer = MidLayer(llama)
        self.norm, self._norms_output = RMSNorm(H, eps), bool(config.get("norm_output"))
        self.lm_head = nn.Linear(H, config["draft_vocab_size"], bias=False)
        self._rotary = RotaryEmbedding(llama)
        self.turns_by_axes = self._rotary.has_axes

    def start(self, aux_N3H: Tensor) -> Tensor:
        if self.input_norm is not None:
            aux_N3H = self.input_norm(aux_N3H)
        if self.fc_norm is not None:
            layers = zip(self.fc_norm, aux_N3H.chunk(3, -1), strict=True)
            aux_N3H = torch.cat([norm(aux_NH) for norm, aux_NH in layers], -1)
        return self.fc(aux_N3H)

    def read(self, embed_NH: Tensor) -> Tensor:
        return self.midlayer.read_embed(embed_NH)

    def products(self, rows: int, roots: int, steps: int) -> int:
        query, key, value, rest = self.midlayer.weights()
        once = self.fc.weight.numel() + 2 * (key + value) + query  # of token and state, the query for the token alone
        return rows * once + roots * (steps * (query + rest) + (steps - 1) * (key + value))

    def advance(self, read_NF: Tensor, state_NF: Tensor, positions_N: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        rotary = self._rotary(state_NF, positions_N)
        normed_LH, hidden_LH = self.norm.add(*self.midlayer(read_NF, state_NF, rotary, past))
        return normed_LH, normed_LH if self._norms_output else hidden_LH
