"""The ``intel_amx`` attention backend of SGLang 0.5.17 to 0.5.19 on the portable kernels.

It calls them without the scales of keys and values, and hands over lengths without the drafted tokens: its metadata has
the right ones.
"""

from functools import partial
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

from server_patches.cpu import attention

_UNSCALED = (1.0, 1.0)


def register_hooks() -> None:
    backend = "sglang.srt.layers.attention.intel_amx_backend.IntelAMXAttnBackend"
    HookRegistry.register(f"{backend}.__init__", _use_kernels, HookType.AFTER)


def _use_kernels(result: None, backend: Any, *args: Any, **kwargs: Any) -> None:
    backend.extend_attention_fwd = partial(_extend, backend)
    backend.decode_attention_fwd = partial(_decode, backend)


def _extend(
    backend: Any, q_THD: Tensor, k: Tensor, v: Tensor, out_THD: Tensor, k_buffer: Tensor, v_buffer: Tensor,
    req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, *others: Any,
) -> None:  # fmt: skip
    seq_lens = backend.extend_metadata[0]
    attention.extend_attention_cpu(
        q_THD, k, v, out_THD, k_buffer, v_buffer, *_UNSCALED, req_to_token, req_pool_indices, seq_lens, *others
    )


def _decode(
    backend: Any, q_BHD: Tensor, k_buffer: Tensor, v_buffer: Tensor, out_BHD: Tensor, k: Tensor, v: Tensor,
    loc: Tensor, attn_logits: Tensor, req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, *others: Any,
) -> None:  # fmt: skip
    if backend.draft_decode_metadata is not None:
        _, seq_lens, _ = backend.draft_decode_metadata
    attention.decode_attention_cpu(
        q_BHD, k_buffer, v_buffer, *_UNSCALED, out_BHD, k, v, loc, attn_logits, req_to_token, req_pool_indices,
        seq_lens, *others,
    )  # fmt: skip
