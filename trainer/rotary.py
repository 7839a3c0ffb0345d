"""Rotary angles of a draft: transformers' own variants, with the settings as SGLang reads them.

Shapes: N rows of a pack of samples, P head size, F frequencies, half of it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

Rotary = tuple[Tensor, Tensor]


class RotaryEmbedding:
    """Angles by the variant that the configuration names. No module: nothing of it is saved or sharded."""

    def __init__(self, config: LlamaConfig) -> None:
        self._axis_F = _axes(config.rope_parameters, config.head_dim // 2)
        config.rope_parameters = as_served(config.rope_parameters, config.head_dim)
        self._embedding = LlamaRotaryEmbedding(config)

    @property
    def has_axes(self) -> bool:
        """Whether it takes positions in time, height and width."""
        return self._axis_F is not None

    def __call__(self, like: Tensor, positions: Tensor) -> Rotary:
        """Cosines and sines [1, N, P], float32, of positions [N], or [N, 3] on the three axes."""
        embedding = self._embedding.to(like.device)
        if positions.ndim == 1:
            return embedding(like.float(), positions[None])
        self._axis_F = self._axis_F.to(positions.device)
        angle_1NP = (positions[:, self._axis_F] * embedding.inv_freq).repeat(1, 2)[None]
        return angle_1NP.cos(), angle_1NP.sin()


def _axes(given: dict[str, Any], F: int) -> Tensor | None:
    """The axis that turns each of F frequencies, int64, as ``MRotaryEmbedding`` of SGLang has it."""
    if (section := given.get("mrope_section")) is None:
        return None
    if not given.get("mrope_interleaved"):
        return torch.arange(3).repeat_interleave(torch.tensor(section))
    axis_F = torch.zeros(F, dtype=torch.int64)
    for axis in (1, 2):
        axis_F[axis : 3 * section[axis] : 3] = axis
    return axis_F


def as_served(given: dict[str, Any], P: int) -> dict[str, Any]:
    """The settings that make transformers compute what ``sglang.srt.layers.rotary_embedding.get_rope`` does of
    ``given``: the two differ in what ``dynamic`` and a few settings of ``yarn`` mean."""
    if "mrope_section" in given:  # whatever else is said (``llama_eagle3.LlamaModel``)
        return {"rope_type": "default", "rope_theta": given["rope_theta"]}
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
