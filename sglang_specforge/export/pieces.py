"""A forward pass's message in pieces that a socket carries well.

Of a long message the reader would allocate all at once, each time anew, and could not copy its beginning while its end
is still on the way. Shapes: N rows of a message, M of them of no token.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import msgspec
from torch import Tensor

from sglang_specforge.contracts.spans import PLACE_BYTES, Captured, Span

_PIECE_BYTES = 8 << 20


def cut(message: Captured, tensors: list[Tensor]) -> Iterator[tuple[Captured, list[Tensor]]]:
    """The message, in parts of about 8 MiB, each with its rows of the ``tensors`` [N, ...], the tokens last.

    Only a span that is longer than that is cut. Raises nothing; tensors share memory with those given.
    """
    tokens_N = tensors[-1]
    pieces, rows = -(-sum(tensor.nbytes for tensor in tensors) // _PIECE_BYTES), len(tokens_N)
    if pieces <= 1:
        yield message, tensors
        return
    sent_before = message.sent_before
    for spans in _grouped(message.spans, -(-rows // pieces)):
        first, last = spans[0], spans[-1]
        at = slice(first.row, last.row + last.length)
        shown = _embeds_of(tokens_N, at)
        parts = {
            layout.name: tensor[shown if layout.name == "embeds_MH" else at]
            for layout, tensor in zip(message.tensors, tensors, strict=True)
        }
        parts = {name: part for name, part in parts.items() if len(part)}
        piece = msgspec.structs.replace(
            message,
            sent_before=sent_before,
            spans=[msgspec.structs.replace(span, row=span.row - first.row) for span in spans],
            places=message.places[shown.start * PLACE_BYTES : shown.stop * PLACE_BYTES],
            tensors=[
                msgspec.structs.replace(layout, shape=[len(parts[layout.name]), *layout.shape[1:]])
                for layout in message.tensors
                if layout.name in parts
            ],
        )
        yield piece, list(parts.values())
        sent_before += piece.tokens


def _embeds_of(tokens_N: Tensor, rows: slice) -> slice:
    """Which of ``embeds_MH`` these rows have."""
    before, within = ((tokens_N[at] < 0).sum().item() for at in (slice(rows.start), rows))
    return slice(before, before + within)


def _grouped(spans: Iterable[Span], most_rows: int) -> Iterator[list[Span]]:
    """Neighbours that together take up to ``most_rows``, in the order of their rows."""
    group: list[Span] = []
    for whole in sorted(spans, key=lambda span: span.row):
        for span in _shortened(whole, most_rows):
            if group and span.row + span.length - group[0].row > most_rows:
                yield group
                group = []
            group.append(span)
    if group:
        yield group


def _shortened(span: Span, most_rows: int) -> Iterator[Span]:
    bounds = [*range(0, span.length, most_rows), span.length]
    for start, end in pairwise(bounds):
        yield msgspec.structs.replace(
            span,
            start=span.start + start,
            length=end - start,
            row=span.row + start,
            proposed=-1 if start else span.proposed,
            rejected=span.rejected if end == span.length else -1,
            prefix=b"" if start else span.prefix,
        )
