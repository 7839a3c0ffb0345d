"""Memory of another process, read and written by the transfer engine (over TCP: there is no RDMA device here)."""

import msgspec
import pytest
import torch

from sglang_specforge.contracts.frames import WireError
from sglang_specforge.contracts.spans import RemoteSegment
from sglang_specforge.shared_memory import SegmentRefused, SharedSegment

pytest.importorskip("mooncake.engine", reason="needs libibverbs1", exc_type=ImportError)
from sglang_specforge.pull import Puller

NOBODY = RemoteSegment("127.0.0.1:1", 4096, 1 << 12, 7)


@pytest.fixture(scope="module")
def engines():
    return Puller("tcp://127.0.0.1"), Puller("tcp://127.0.0.1")


@pytest.fixture
def segment():
    segment = SharedSegment(1 << 16, pinned=False)
    segment.ring[:] = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8)
    return segment


@pytest.fixture
def pulled(engines, segment):
    exporter, reader = engines
    remote = msgspec.structs.replace(exporter.offer(segment), reader=7)
    yield reader.open(remote)
    exporter.unregister(segment.memory.data_ptr())


def test_what_lies_in_the_ring_comes_as_it_is(segment, pulled):
    assert segment.is_read_by(7)
    assert pulled.ring.nbytes == 1 << 16
    for begin, end in ((0, 1), (64, 1064), (1000, 1 << 16)):
        assert bytes(pulled.ring[begin:end]) == bytes(segment.ring[begin:end].numpy())


def test_the_exporter_knows_what_was_read_and_the_reader_what_was_overwritten(segment, pulled):
    for message, read in ((3, 3), (2, 3), (5, 5)):
        pulled.done_with(message)
        assert segment.read == read
    segment.reclaim(8)
    assert [pulled.is_intact(message) for message in (7, 8, 9)] == [False, False, True]


def test_a_segment_that_cannot_be_reached_is_refused(engines):
    with pytest.raises(SegmentRefused, match=r"127\.0\.0\.1:1 cannot be written to"):
        engines[1].open(NOBODY)


def test_what_cannot_be_pulled_is_no_message(engines, pulled):
    pulled._remote = NOBODY
    with pytest.raises(WireError, match="8 bytes cannot be pulled"):
        pulled.ring[0:8]
    assert not pulled.is_intact(1)
