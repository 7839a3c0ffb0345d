"""A pass that is sent through sockets in pieces: nothing of it changes but where it is cut."""

import pytest
import torch

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.frames import decode
from sglang_specforge.contracts.spans import Captured, Finished, Span, TensorLayout, encode_header
from sglang_specforge.export import pieces
from trainer.assemble import Assembler

H, PREFIX = 2, torch.arange(3).numpy().tobytes()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 400)


def make_pass(*spans, rows, images=0):
    """``images``: how many rows, from the tenth on, are of no token."""
    tokens_N = torch.arange(rows)
    tokens_N[10 : 10 + images] *= -1
    embeds = {"embeds_MH": torch.randn(images, H)} if images else {}
    tensors = {"aux_N3H": torch.randn(rows, 3 * H), "last_NH": torch.randn(rows, H), **embeds, "tokens_N": tokens_N}
    names, tensors = tensors.items(), list(tensors.values())
    layouts = [TensorLayout(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in names]
    places = torch.arange(3 * images, dtype=torch.int32).numpy().tobytes()
    return Captured("s", 7, 3, list(spans), layouts, places), tensors


def travel(message, tensors):
    frames = [encode_header(message), *(t.contiguous().view(-1).view(torch.uint8).numpy() for t in tensors)]
    return decode([memoryview(frame) for frame in frames])


@pytest.mark.parametrize("images", [0, 40])
def test_samples_are_the_same_whole_and_in_pieces(images):
    message, tensors = make_pass(
        Span("long", 3, 60, 5, 60, 3, prefix=PREFIX), Span("short", 0, 4, 70, 3, 0), Span("next", 0, 20, 74, 18, 0),
        rows=100, images=images,
    )  # fmt: skip
    found = {}
    for way, sent in (("whole", [(message, tensors)]), ("pieces", list(pieces.cut(message, tensors)))):
        assembler = Assembler(ledger := TokenLedger(), 1000)
        for piece, parts in sent:
            assembler.add(*travel(piece, parts))
        ends = [Finished("s", 0, span.rid, span.start + span.length, False) for span in message.spans]
        found[way] = [sample for end in ends for sample in assembler.add(end, {})]
        assert ledger.dropped == {}
    assert len(found["whole"]) == 3
    for whole, joined in zip(*found.values(), strict=True):
        assert (whole.rid, whole.start, whole.proposals) == (joined.rid, joined.start, joined.proposals)
        for name in ("tokens_T", "aux_T3H", "last_TH", "embeds_MH", "places_M3", "generated_T", "rejected_T"):
            assert torch.equal(getattr(whole, name), getattr(joined, name)), name


def test_each_token_is_counted_once_and_in_turn():
    message, tensors = make_pass(Span("a", 0, 31, 0, 31, 0), Span("b", 9, 40, 40, 50, 0), rows=80)
    sent = message.sent_before
    cut = list(pieces.cut(message, tensors))
    for piece, _ in cut:
        assert piece.sent_before == sent
        sent += piece.tokens
    assert sent == message.sent_before + message.tokens
    assert len(cut) > 5
    assert max(sum(t.nbytes for t in parts) for _, parts in cut) <= 400


def test_a_verified_span_stays_whole_with_what_was_drafted():
    spans = [Span(f"r{i}", 20, 3, 4 * i, 10, 0, proposed=i, rejected=50 + i) for i in range(20)]
    message, tensors = make_pass(*spans, rows=80)
    cut = list(pieces.cut(message, tensors))
    assert len(cut) > 5
    arrived = [(span, parts[2][span.row].item()) for piece, parts in cut for span in piece.spans]
    assert [(s.rid, s.length, s.proposed, s.rejected, row) for s, row in arrived] == [
        (s.rid, s.length, s.proposed, s.rejected, s.row) for s in spans
    ]


def test_a_refusal_stays_at_its_span_s_end():
    message, tensors = make_pass(Span("a", 0, 30, 0, 0, 0, proposed=4, rejected=9), rows=30)
    told = [(s.proposed, s.rejected) for piece, _ in pieces.cut(message, tensors) for s in piece.spans]
    assert (told[0], told[-1], set(told[1:-1])) == ((4, -1), (-1, 9), {(-1, -1)})


def test_a_short_pass_is_sent_as_it_is():
    message, tensors = make_pass(Span("a", 0, 3, 0, 3, 0), rows=3)
    assert [(piece is message, parts is tensors) for piece, parts in pieces.cut(message, tensors)] == [(True, True)]
