"""A received message's frames, checked before anything is made of them: nothing the other side says is trusted.

Tensors share the memory that they came in, so reading a message allocates no more than its header; every number that
later decides about memory or indexes a table (rows, positions, tokens) has bounds here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from sglang_specforge.contracts.coding import SCALE_BYTES
from sglang_specforge.contracts.spans import PLACE_BYTES, PROTOCOL, Captured, Message, Span

FRAMES = 5  # of the longest message: the header and four tensors
_MOST_POSITIONS = 1 << 27
_LONGEST_ID = 512  # characters
_ALIGNED_TO = 4  # bytes: of the widest states
# Of states: what a row is made of, and how much more of it there is than states.
_STATES = {
    "bfloat16": (torch.bfloat16, 0), "float16": (torch.float16, 0), "float32": (torch.float32, 0),
    "float8": (torch.uint8, SCALE_BYTES),
}  # fmt: skip
_TENSORS = ("aux_N3H", "last_NH", "tokens_N")
_BESIDE_IMAGES = ("aux_N3H", "last_NH", "embeds_MH", "tokens_N")


class WireError(ValueError):
    """A message that this protocol does not describe, or that is not of the stream that was expected."""


class Expected(NamedTuple):
    """The stream of one target."""

    hidden_size: int
    vocab_size: int
    dtype: str  # as ``TensorLayout`` names it


class Ring(Protocol):
    """Memory that a message's states lie in."""

    @property
    def nbytes(self) -> int: ...
    def __getitem__(self, part: slice) -> memoryview: ...


_decoder = msgspec.msgpack.Decoder(Message)


def decode(
    frames: Sequence[memoryview],
    expected: Expected | None = None,
    ring_of: Callable[[str], Ring | None] = lambda stream: None,
) -> tuple[Message, dict[str, Tensor]]:
    """Header and tensors of a message (rows of states as ``coding.unpack`` takes them), with ``places_M3`` (int32)
    beside ``embeds_MH``; the tensors share the frames' memory, or that of the stream's ring.

    Raises:
        WireError: another protocol, a malformed header, frames that do not fit it, or another target's states.
    """
    try:
        message = _decoder.decode(frames[0])
    except (msgspec.MsgspecError, UnicodeDecodeError, IndexError) as error:
        raise WireError(f"header cannot be read: {error}") from error
    if message.protocol != PROTOCOL:
        raise WireError(f"protocol {message.protocol}, this trainer speaks {PROTOCOL}; run server and trainer alike")
    _check(0 <= message.sent_before < 1 << 62, "tokens sent before", message.sent_before)
    _check(len(message.stream) <= _LONGEST_ID, "characters in a stream's name", len(message.stream))
    if not isinstance(message, Captured):
        _check(len(frames) == 1, "tensor frames of an end", len(frames) - 1)
        _check(0 <= message.total_tokens <= _MOST_POSITIONS, "tokens of a request", message.total_tokens)
        return message, {}
    if message.shared is not None:
        _check(0 < message.shared.message < 1 << 62, "number of a message", message.shared.message)
    if message.offered is not None:
        _check(0 < message.offered.reader <= 1 << 62, "number of a reader", message.offered.reader)
        _check(0 < message.offered.pid < 1 << 32, "process", message.offered.pid)
    if (remote := message.pullable) is not None:
        _check(len(remote.session) <= _LONGEST_ID, "characters in a session's name", len(remote.session))
        _check(0 < remote.base < 1 << 63, "address of a segment", remote.base)
        _check(0 < remote.nbytes < 1 << 48, "bytes of a segment", remote.nbytes)
        _check(0 < remote.reader <= 1 << 62, "number of a reader", remote.reader)
    tensors = _tensors(message, frames[1:], expected, ring_of(message.stream))
    tokens_N = tensors["tokens_N"].numpy()
    if expected is not None:
        _check_tokens(tokens_N, expected)
    for span in message.spans:
        _check_span(span, len(tokens_N), expected)
    _check(message.tokens <= len(tokens_N), "rows of all spans, more than there are", message.tokens)
    return message, tensors


def _tensors(
    message: Captured, frames: Sequence[memoryview], expected: Expected | None, ring: Ring | None
) -> dict[str, Tensor]:
    names = tuple(layout.name for layout in message.tensors)
    offsets = message.shared.offsets if message.shared else []
    if names not in (_TENSORS, _BESIDE_IMAGES) or len(frames) + len(offsets) != len(names):
        raise WireError(f"{len(frames)} tensor frames and {len(offsets)} places for {names}; expected {_TENSORS}")
    *states, tokens = message.tensors
    aux, last, *embeds = states
    if len(last.shape) != 2 or not 0 < last.shape[0] < 1 << 32 or not 0 < last.shape[1] < 1 << 32:
        raise WireError(f"last_NH of shape {last.shape}")
    N, H = last.shape
    if expected is not None and (H, last.dtype) != (expected.hidden_size, expected.dtype):
        raise WireError(
            f"states of hidden size {H} in {last.dtype}; this target has {expected.hidden_size} in {expected.dtype}"
        )
    if aux.shape != [N, 3 * H] or tokens.shape != [N]:
        raise WireError(f"aux_N3H of shape {aux.shape} and tokens_N of {tokens.shape} beside last_NH of {last.shape}")
    if any(len(layout.shape) != 2 or layout.shape[1] != H or not 0 < layout.shape[0] <= N for layout in embeds):
        raise WireError(f"embeds_MH of shape {embeds[0].shape} beside last_NH of {last.shape}")
    if len({layout.dtype for layout in states}) > 1 or last.dtype not in _STATES or tokens.dtype != "int64":
        given = ", ".join(layout.dtype for layout in message.tensors)
        raise WireError(f"dtypes {given}; states are {', '.join(_STATES)}")
    dtype, more = _STATES[last.dtype]
    dtypes = [*(dtype for _ in states), torch.int64]
    shapes = [*([rows, width + more] for rows, width in (layout.shape for layout in states)), [N]]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    placed = [_part(ring, offset, nbytes) for offset, nbytes in zip(offsets, sizes, strict=False)]
    parts, tensors = [*placed, *frames], {}
    for layout, part, dtype, shape, nbytes in zip(message.tensors, parts, dtypes, shapes, sizes, strict=True):
        if part.nbytes != nbytes:
            raise WireError(f"tensor frames do not fit the header: {part.nbytes} bytes for {layout}")
        tensors[layout.name] = torch.frombuffer(part, dtype=dtype).view(shape)
    below_zero = int(np.count_nonzero(tensors["tokens_N"].numpy() < 0))
    _check(below_zero == len(tensors.get("embeds_MH", ())), "tokens below zero, not one for each embedding", below_zero)
    place_bytes = len(message.places)
    _check(place_bytes == PLACE_BYTES * below_zero, f"bytes of places for {below_zero} embeddings", place_bytes)
    if below_zero:
        places = np.frombuffer(message.places, np.int32).reshape(-1, 3).copy()
        _check(places.min() >= 0 and places.max() < _MOST_POSITIONS, "places, up to", int(places.max()))
        tensors["places_M3"] = torch.from_numpy(places)
    return tensors


def _part(ring: Ring | None, offset: int, nbytes: int) -> memoryview:
    if ring is None:
        raise WireError("states in memory that is not shared with this process")
    if not 0 <= offset <= ring.nbytes - nbytes or offset % _ALIGNED_TO:
        raise WireError(f"{nbytes} bytes at {offset} of a ring of {ring.nbytes}")
    return ring[offset : offset + nbytes]


def _check_span(span: Span, rows: int, expected: Expected | None) -> None:
    """Asked of each request of each pass, so no text is made, nor a tensor."""
    _check(0 < span.length <= rows, "length of a span", span.length)
    _check(0 <= span.row <= rows - span.length, "first row of a span", span.row)
    _check(0 <= span.start < _MOST_POSITIONS, "position of a span", span.start)
    _check(0 <= span.prompt_tokens <= _MOST_POSITIONS, "tokens of a prompt", span.prompt_tokens)
    _check(len(span.rid) <= _LONGEST_ID, "characters in a request's name", len(span.rid))
    _check(len(span.slice) <= _LONGEST_ID, "characters in a slice's name", len(span.slice))
    if span.prefix:
        _check(len(span.prefix) == 8 * span.start, "bytes of tokens for another prefix", len(span.prefix))
    if expected is not None:
        _check(-1 <= span.rejected < expected.vocab_size, "a refused token", span.rejected)
        if span.prefix:
            _check_tokens(np.frombuffer(span.prefix, np.int64), expected)


def _check_tokens(tokens_N: np.ndarray, expected: Expected) -> None:
    if tokens_N.size and (highest := tokens_N.max()) >= expected.vocab_size:
        raise WireError(f"token {highest}; this target has {expected.vocab_size}")


def _check(accepted: bool, what: str, value: int) -> None:
    if not accepted:
        raise WireError(f"{what}: {value}")
