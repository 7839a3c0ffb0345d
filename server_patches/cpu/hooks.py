"""Where SGLang 0.5.23 assumes that a CPU has AMX, that CUDA wheels mean a GPU, or that CPUs have no EP."""

from typing import Any

import sglang.srt.arg_groups.overrides as overrides
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register_hooks() -> None:
    """Make the ``intel_amx`` backend, TP and EP run on the portable kernels."""
    # Set on the one module that chooses the attention backend: everywhere else AMX stays absent.
    overrides.get_platform = _PlatformWithAMXKernels.of(overrides.get_platform)
    HookRegistry.register(
        "sglang.srt.distributed.device_communicators.pynccl_wrapper.NCCLLibrary.__init__", _no_nccl, HookType.BEFORE
    )
    HookRegistry.register(
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native", _mask_remote_experts, HookType.AROUND
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


def _mask_remote_experts(original: Any, layer: Any, x: Any, topk_output: Any, *args: Any, **kwargs: Any) -> Any:
    """Under EP, id -1 marks an expert of another rank: give it weight zero here, its rank adds its share."""
    remote_TK = topk_output.topk_ids < 0
    topk_output = topk_output._replace(
        topk_ids=topk_output.topk_ids.masked_fill(remote_TK, 0),
        topk_weights=topk_output.topk_weights.masked_fill(remote_TK, 0),
    )
    return original(layer, x, topk_output, *args, **kwargs)
