"""Captured spans on the wire, exporter to trainer: one ZMQ multipart message a forward pass or finished request.

Frame 0 is a msgpack header; the frames after it are the raw bytes of ``Captured.tensors`` in their order. A reader on
the same host may open the exporter's memory (``Captured.offered``); then the states stay there (``Captured.shared``),
and only what has no place in it is a frame. So may one on another machine that can pull (``Captured.pullable``).
Rows of all tensors correspond: N rows, some of which belong to no span (drafts that were not accepted). A token below
zero is none: the target read a part of an image there, or of a sound, which the next of the M rows of ``embeds_MH`` is.
Equal ones stand for parts of the same. Shapes: N rows, H hidden.
"""

from typing import Literal

import msgspec

PROTOCOL = 8
PLACE_BYTES = 12  # of one of ``Captured.places``

Travel = Literal["served", "bfloat16", "float8"]  # how states go: as the target is served, or in fewer bytes


class Span(msgspec.Struct, array_like=True, frozen=True):
    """Consecutive positions of one request, captured by one forward pass."""

    rid: str  # the request's alias, and a number, as ids may be given again (``numbered``); here and in ``Finished``
    start: int  # position of the first token
    length: int
    row: int  # first of ``length`` rows in the tensors
    prompt_tokens: int  # positions below are the prompt
    cached_tokens: int  # positions below came from the prefix cache when the request was first prefilled
    proposed: int = -1  # token that the draft proposed for position start + 1; -1 for prefill
    rejected: int = -1  # token that the draft proposed for the position after the span, and the target did not take
    prefix: bytes = b""  # with a request's first span: the int64 tokens below ``start``, not computed by this server
    slice: str = ""  # the request's label: what sampling weights and evaluation tell apart


def numbered(alias: str, number: int) -> str:
    """What one request is called, of all that are given the same id."""
    return f"{alias}-{number}"


def alias_in(rid: str) -> str:
    """``settings.Run.alias`` of the id, by which whoever sent the request knows it."""
    return rid.rpartition("-")[0]


class TensorLayout(msgspec.Struct, array_like=True, frozen=True):
    name: Literal["aux_N3H", "last_NH", "embeds_MH", "tokens_N"]
    dtype: str  # as torch names it, "bfloat16"; "float8": rows as ``coding.pack`` makes them
    shape: list[int]  # of the states, [rows, width]


class SegmentAddress(msgspec.Struct, array_like=True, frozen=True):
    """Where a reader finds an exporter's memory (``shared_memory.py``), and the number by which it takes it up."""

    pid: int
    fd: int
    reader: int  # another one for each connection


class RemoteSegment(msgspec.Struct, array_like=True, frozen=True):
    """Where a reader on another machine pulls an exporter's memory from (``pull.py``)."""

    session: str  # of the exporter's transfer engine
    base: int  # address in its process
    nbytes: int  # of the ring
    reader: int = 0  # as in ``SegmentAddress``


class Shared(msgspec.Struct, array_like=True, frozen=True):
    """The place of a message's states in the exporter's memory."""

    message: int  # numbers rise; the reader tells the newest that it is done with
    offsets: list[int]  # of the first tensors, in bytes; the others are frames


class Captured(msgspec.Struct, tag="captured", frozen=True):
    """The spans of one forward pass."""

    stream: str  # one exporter's life
    sent_before: int  # tokens of this stream in earlier messages: a gap tells what was lost on the way
    draft_version: int  # version active when the pass ran
    spans: list[Span]
    tensors: list[TensorLayout]
    places: bytes = b""  # int32 [M, 3]: where ``embeds_MH`` are in time, height and width, as the target turns by them
    offered: SegmentAddress | None = None
    pullable: RemoteSegment | None = None
    shared: Shared | None = None
    protocol: int = PROTOCOL

    @property
    def tokens(self) -> int:
        return sum(span.length for span in self.spans)


class Finished(msgspec.Struct, tag="finished", frozen=True):
    """A request ended: of its captured positions, those from ``total_tokens`` on are no part of it.

    One that was cut short goes on at the server, and is not captured any more: nothing of it is to be used.
    """

    stream: str
    sent_before: int
    rid: str
    total_tokens: int
    aborted: bool
    cut_short: bool = False
    protocol: int = PROTOCOL

    tokens = 0


Message = Captured | Finished


_encoder = msgspec.msgpack.Encoder()


def encode_header(message: Message) -> bytes:
    return _encoder.encode(message)
