"""Frames that are not what they should be: each is counted, none ends the trainer or makes it allocate much."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.frames import Expected, WireError, decode
from sglang_specforge.contracts.spans import Captured, Finished, Shared, Span, TensorLayout, encode_header
from sglang_specforge.shared_memory import SharedSegment
from trainer.assemble import Assembler
from trainer.inbox import Inbox
from trainer.prefix_store import PrefixStore

H, V = 8, 100
EXPECTED = Expected(H, V, "bfloat16")
BATCH = 1000
NUMBERS = (-1, 0, 1, 2, 5, 7, 255, V, 1 << 15, (1 << 27) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
NAMES = ("", "a", "b", "aux_N3H", "last_NH", "bfloat16", "float32", "nn", "x" * 600, "\x00")
MOST_OPEN_TOKENS, STORE_BYTES, ALLOWED_BYTES = 1 << 16, 1 << 20, 128 << 20


def message(spans, sent_before=0, rows=6, stream="s", segment=None, number=0, images=0):
    """With a segment, its offer; with a number too, one whose states are there. ``images``: rows of no token."""
    tokens_N = torch.arange(rows)
    tokens_N[1 : 1 + images] *= -1
    states = {"aux_N3H": [rows, 3 * H], "last_NH": [rows, H]} | ({"embeds_MH": [images, H]} if images else {})
    layouts = [TensorLayout(name, "bfloat16", shape) for name, shape in states.items()]
    layouts.append(TensorLayout("tokens_N", "int64", [rows]))
    tensors = [torch.randn(shape).bfloat16().view(torch.uint8) for shape in states.values()] + [tokens_N]
    more = {"offered": segment.address(1)} if segment else {}
    if number:
        placed = torch.cat([tensors.pop(0).flatten() for _ in states])
        segment.ring[: len(placed)] = placed
        more = {"shared": Shared(number, [0, 288, 384][: len(states)])}
    places = np.arange(3 * images, dtype=np.int32).tobytes()
    header = encode_header(Captured(stream, sent_before, 1, spans, layouts, places, **more))
    return [header, *(tensor.numpy().tobytes() for tensor in tensors)]


class Exporter:
    """Makes messages as a server would: requests begin, go on, and end or are cut short."""

    def __init__(self):
        self.begun = self.sent = 0
        self.segment = SharedSegment(1 << 12, pinned=False)

    def way_of_states(self, rng):
        self.sent += 1
        number, images = self.sent if rng.random() < 0.5 else 0, rng.choice((0, 0, 3))
        return {"segment": self.segment, "number": number, "images": images}

    def next_message(self, rng, sent_before):
        rid, end = str(self.begun), rng.choice((4, 6, 9))
        way = rng.randrange(5)
        if way == 0:
            self.begun += 1
            prefix = np.array([0, -(1 << 62), 2]).tobytes()
            spans = [Span(str(self.begun), 0, 4, 0, 4, 0), Span(f"{rid}b", 3, 2, 4, 5, 3, prefix=prefix, slice="code")]
            return message(spans, sent_before, **self.way_of_states(rng))
        if way <= 2:
            spans = [Span(rid, rng.choice((4, 6)), 2, 0, 4, 0, 7, 9), Span(f"{rid}b", 5, 1, 3, 5, 3, 1, -1)]
            return message(spans, sent_before, **self.way_of_states(rng))
        cut_short = rng.random() < 0.2
        return [encode_header(Finished("s", sent_before, rng.choice((rid, f"{rid}b")), end, False, cut_short))]


def mutate(rng, frames):
    """One to three changes: to a value of the header, to its bytes, or to the frames."""
    frames = list(frames)
    for _ in range(rng.randrange(1, 4)):
        way = rng.randrange(8)
        i = rng.randrange(len(frames)) if frames else 0
        if way < 4 and frames:
            frames[0] = change_value(rng, frames[0])
        elif way == 4 and frames and frames[i]:
            content = bytearray(frames[i])
            content[rng.randrange(len(content))] = rng.randrange(256)
            frames[i] = bytes(content)
        elif way == 5 and frames:
            cut = rng.randrange(len(frames[i]) + 1)
            frames[i] = frames[i][:cut] + rng.randbytes(rng.choice((0, 0, 1, 8))) + frames[i][cut + rng.randrange(9) :]
        elif way == 6:
            frames.insert(i, frames[rng.randrange(len(frames))] if frames else b"")
        elif way == 7 and frames:
            del frames[i]
    return frames


def change_value(rng, header):
    """Another number, name or structure in the place of one of the header's, whatever it may mean."""
    try:
        document = msgspec.msgpack.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        return header
    place, node = None, document
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        place, node = (node, key), node[key]
    other = rng.choice((rng.choice(NUMBERS), rng.choice(NAMES), None, [], {}, b"\0" * 12, 0.5))
    if isinstance(node, int) and rng.random() < 0.8:
        other = rng.choice(NUMBERS)  # what passes for the right type gets furthest
    if place is None:
        return msgspec.msgpack.encode(other)
    place[0][place[1]] = other
    return msgspec.msgpack.encode(document)


def resident_bytes(name):
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith(name))
    return int(line.split()[1]) << 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("batches", [25, pytest.param(1250, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_mutated_frames_are_counted_and_cost_no_memory(folder, batches):
    ledger = TokenLedger()
    assembler = Assembler(ledger, 64, PrefixStore("t", STORE_BYTES), max_open_tokens=MOST_OPEN_TOKENS)
    inbox = Inbox(f"ipc://{folder}/{batches}", assembler, ledger, EXPECTED)
    exporter, taken, samples, sampled, read = Exporter(), 0, 0, 0, 0

    @settings(max_examples=batches, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def feed(rng):
        nonlocal taken, samples, sampled, read
        for _ in range(BATCH):
            made = exporter.next_message(rng, ledger.streams.get("s", 0))
            made = mutate(rng, made) if rng.random() < 0.8 else made  # the others give it something to break
            frames, malformed = [memoryview(bytearray(frame)) for frame in made], inbox.malformed
            completed = inbox.take(frames)
            samples, sampled = samples + len(completed), sampled + sum(sample.captured for sample in completed)
            read += malformed == inbox.malformed
            taken += 1
        # Every token that came, or was said to be lost, is in a sample, open, or dropped for a reason.
        assert ledger.received == sampled + assembler.open_tokens + sum(ledger.dropped.values())
        assert assembler.open_tokens <= MOST_OPEN_TOKENS

    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    feed()
    grown = resident_bytes("VmHWM") - before
    inbox.close()
    assert taken >= batches * BATCH
    assert read + inbox.malformed == taken
    assert samples > 0.01 * taken
    assert exporter.segment.read > 0  # states of some messages were read from shared memory
    assert inbox.malformed > 0.3 * taken
    assert grown < ALLOWED_BYTES, f"{grown >> 20} MiB"


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        (Span("a", 1 << 27, 1, 0, 4, 0), "position"),
        (Span("a", -1, 1, 0, 4, 0), "position"),
        (Span("a", 0, 7, 0, 4, 0), "length"),
        (Span("a", 0, 2, 5, 4, 0), "first row"),
        (Span("a", 0, 1, -1, 4, 0), "first row"),
        (Span("a", 0, 1, 0, 4, 0, rejected=V), "refused token"),
        (Span("a", 1, 1, 0, 4, 0, prefix=np.array([V]).tobytes()), "this target has 100"),
        (Span("a" * 600, 0, 1, 0, 4, 0), "request's name"),
    ],
)
def test_a_span_out_of_bounds_is_refused_by_name(span, reason):
    with pytest.raises(WireError, match=reason):
        decode([memoryview(frame) for frame in message([span])], EXPECTED)


@pytest.mark.parametrize("said", [{"images": 0}, {"images": 1}, {"images": 3}])
def test_tokens_below_zero_without_an_embedding_each_are_refused(said):
    header, *frames = message([Span("a", 0, 6, 0, 6, 0)], **said)
    frames[-1] = np.array([0, -1, -1, 3, 4, 5]).tobytes()
    with pytest.raises(WireError, match="tokens below zero"):
        decode([memoryview(frame) for frame in (header, *frames)], EXPECTED)


@pytest.mark.parametrize("places", [b"", bytes(12), np.full(9, -1, np.int32).tobytes()])
def test_embeddings_without_a_place_each_are_refused(places):
    header, *frames = message([Span("a", 0, 6, 0, 6, 0)], images=3)
    told = msgspec.structs.replace(msgspec.msgpack.decode(header, type=Captured), places=places)
    with pytest.raises(WireError, match="places"):
        decode([memoryview(frame) for frame in (encode_header(told), *frames)], EXPECTED)


def test_spans_that_share_rows_are_refused():
    with pytest.raises(WireError, match="more than there are"):
        decode([memoryview(f) for f in message([Span(str(i), 0, 4, 0, 4, 0) for i in range(2)])], EXPECTED)


def test_another_targets_states_are_refused():
    frames = [memoryview(frame) for frame in message([Span("a", 0, 4, 0, 4, 0)])]
    for expected in (EXPECTED._replace(hidden_size=16), EXPECTED._replace(dtype="float32")):
        with pytest.raises(WireError, match=f"{expected.hidden_size} in {expected.dtype}"):
            decode(frames, expected)
    with pytest.raises(WireError, match="this target has 3"):
        decode(frames, EXPECTED._replace(vocab_size=3))


def test_positions_far_apart_allocate_only_what_came():
    ledger = TokenLedger()
    assembler = Assembler(ledger, 64)
    for start in (0, (1 << 27) - 8):
        assembler.add(*decode([memoryview(f) for f in message([Span("a", start, 4, 0, 4, 0)])]))
    (sample,) = assembler.add(Finished("s", 0, "a", 1 << 27, False), {})
    assert len(sample) == 4
    assert ledger.dropped == {"gap": 4}


def test_open_requests_are_bounded_and_the_longest_silent_gives_way():
    ledger = TokenLedger()
    assembler = Assembler(ledger, 64, max_open_tokens=10)
    for rid in "abc":
        assembler.add(*decode([memoryview(f) for f in message([Span(rid, 0, 4, 0, 4, 0)])]))
    assert assembler.open_tokens == 8
    assert ledger.dropped == {"too_many_open": 4}
    assert assembler.add(Finished("s", 0, "a", 4, False), {}) == []
    assert len(assembler.add(Finished("s", 0, "c", 4, False), {})) == 1
