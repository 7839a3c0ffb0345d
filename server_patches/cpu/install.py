"""Put the portable kernels where SGLang looks for ``sgl_kernel``, when nothing else is there.

SGLang resolves platform plugins before any of its modules imports ``sgl_kernel``, in every process, so
``activate`` (entry point ``sglang.srt.platforms``) is early enough and needs no change to SGLang.
"""

import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any

HOW_TO_ASK = "to serve on a CPU, set SGLANG_USE_CPU_ENGINE=1 and give --device cpu"
PORTED_VERSION = "0.4.10"  # the sgl_kernel release whose signatures these kernels follow
_TORCH_OPS = ("extend_attention_cpu", "decode_attention_cpu")
# What SGLang looks up while its module for Qwen3.5 is imported, as those for all that read images like Qwen's do.
_LOOKED_UP_AT_IMPORT = (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)


def activate() -> None:
    """Install the kernels if this process needs them. Never claims the platform: SGLang's own CPU platform serves."""
    if needs_portable_kernels():
        install_kernels()


def needs_portable_kernels() -> bool:
    """The CPU engine was asked for, there is no GPU, and no real ``sgl_kernel`` can be imported."""
    if not is_cpu_engine():
        return False
    import torch

    if torch.cuda.is_available():
        return False
    return is_installed() or not _real_sgl_kernel_works()


def is_cpu_engine() -> bool:
    return os.getenv("SGLANG_USE_CPU_ENGINE", "0") == "1"


def is_installed() -> bool:
    return getattr(sys.modules.get("sgl_kernel"), "is_portable", False)


def install_kernels() -> None:
    """Register the module ``sgl_kernel`` and the two ``torch.ops.sgl_kernel`` attention operators, and have nothing
    pinned. Idempotent."""
    if is_installed():
        return
    # SGLang compiles a helper of its speculation: on a CPU that costs half a minute, needs a C++ compiler and gains
    # nothing. Read when torch._dynamo is first imported, which is later than this.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch

    from server_patches.cpu.unpinned import ask_for_no_pinned_memory

    ask_for_no_pinned_memory()
    kernels = portable_kernels()
    module = types.ModuleType("sgl_kernel", __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    module.__path__ = []
    module.__version__ = PORTED_VERSION
    module.is_portable = True
    module.__getattr__ = _uncovered
    for name, kernel in kernels.items():
        setattr(module, name, kernel)
    sys.modules["sgl_kernel"] = module
    for name in _TORCH_OPS:
        setattr(torch.ops.sgl_kernel, name, kernels[name])
    for name in _LOOKED_UP_AT_IMPORT:
        setattr(torch.ops.sgl_kernel, name, _uncovered(name))


def portable_kernels() -> dict[str, Callable[..., Any]]:
    """Every covered operator by its ``sgl_kernel`` name."""
    from server_patches.cpu import attention, cache_locs, tree

    return {
        name: kernel
        for module in (attention, cache_locs, tree)
        for name, kernel in vars(module).items()
        if name.endswith("_cpu")
    }


def _uncovered(name: str) -> Callable[..., Any]:
    """What ``from sgl_kernel import name`` yields for an operator without a portable version.

    SGLang imports many operators that it never calls on CPU, so the error waits for the call.
    """
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"sgl_kernel.{name} has no portable CPU version; covered are {', '.join(sorted(portable_kernels()))}. "
            "Serve without the feature that calls it, or on a machine with a working sgl_kernel."
        )

    refuse.__name__ = name
    return refuse


def _real_sgl_kernel_works() -> bool:
    before = set(sys.modules)
    try:
        importlib.import_module("sgl_kernel")
    except (ImportError, OSError, RuntimeError):
        # The CUDA build cannot load here and leaves half-imported submodules behind.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "sgl_kernel":
                del sys.modules[name]
        return False
    return True
