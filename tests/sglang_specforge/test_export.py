"""Ring, exporter and wire: bytes arrive as they were, and nothing ever waits for the reader."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq

from sglang_specforge.contracts import spans
from sglang_specforge.contracts.frames import WireError, decode
from sglang_specforge.export import pieces
from sglang_specforge.export.admission import Admission
from sglang_specforge.export.entry import HostCopier, Prefilled, Verified
from sglang_specforge.export.exporter import Exporter
from sglang_specforge.export.ring import HostRing

H = 4


class Request:
    refusal, is_counted, prompt = None, True, ()

    def __init__(self, rid, prompt_tokens, cached_tokens=0, slice=""):
        self.rid = self.alias = rid
        self.prompt_tokens, self.cached_tokens, self.slice = prompt_tokens, cached_tokens, slice
        self.ended = False

    def is_finished(self):
        return self.ended

    def is_aborted(self):
        return False

    def total_tokens(self):
        return self.prompt_tokens


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/spans"


def states(rows, dtype=torch.bfloat16):
    return {
        "aux_N3H": torch.randn(rows, 3 * H).to(dtype),
        "last_NH": torch.randn(rows, H).to(dtype),
    }


def wait_for(condition):
    done = threading.Event()
    for _ in range(1000):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("the condition did not come true within 10 s")


def way_file(endpoint):
    return Path(endpoint.removeprefix("ipc://")).with_name("reader.json")


def exporting(endpoint, ring_bytes):
    ring = HostRing(ring_bytes, pinned=False)
    exporter = Exporter(endpoint, way_file(endpoint), ring, Admission(ring, lambda request: request))
    exporter.start()
    return exporter, HostCopier(ring, torch.device("cpu"))


def prefill(copier, request=None):
    request = request or Request("a", 5)
    rows = request.prompt_tokens
    captured = states(rows)
    facts = {"prompt_tokens_N": torch.arange(rows), "prefilled": [Prefilled(0, rows)]}
    return copier.copy([request], 3, captured, **facts), captured


def picks(exporter, request, nbytes):
    return exporter.admission.pick([request], [nbytes])[0].left_out is None


def test_what_is_captured_arrives_bit_by_bit(endpoint):
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(endpoint)
    exporter, copier = exporting(endpoint, 1 << 16)
    wait_for(lambda: exporter.counters()["closed"] is None)
    request = Request("a", 5)
    assert picks(exporter, request, 5 * 4 * H * 2)
    entry, captured = prefill(copier, request)
    exporter.capture(entry)
    request.ended = True

    message, tensors = decode([f.buffer for f in socket.recv_multipart(copy=False)])
    assert message.spans == [spans.Span("a-1", 0, 5, 0, 5, 0)]
    assert (message.draft_version, message.sent_before, message.stream) == (3, 0, exporter.stream)
    assert torch.equal(tensors["aux_N3H"], captured["aux_N3H"])
    assert torch.equal(tensors["last_NH"], captured["last_NH"])
    assert tensors["tokens_N"].tolist() == [0, 1, 2, 3, 4]
    end, _ = decode([f.buffer for f in socket.recv_multipart(copy=False)])
    assert (end.rid, end.total_tokens, end.sent_before) == ("a-1", 5, 5)
    del tensors
    wait_for(lambda: exporter.ring.used_bytes == 0)
    exporter.stop()
    assert not exporter._thread.is_alive()
    socket.close()


def test_the_tokens_of_a_cached_prefix_go_with_the_first_span():
    entry, _ = prefill(HostCopier(HostRing(1 << 16, False), torch.device("cpu")))
    requests, prefilled = [Request("a", 5, 2), Request("b", 2)], [Prefilled(2, 3, [7, 8]), Prefilled(0, 2)]
    entry = replace(entry, requests=requests, prefilled=prefilled)
    prefixed = spans.Span("a", 2, 3, 0, 5, 2, prefix=torch.tensor([7, 8]).numpy().tobytes())
    assert entry.spans() == [prefixed, spans.Span("b", 0, 2, 3, 2, 0)]


def test_the_tokens_of_a_prompt_that_another_server_prefills_go_with_the_first_verification():
    copier, requests = HostCopier(HostRing(1 << 16, False), torch.device("cpu")), [Request("a", 2), Request("b", 2)]
    for request in requests:
        request.prompt = [7, 8]
    facts = torch.tensor([[2, 1, 4, 5], [3, 2, 4, 5]])
    verified = Verified(2, 2, True, facts, picked=[0, 1], counted=[0, 1], slices=[""] * 2, prompts=[5] * 2)
    entry = copier.copy(requests, 0, states(4), verified=verified)
    assert [span.prefix for span in entry.spans()] == [torch.tensor([7, 8]).numpy().tobytes(), b""]


FACTS = torch.tensor([[10, 2, 4, 7, 5, 3], [15, 1, 0, 0, 0, 0], [20, 4, 4, 8, 5, 3], [30, 1, 4, 9, 6, 3]])

PATHS = torch.arange(100, 116).view(4, 4)


@pytest.mark.parametrize("chain", [True, False])
def test_verify_spans_are_the_accepted_paths_of_the_captured_requests(chain):
    copier = HostCopier(HostRing(1 << 16, False), torch.device("cpu"))
    requests = [Request("a", 4), Request("b", 4), Request("c", 4, 2, slice="code")]
    facts = FACTS if chain else torch.cat([FACTS, PATHS], 1)
    verified = Verified(4, 4, chain, facts, picked=[0, 2, 3], counted=[0, 1, 2, 3], slices=[""] * 4, prompts=[5] * 4)
    entry = copier.copy(requests, 0, states(12), verified=verified)
    assert sum(entry.verified.committed()) == 8
    rows = (FACTS[:, 2:] if chain else PATHS)[[0, 2, 3]]
    assert entry.verified.tokens_N().tolist() == rows.flatten().tolist()
    assert entry.spans() == [
        spans.Span("a", 10, 2, 0, 4, 0, 7, 5 if chain else -1),
        spans.Span("b", 20, 4, 4, 4, 0, 8, -1),
        spans.Span("c", 30, 1, 8, 4, 2, 9, 9 if chain else -1, slice="code"),
    ]


def test_a_long_pass_arrives_in_pieces_and_its_memory_comes_back_with_the_last(endpoint, monkeypatch):
    rows = 1 << 18  # 8 MiB, which no socket's buffer holds: the end waits in the ring until the beginning is read
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 1 << 20)
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.bind(endpoint)
    exporter, copier = exporting(endpoint, 1 << 24)
    wait_for(lambda: exporter.counters()["closed"] is None)
    request = Request("a", rows)
    assert picks(exporter, request, rows * 4 * H * 2)
    entry, captured = prefill(copier, request)
    exporter.capture(entry)
    wait_for(lambda: exporter.counters()["sent"] == rows)
    assert exporter.ring.used_bytes == rows * 4 * H * 2
    arrived = []
    while sum(message.tokens for message, _ in arrived) < rows:
        arrived.append(decode([f.buffer for f in socket.recv_multipart(copy=False)]))
    assert len(arrived) > 2
    assert torch.equal(torch.cat([tensors["aux_N3H"] for _, tensors in arrived]), captured["aux_N3H"])
    wait_for(lambda: exporter.ring.used_bytes == 0)
    assert exporter.counters()["dropped"] == {}
    exporter.stop()
    socket.close()


def test_what_was_captured_for_a_reader_goes_to_it_though_another_has_asked_meanwhile(endpoint, monkeypatch):
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(endpoint)
    exporter, copier = exporting(endpoint, 1 << 16)
    wait_for(lambda: exporter.counters()["closed"] is None)
    sent_before = []
    monkeypatch.setattr(exporter, "_turn_to", lambda reader: sent_before.append(exporter.counters()["sent"]))
    exporter.capture(prefill(copier)[0])
    exporter.reader = 1
    wait_for(lambda: sent_before)
    assert sent_before == [5]
    exporter.stop()
    socket.close()


def test_nothing_is_captured_while_nobody_listens_and_what_is_under_way_then_is_counted(endpoint):
    exporter, copier = exporting(endpoint, 1024)
    assert not picks(exporter, Request("a", 5), 160)
    exporter.capture(prefill(copier)[0])  # picked before the reader went
    wait_for(lambda: exporter.counters()["captured"] == 5)
    wait_for(lambda: exporter.ring.used_bytes == 0 and exporter.counters()["dropped"])
    counters = exporter.counters()
    assert (counters["sent"], counters["dropped"]) == (0, {"nobody_listening": 5})
    assert counters["requests"]["left_out"] == {"nobody_listening": 1}
    exporter.stop()


def test_a_reader_that_stops_reading_costs_requests_and_never_a_wait(endpoint):
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.bind(endpoint)
    exporter, copier = exporting(endpoint, 1 << 20)
    wait_for(lambda: exporter.counters()["closed"] is None)
    wanted = [Request(str(i), 1000) for i in range(400)]
    for request in wanted:
        if picks(exporter, request, 1000 * 4 * H * 2):
            exporter.capture(prefill(copier, request)[0])
        request.ended = True
    left_out = exporter.counters()["requests"]["left_out"]
    assert left_out["ring_full"] > 0

    whole, ended = set(), set()
    while len(ended) < 400 - sum(left_out.values()):
        assert socket.poll(10_000)
        message, _ = decode([f.buffer for f in socket.recv_multipart(copy=False)])
        if isinstance(message, spans.Captured):
            whole.add(message.spans[0].rid)
        elif not message.cut_short:
            ended.add(message.rid)
    assert ended == whole
    wait_for(lambda: exporter.ring.used_bytes == 0)
    assert exporter.counters()["dropped"] == {}
    exporter.stop()
    socket.close()


def test_acceptance_is_counted_of_passes_that_are_not_captured(endpoint):
    exporter, copier = exporting(endpoint, 1024)
    verified = Verified(4, 4, True, FACTS, picked=[], counted=[0, 3], slices=["", "code"], prompts=[5, 300])
    exporter.capture(copier.copy([], 2, {}, verified=verified))
    wait_for(lambda: sum(exporter.counters()["committed"]) == 2)
    expected = {
        "committed": [0, 1, 1],
        "committed_by_version": {"2": [0, 1, 1]},
        "committed_by_slice": {"code": [0, 1]},
        "committed_by_prompt": {"128": [0, 0, 1], "512": [0, 1]},
        "committed_by_window": {},
    }
    assert exporter.counters().items() >= expected.items()
    assert exporter.counters()["captured"] == 0
    exporter.stop()


def test_a_step_that_drafted_nothing_is_timed_and_is_no_verification_of_a_draft(endpoint):
    exporter, copier = exporting(endpoint, 1024)
    verified = Verified(2, 1, True, None, picked=[], counted=[0, 1], slices=["", ""], prompts=[5, 5], seconds=0.5)
    exporter.capture(copier.copy([], 2, {}, verified=verified))
    wait_for(lambda: exporter.counters()["pace"]["undrafted"])
    assert exporter.counters()["pace"] == {"drafted": {}, "undrafted": {"2": [1, 0.5, 2, 2]}}
    assert exporter.counters()["committed"] == []
    assert exporter.counters()["committed_by_version"] == {}
    exporter.stop()


def test_the_ring_wraps_and_never_hands_out_memory_twice():
    ring = HostRing(1024, pinned=False)
    held = []
    for i in range(100):
        region = ring.reserve(200)
        while region is None:
            tag, old = held.pop(0)
            assert old.bytes.eq(tag).all()
            ring.release(old)
            region = ring.reserve(200)
        region.bytes.fill_(i)
        held.append((i, region))
    assert ring.used_bytes <= 1024
    assert ring.reserve(2000) is None
    assert ring.reserve(ring.room_bytes() + 1) is None
    assert ring.reserve(ring.room_bytes()) is not None


def test_an_empty_ring_takes_a_pass_as_large_as_itself_wherever_it_had_got_to():
    ring = HostRing(1024, pinned=False)
    small = ring.reserve(320)
    assert ring.room_bytes() == 704
    ring.release(small)
    assert ring.room_bytes() == 1024
    large = ring.reserve(1024)
    assert large.bytes.numel() == 1024
    assert ring.reserve(1) is None
    ring.release(large)
    ring.reserve(640).bytes.fill_(1)
    assert ring.reserve(320).bytes.fill_(2).numel() == 320
    assert ring.used_bytes == 960


@pytest.mark.parametrize("damage", ["header", "frame", "rows", "prefix", "protocol", "missing"])
def test_a_damaged_message_is_refused(damage):
    copier = HostCopier(HostRing(1 << 16, False), torch.device("cpu"))
    entry, _ = prefill(copier)
    message, tensors = entry.message("s", 0, entry.spans())
    frames = [memoryview(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in tensors]
    header = spans.encode_header(message)
    if damage == "header":
        header = header[:-3]
    elif damage == "frame":
        frames[0] = frames[0][:-2]
    elif damage == "rows":
        header = spans.encode_header(entry.message("s", 0, [spans.Span("a", 0, 6, 0, 5, 0)])[0])
    elif damage == "prefix":
        span = spans.Span("a", 3, 2, 0, 5, 3, prefix=bytes(8))
        header = spans.encode_header(entry.message("s", 0, [span])[0])
    elif damage == "protocol":
        header = header.replace(bytes([spans.PROTOCOL]), b"\x63")
    else:
        frames.pop()
    with pytest.raises(WireError):
        decode([memoryview(header), *frames])
