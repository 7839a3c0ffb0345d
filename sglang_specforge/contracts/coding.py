"""States in fewer bytes than they are served in: on their way to the trainer, and stored.

float8 is e4m3 with an fp32 scale for each row, its largest magnitude over that of e4m3. Shapes: N rows, W states wide.
"""

import torch
from torch import Tensor

from sglang_specforge.contracts.spans import Travel

FLOAT8 = torch.float8_e4m3fn
SCALE_BYTES = 4
_MOST = torch.finfo(FLOAT8).max
_LEAST_SCALE = torch.finfo(torch.float32).tiny


def to_float8(states_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Values, float8 [N, W], and scales, float32 [N]."""
    wide_NW = states_NW.float()
    scale_N = (wide_NW.abs().amax(-1) / _MOST).clamp(min=_LEAST_SCALE)
    return (wide_NW / scale_N[:, None]).to(FLOAT8), scale_N


def from_float8(values_NW: Tensor, scale_N: Tensor) -> Tensor:
    """float32 [N, W]."""
    return values_NW.float() * scale_N[:, None]


def pack(states_NW: Tensor, travel: Travel) -> Tensor:
    """The rows that travel. Those of float8 are uint8 [N, W + 4]: the row's scale comes after its values."""
    if travel == "float8":
        values_NW, scale_N = to_float8(states_NW)
        return torch.cat([values_NW.view(torch.uint8), scale_N[:, None].view(torch.uint8)], 1)
    return states_NW.to(torch.bfloat16) if travel == "bfloat16" else states_NW


def unpack(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The states, [N, W], in ``dtype`` (None: as they travelled; float8 becomes float32). They share the rows' memory
    where nothing changes."""
    if rows.dtype == torch.uint8:
        values_NW, scale_N4 = rows[:, :-SCALE_BYTES].view(FLOAT8), rows[:, -SCALE_BYTES:].contiguous()
        return from_float8(values_NW, scale_N4.view(torch.float32)[:, 0]).to(dtype or torch.float32)
    return rows.to(dtype or rows.dtype)


def target_row_bytes(hidden_size: int, served_dtype: str, travel: Travel) -> int:
    """Of all that is captured of a token: three layers' states and the last."""
    widths, dtype = (3 * hidden_size, hidden_size), getattr(torch, served_dtype)
    return sum(row_bytes(torch.empty(0, width, dtype=dtype, device="meta"), travel) for width in widths)


def row_bytes(states_NW: Tensor, travel: Travel) -> int:
    """Of a packed row."""
    width = states_NW.shape[-1]
    if travel == "float8":
        return width + SCALE_BYTES
    return width * (2 if travel == "bfloat16" else states_NW.element_size())
