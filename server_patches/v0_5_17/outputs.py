"""Answers name their draft versions: the tokenizer manager appends what each output of a request brings to its list."""

from typing import Any

from server_patches.common import outputs


def after_accept(result: None, answer: Any, *, req: Any) -> None:
    """AFTER ``_GenerationStreamAccumulator.accept``, which may have nothing to send of this request yet.

    It pads, with a None for each token, what only other requests brought.
    """
    if not answer.rids or answer.rids[-1] != req.rid:
        return
    here = len(answer.rids) - 1
    told = answer.customized_info.setdefault(outputs.KEY, [])
    told[here:] = []
    told.extend([] for _ in range(here - len(told)))
    told.append(outputs.take(req))
