"""Last hidden states where ``LogitsProcessorOutput`` has no field of them: one more block of the aux states, which
every CUDA graph already returns, taken off again before anything else reads them.

Shapes: N rows, H hidden.
"""

from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor

_packed_widths: dict[int, int] = {}  # with the block: the width of the aux states alone


def pack(processor: LogitsProcessor) -> None:
    """Have this processor of the target append last hidden [N, H] to the aux states [N, 3H] it stores."""
    store = processor._get_hidden_states_to_store

    def store_both(hidden_NH: torch.Tensor, before_norm: Any, aux: Any, *args: Any, **kwargs: Any) -> Any:
        stored = store(hidden_NH, before_norm, aux, *args, **kwargs)
        if aux is None or stored is None or len(stored) != len(hidden_NH):  # every row, or only the last of each
            return stored
        both = torch.cat([stored, hidden_NH], -1)
        _packed_widths[both.shape[-1]] = stored.shape[-1]
        return both

    processor._get_hidden_states_to_store = store_both


def unpack(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``TpModelWorker.forward_batch_generation``: ``hidden_states`` and ``last_hidden_states``, as of 0.5.23."""
    logits = result.logits_output
    both = logits.hidden_states if logits is not None else None
    if both is not None and (width := _packed_widths.get(both.shape[-1])):
        logits.hidden_states, logits.last_hidden_states = both[:, :width], both[:, width:]
