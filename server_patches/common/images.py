"""What stands for images, or sounds, in a prompt: the target reads embeddings of its own there, in place of tokens'.

SGLang makes up token ids for their parts, past any vocabulary, out of a hash of the content. In the stream they are
below zero, and the embeddings go beside them (``contracts.spans``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE


class StandIns(NamedTuple):
    """Of a pass."""

    rows: np.ndarray  # int64 [M], of the pass
    tokens: np.ndarray  # int64 [M], below zero
    places: np.ndarray  # int32 [M, 3], in time, height and width


def has_any(req: Any) -> bool:
    """Whether the request may have some: what follows takes time."""
    return req.multimodal_inputs is not None


def prompt(req: Any, end: int | None = None) -> Sequence[int]:
    """The prompt's tokens up to ``end``, as the stream has them."""
    return _signed(req, 0, end).tolist() if has_any(req) else req.origin_input_ids[:end]


def stand_ins(req: Any, start: int, length: int, row: int) -> StandIns:
    """Those among ``length`` positions from ``start`` on, whose first row is ``row``."""
    tokens = _signed(req, start, start + length)
    [found] = np.nonzero(tokens < 0)
    positions, turned_by = start + found, req.multimodal_inputs.mrope_positions
    # There are none where the target turns by one position; of a session, older versions have those of a part.
    if turned_by is None or turned_by.shape[1] < len(req.origin_input_ids):
        places = np.stack([positions] * 3, 1)
    else:
        places = turned_by[:, positions].T.cpu().numpy()
    return StandIns(row + found, tokens[found], places.astype(np.int32))


def _signed(req: Any, start: int, end: int | None) -> np.ndarray:
    ids = np.asarray(req.origin_input_ids[start:end], np.int64)
    return np.where(ids < MM_PAD_SHIFT_VALUE, ids, -ids)
