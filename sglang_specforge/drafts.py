"""Kinds of drafts: which tensors a checkpoint holds, what it can be trained from, and the trainer's module for it.

A kind is known by the first entry of ``architectures`` in config.json. Other packages add theirs with an entry point in
the group ``sglang_specforge.drafts`` that names a ``DraftKind``. Shapes: H hidden, V target vocabulary, D draft
vocabulary, Q and K query and key/value widths, I intermediate.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]
_GROUP = "sglang_specforge.drafts"


class CheckpointError(ValueError):
    """A draft checkpoint cannot be used; the message names the tensor, fingerprint or architecture at fault."""


@dataclass(frozen=True)
class DraftKind:
    """``shapes(config)`` gives the tensors of a checkpoint without ``d2t`` [D] and ``t2d`` [V], which every kind has.

    ``module`` names the subclass of ``trainer.draft.Draft``, as ``"package.module:Class"``: the server never imports
    it. ``computed_with`` are the keys of config.json that change what the weights compute.
    """

    architecture: str
    shapes: Callable[[dict[str, Any]], Shapes]
    module: str
    computed_with: tuple[str, ...] = ()


def _eagle3_shapes(config: dict[str, Any]) -> Shapes:
    H, D, I = (config[k] for k in ("hidden_size", "draft_vocab_size", "intermediate_size"))  # noqa: E741
    Q, K = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    variants: Shapes = {}
    if config.get("bias"):
        variants["fc.bias"] = (H,)
    if config.get("norm_before_fc"):
        variants["input_norm.weight"] = (3 * H,)
    if config.get("qk_norm"):
        variants |= {f"midlayer.self_attn.{name}.weight": (config["head_dim"],) for name in ("q_norm", "k_norm")}
    if config.get("fc_norm"):
        variants |= {f"fc_norm.{i}.weight": (H,) for i in range(3)}
    return variants | {
        "fc.weight": (H, 3 * H),
        "midlayer.self_attn.q_proj.weight": (Q, 2 * H),
        "midlayer.self_attn.k_proj.weight": (K, 2 * H),
        "midlayer.self_attn.v_proj.weight": (K, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, Q),
        "midlayer.mlp.gate_proj.weight": (I, H),
        "midlayer.mlp.up_proj.weight": (I, H),
        "midlayer.mlp.down_proj.weight": (H, I),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.post_attention_layernorm.weight": (H,),
        "norm.weight": (H,),
        "lm_head.weight": (D, H),
    }


EAGLE3_VARIANTS = ("bias", "norm_before_fc", "fc_norm", "norm_output", "qk_norm")
EAGLE3 = DraftKind(
    "LlamaForCausalLMEagle3",
    _eagle3_shapes,
    "trainer.eagle3:Eagle3Draft",
    ("num_attention_heads", "head_dim", "rms_norm_eps", "rope_parameters", "eagle_config", *EAGLE3_VARIANTS),
)
_OVERRIDDEN = ("max_position_embeddings", "rms_norm_eps")  # what the trainer's modules read, beside rotary settings
_kinds: dict[str, DraftKind] = {EAGLE3.architecture: EAGLE3}


def register(kind: DraftKind) -> DraftKind:
    """Make a kind known in this process. Raises ValueError where its architecture is taken."""
    if _kinds.setdefault(kind.architecture, kind) is not kind:
        raise ValueError(f"draft architecture {kind.architecture} is registered already")
    return kind


def kind_of(config: dict[str, Any]) -> DraftKind:
    """The kind of a checkpoint by its config.json. Raises CheckpointError."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if architecture not in _kinds:
        for entry in importlib.metadata.entry_points(group=_GROUP):
            kind = entry.load()
            _kinds.setdefault(kind.architecture, kind)
    if architecture not in _kinds:
        known = ", ".join(sorted(_kinds))
        raise CheckpointError(f"a draft of architecture {architecture!r} cannot be trained; known are: {known}")
    return _kinds[architecture]


def expected_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a checkpoint and its shape. Raises CheckpointError."""
    tensors = kind_of(config).shapes(config)
    return {**tensors, "d2t": (config["draft_vocab_size"],), "t2d": (config["vocab_size"],)}


def as_served(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A draft's config.json under ``--json-model-override-args``, which SGLang lays over the draft's as over the
    target's (``sglang.srt.utils.hf_transformers.config.get_config``), rotary settings key by key."""
    served = config | {name: overrides[name] for name in _OVERRIDDEN if name in overrides}
    rotary = overrides.get("rope_parameters", overrides.get("rope_scaling"))  # transformers has them as one
    if isinstance(rotary, dict):
        served["rope_parameters"] = {**config.get("rope_parameters", {}), **rotary}
    return served
