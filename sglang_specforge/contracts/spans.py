"""Captured spans on the wire, exporter to trainer: one ZMQ multipart message a forward pass or finished request.

Frame 0 is a msgpack header; the frames after it are the raw bytes of ``Captured.tensors`` in their order.
Rows of all tensors correspond: N rows, some of which belong to no span (drafts that were not accepted).
Shapes: N rows, H hidden.
"""

from typing import Literal

import msgspec
import torch
from torch import Tensor

PROTOCOL = 3


class Span(msgspec.Struct, array_like=True, frozen=True):
    """Consecutive positions of one request, captured by one forward pass."""

    rid: str
    start: int  # position of the first token
    length: int
    row: int  # first of ``length`` rows in the tensors
    prompt_tokens: int  # positions below are the prompt
    cached_tokens: int  # positions below came from the prefix cache when the request was first prefilled
    proposed: int = -1  # token that the draft proposed for position start + 1; -1 for prefill
    rejected: int = -1  # token that the draft proposed for the position after the span, and the target did not take
    prefix: bytes = b""  # with a request's first span: the int32 tokens below ``start``, which the server had cached
    slice: str = ""  # the request's label: what sampling weights and evaluation tell apart


class TensorLayout(msgspec.Struct, array_like=True, frozen=True):
    name: Literal["aux_N3H", "last_NH", "tokens_N"]
    dtype: str  # as torch names it, "bfloat16"
    shape: list[int]


class Captured(msgspec.Struct, tag="captured", frozen=True):
    """The spans of one forward pass."""

    stream: str  # one exporter's life
    sent_before: int  # tokens of this stream in earlier messages: a gap tells what was lost on the way
    draft_version: int  # version active when the pass ran
    spans: list[Span]
    tensors: list[TensorLayout]
    protocol: int = PROTOCOL

    @property
    def tokens(self) -> int:
        return sum(span.length for span in self.spans)


class Finished(msgspec.Struct, tag="finished", frozen=True):
    """A request ended: of its captured positions, those from ``total_tokens`` on are no part of it."""

    stream: str
    sent_before: int
    rid: str
    total_tokens: int
    aborted: bool
    protocol: int = PROTOCOL

    tokens = 0


Message = Captured | Finished


class WireError(ValueError):
    """A message that this protocol does not describe."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode_header(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frames: list[memoryview]) -> tuple[Message, dict[str, Tensor]]:
    """Header and tensors of a message; the tensors share the frames' memory.

    Raises:
        WireError: another protocol, a malformed header, or frames that do not fit the header.
    """
    try:
        message = _decoder.decode(frames[0])
    except msgspec.MsgspecError as error:
        raise WireError(f"header cannot be read: {error}") from error
    if message.protocol != PROTOCOL:
        raise WireError(f"protocol {message.protocol}, this trainer speaks {PROTOCOL}; run server and trainer alike")
    layouts = message.tensors if isinstance(message, Captured) else []
    if len(frames) != 1 + len(layouts):
        raise WireError(f"{len(frames) - 1} tensor frames for {len(layouts)} tensors")
    try:
        tensors = {
            layout.name: torch.frombuffer(frame, dtype=getattr(torch, layout.dtype)).view(layout.shape)
            for layout, frame in zip(layouts, frames[1:], strict=True)
        }
    except (RuntimeError, ValueError, AttributeError) as error:
        raise WireError(f"tensor frames do not fit the header: {error}") from error
    rows = min((tensor.shape[0] for tensor in tensors.values()), default=0)
    for span in message.spans if isinstance(message, Captured) else []:
        if len(span.prefix) not in (0, 4 * span.start):
            raise WireError(f"{len(span.prefix)} bytes of tokens for a prefix of {span.start}")
        if span.length < 1 or not 0 <= span.row <= rows - span.length:
            raise WireError(f"span of rows {span.row}+{span.length} in tensors of {rows} rows")
    return message, tensors
