"""Rotary angles of a draft: transformers' own variants, with the settings as SGLang reads them.

Shapes: N rows of a pack of samples, P head size.
"""

import math
from typing import Any

from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

Rotary = tuple[Tensor, Tensor]


class RotaryEmbedding:
    """Angles by the variant that the configuration names. No module: nothing of it is saved or sharded."""

    def __init__(self, config: LlamaConfig) -> None:
        config.rope_parameters = as_served(config.rope_parameters, config.head_dim)
        self._embedding = LlamaRotaryEmbedding(config)

    def __call__(self, like: Tensor, positions_N: Tensor) -> Rotary:
        """Cosines and sines [1, N, P], float32."""
        return self._embedding.to(like.device)(like.float(), positions_N[None])


def as_served(given: dict[str, Any], P: int) -> dict[str, Any]:
    """The settings that make transformers compute what ``sglang.srt.layers.rotary_embedding.get_rope`` does of
    ``given``: the two differ in what ``dynamic`` and a few settings of ``yarn`` mean."""
    if given["rope_type"] == "dynamic":
        # Not by the sequence at hand: one base for all, that of the longest, or where there is an alpha, by that.
        factor = given.get("factor", 1.0)
        stretch = given.get("alpha", factor**2 - (factor - 1))
        return {"rope_type": "default", "rope_theta": given["rope_theta"] * stretch ** (P / (P - 2))}
    if given["rope_type"] == "yarn":
        return {**given, "attention_factor": _yarn_magnitude(given)}
    return given


def _yarn_magnitude(given: dict[str, Any]) -> float:
    """Of cosines and sines; SGLang knows it as ``attn_factor``, and not by transformers' ``attention_factor``."""
    both = given.get("mscale"), given.get("mscale_all_dim")
    scales = (1.0, 0.0) if None in both else both
    own, others = (0.1 * scale * math.log(max(1.0, given["factor"])) + 1.0 for scale in scales)
    return given.get("attn_factor", 1.0) * own / others
