"""Where SGLang assumes that a CPU has AMX, that CUDA wheels mean a GPU, or that CPUs have no EP, no PD, no rank that
is idle under DP attention, pages of one token when they speculate, and one draft depth.

Shapes: T tokens, H hidden, K experts a token, P pairs of a token and an expert of this rank.
"""

from dataclasses import replace
from typing import Any

import sglang.srt.arg_groups.overrides as overrides
import torch
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

from server_patches import supported, v0_5_17
from server_patches.cpu import unscaled


def register_hooks() -> None:
    """Make the ``intel_amx`` backend, TP, EP, DP attention and PD disaggregation run on the portable kernels."""
    # Set on the one module that chooses the attention backend: everywhere else AMX stays absent.
    if hasattr(overrides, "get_platform"):
        overrides.get_platform = _PlatformWithAMXKernels.of(overrides.get_platform)
    else:  # up to 0.5.18
        overrides.cpu_has_amx_support = lambda: True
    if supported.installed() is v0_5_17:
        unscaled.register_hooks()
    HookRegistry.register(
        "sglang.srt.distributed.device_communicators.pynccl_wrapper.NCCLLibrary.__init__", _no_nccl, HookType.BEFORE
    )
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", _run_experts, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native", _rotate_some, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.speculative.eagle_worker_v2.check_cuda_graph_backend", _no_graphs, HookType.REPLACE
    )
    HookRegistry.register("sglang.srt.mem_cache.allocation.get_last_loc", _find_last_slots, HookType.REPLACE)
    HookRegistry.register(
        "sglang.srt.disaggregation.common.conn.CommonKVSender.__init__", _send_indices_at_once, HookType.AFTER
    )


class _PlatformWithAMXKernels:
    """SGLang's platform, except that the kernels behind the ``intel_amx`` attention backend are there."""

    has_amx = True

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    @classmethod
    def of(cls, get_platform: Any) -> Any:
        return lambda: cls(get_platform())


def _no_nccl(*args: Any, **kwargs: Any) -> None:
    # PyNcclCommunicator takes this for "a non-GPU environment" and leaves the collectives to gloo.
    raise RuntimeError("NCCL needs a GPU")


def _no_graphs(phase: str, backend: str) -> bool:
    # The draft worker would capture the target's graphs for a second depth, which a CPU has none of.
    return backend == Backend.DISABLED


def _rotate_some(
    original: Any, rotary: Any, positions: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> Any:
    # A rank that is idle under DP attention has no rows, and those cannot be cut into heads.
    return original(rotary, positions, query, key, *args, **kwargs) if positions.numel() else (query, key)


def _find_last_slots(req_to_token: Tensor, req_pool_indices: Tensor, prefix_lens: Tensor) -> Tensor:
    """Of each request, as SGLang finds them where Triton is not."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices, prefix_lens)


def _send_indices_at_once(result: None, sender: Any, *args: Any, **kwargs: Any) -> None:
    # Otherwise it waits for a CUDA event before it sends them.
    sender.supports_host_tensor_indices = False


def _run_experts(original: Any, layer: Any, x_TH: Tensor, topk_output: Any, config: Any) -> Tensor:
    """What SGLang's native experts lack. Under EP, id -1 marks an expert of another rank, which adds its share itself:
    compute the others. With ``apply_router_weight_on_input`` (Llama 4) an expert reads its tokens weighted.

    Each (token, local expert) pair P goes through as a token with one expert, so that no id has to stand in for -1.
    """
    local_TK, weighs_input = topk_output.topk_ids >= 0, config.apply_router_weight_on_input
    if local_TK.all() and not weighs_input:
        return original(layer, x_TH, topk_output, config)
    out_TH = torch.zeros_like(x_TH)
    token_P, slot_P = local_TK.nonzero(as_tuple=True)
    if token_P.numel():
        x_PH, weight_P1 = x_TH[token_P], topk_output.topk_weights[token_P, slot_P, None]
        if weighs_input:
            x_PH, weight_P1 = (x_PH * weight_P1).to(x_PH.dtype), torch.ones_like(weight_P1)
            config = replace(config, apply_router_weight_on_input=False)
        pairs = topk_output._replace(topk_ids=topk_output.topk_ids[token_P, slot_P, None], topk_weights=weight_P1)
        out_TH.index_add_(0, token_P, original(layer, x_PH, pairs, config))
    return out_TH
