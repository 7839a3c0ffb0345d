"""Ring, exporter and wire: bytes arrive as they were, and nothing ever waits for the reader."""

import threading
from dataclasses import replace

import pytest
import torch
import zmq

from sglang_specforge.contracts import spans
from sglang_specforge.export.entry import CapturedRequest, HostCopier, VerifyMeta
from sglang_specforge.export.exporter import Exporter
from sglang_specforge.export.ring import HostRing

H = 4


class Request:
    """An ended request, as the exporter watches them."""

    def __init__(self, rid, total):
        self.rid, self.total = rid, total

    def is_finished(self):
        return True

    def is_aborted(self):
        return False

    def total_tokens(self):
        return self.total


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


def prefill(copier, rid="a", rows=5, **fields):
    request = CapturedRequest(rid, rows, 0, start=0, length=rows, **fields)
    captured = states(rows)
    return copier.copy([request], 3, captured, torch.arange(rows)), captured


def test_what_is_captured_arrives_bit_by_bit(endpoint):
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(endpoint)
    exporter = Exporter(endpoint, 1 << 16, pinned=False)
    copier = HostCopier(exporter.ring, torch.device("cpu"))
    exporter.start()
    entry, captured = prefill(copier)
    exporter.capture(entry)
    exporter.watch(Request("a", 5))

    message, tensors = spans.decode([f.buffer for f in socket.recv_multipart(copy=False)])
    assert message.spans == [spans.Span("a", 0, 5, 0, 5, 0)]
    assert (message.draft_version, message.sent_before, message.stream) == (3, 0, exporter.stream)
    assert torch.equal(tensors["aux_N3H"], captured["aux_N3H"])
    assert torch.equal(tensors["last_NH"], captured["last_NH"])
    assert tensors["tokens_N"].tolist() == [0, 1, 2, 3, 4]
    end, _ = spans.decode([f.buffer for f in socket.recv_multipart(copy=False)])
    assert (end.rid, end.total_tokens, end.sent_before) == ("a", 5, 5)
    del tensors
    wait_for(lambda: exporter.ring.used_bytes == 0)
    exporter.stop()
    socket.close()


def test_the_tokens_of_a_cached_prefix_go_with_the_first_span():
    entry, _ = prefill(HostCopier(HostRing(1 << 16, False), torch.device("cpu")))
    requests = [CapturedRequest("a", 5, 2, start=2, length=3, prefix=[7, 8]), CapturedRequest("b", 2, 0, length=2)]
    entry = replace(entry, requests=requests)
    prefixed = spans.Span("a", 2, 3, 0, 5, 2, prefix=bytes([7, 0, 0, 0, 8, 0, 0, 0]))
    assert entry.spans() == [prefixed, spans.Span("b", 0, 2, 3, 2, 0)]


def test_verify_spans_are_the_accepted_paths():
    copier = HostCopier(HostRing(1 << 16, False), torch.device("cpu"))
    requests = [CapturedRequest("a", 4, 0), CapturedRequest("b", 4, 0), CapturedRequest("c", 4, 2, slice="code")]
    meta = VerifyMeta(3, torch.tensor([[10, 20, 30], [2, 3, 1], [7, 8, 9], [5, -1, 6]]))
    entry = copier.copy(requests, 0, states(9), torch.arange(9), meta)
    assert entry.spans() == [
        spans.Span("a", 10, 2, 0, 4, 0, 7, 5),
        spans.Span("b", 20, 3, 3, 4, 0, 8, -1),
        spans.Span("c", 30, 1, 6, 4, 2, 9, 6, slice="code"),
    ]


def test_without_a_reader_tokens_are_dropped_and_counted(endpoint):
    exporter = Exporter(endpoint, 1024, pinned=False)
    copier = HostCopier(exporter.ring, torch.device("cpu"))
    for _ in range(40):  # five passes of 5 rows fit the ring
        exporter.capture(prefill(copier)[0])
    exporter.start()
    wait_for(lambda: exporter.counters()["captured"] == 200)
    counters = exporter.counters()
    assert counters["captured"] == counters["sent"] + sum(counters["dropped"].values())
    assert set(counters["dropped"]) <= {"ring_full", "trainer_not_reading"}
    assert sum(counters["dropped"].values()) > 0
    assert counters["failure"] is None
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
    with pytest.raises(spans.WireError):
        spans.decode([memoryview(header), *frames])
