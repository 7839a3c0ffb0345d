"""Memory shared with the reader: nothing is sent, nothing is read that was overwritten, and nothing is left behind."""

import errno
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import SegmentAddress
from sglang_specforge.shared_memory import OpenSegment, SegmentRefused, SharedSegment
from tests.sglang_specforge.test_export import H, Request, endpoint, exporting, picks, prefill, wait_for  # noqa: F401
from trainer.assemble import Assembler
from trainer.inbox import Inbox

ROW_BYTES = 4 * H * 2
KILLED_READER = """
import sys, time
from sglang_specforge.contracts.control import TokenLedger
from trainer.assemble import Assembler
from trainer.inbox import Inbox
ledger = TokenLedger()
inbox = Inbox(sys.argv[1], Assembler(ledger, 100), ledger)
while not inbox._segments:
    inbox.receive(0.1)
print("open", flush=True)
time.sleep(600)
"""


@pytest.fixture
def reading(endpoint):  # noqa: F811
    exporter, copier = exporting(endpoint, 1 << 14)
    inboxes = []

    def attach():
        inbox, ledger = read(endpoint)
        inboxes.append(inbox)
        return inbox, ledger

    yield exporter, copier, attach
    for inbox in inboxes:
        inbox.close()
    exporter.stop()


def read(address):
    ledger = TokenLedger()
    return Inbox(address, Assembler(ledger, 100), ledger), ledger


def serve(exporter, copier, rid, rows=5):
    """A request of one prefill, captured and ended; returns its states."""
    wait_for(lambda: exporter.counters()["closed"] is None)
    request = Request(rid, rows)
    assert picks(exporter, request, rows * ROW_BYTES)
    entry, states = prefill(copier, request)
    exporter.capture(entry)
    request.ended = True
    return states


def receive(inbox):
    samples = []
    wait_for(lambda: samples.extend(inbox.receive(0.01)) or samples)
    return samples[0]


def test_states_are_read_where_they_lie_bit_by_bit(reading):
    exporter, copier, attach = reading
    inbox, _ = attach()
    ways = set()
    for i in range(40):  # the ring is gone through several times
        states = serve(exporter, copier, str(i), rows=50)
        sample = receive(inbox)
        ways.add(exporter.counters()["transport"])
        assert torch.equal(sample.aux_T3H, states["aux_N3H"])
        assert torch.equal(sample.last_TH, states["last_NH"])
    assert ways == {"shared_memory"}
    wait_for(lambda: exporter.ring.used_bytes == 0)


def test_the_next_reader_takes_up_the_memory_that_the_last_one_left_unread(reading):
    exporter, copier, attach = reading
    for life in range(3):
        random.seed(0)  # as SGLang does
        inbox, ledger = attach()
        serve(exporter, copier, f"{life}-a")
        receive(inbox)
        assert exporter.counters()["transport"] == "shared_memory"
        serve(exporter, copier, f"{life}-b", rows=200)  # never read
        wait_for(lambda life=life: exporter.counters()["sent"] == 205 * (life + 1))
        assert exporter.ring.used_bytes >= 200 * ROW_BYTES
        inbox.close()
        wait_for(lambda: exporter.counters()["closed"] == "nobody_listening")
        wait_for(lambda: exporter.ring.used_bytes == 0)
        assert ledger.dropped == ({"lost_in_transit": 205 * life} if life else {})
    assert exporter.failure is None


def test_a_reader_that_is_killed_leaves_nothing_behind(reading, endpoint):  # noqa: F811
    exporter, copier, _ = reading
    with subprocess.Popen([sys.executable, "-c", KILLED_READER, endpoint], stdout=subprocess.PIPE) as reader:
        wait_for(lambda: exporter.counters()["closed"] is None)
        serve(exporter, copier, "a")
        assert reader.stdout.readline() == b"open\n"
        serve(exporter, copier, "b", rows=200)
        wait_for(lambda: exporter.counters()["sent"] == 205)
        os.kill(reader.pid, signal.SIGSTOP)
        assert exporter.ring.used_bytes >= 200 * ROW_BYTES
        os.kill(reader.pid, signal.SIGKILL)
    wait_for(lambda: exporter.counters()["closed"] == "nobody_listening")
    wait_for(lambda: exporter.ring.used_bytes == 0)


def test_what_was_overwritten_before_it_was_read_is_counted_and_not_used(reading):
    exporter, copier, attach = reading
    inbox, ledger = attach()
    serve(exporter, copier, "a")
    receive(inbox)
    serve(exporter, copier, "b")
    wait_for(lambda: exporter.counters()["sent"] == 10)
    exporter.ring.segment.reclaim(1 << 40)
    wait_for(lambda: inbox.receive(0.01) or ledger.dropped)
    assert ledger.dropped == {"overwritten": 5}


def test_without_memory_to_share_states_are_sent_and_the_status_says_why(endpoint, monkeypatch):  # noqa: F811
    def no_memory(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_memory)
    exporter, copier = exporting(endpoint, 1 << 14)
    inbox, _ = read(endpoint)
    states = serve(exporter, copier, "a")
    assert torch.equal(receive(inbox).aux_T3H, states["aux_N3H"])
    counters = exporter.counters()
    assert counters["transport"] == "zmq"
    assert "No space left" in counters["why_not_shared"]
    exporter.stop()
    inbox.close()


def test_only_a_sealed_segment_is_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"precious" * 1024)
    unsealed = os.memfd_create("specforge")
    os.truncate(unsealed, 8192)
    with (tmp_path / "file").open("r+b") as file:
        for fd, reason in ((file.fileno(), "not a segment"), (unsealed, "not sealed"), (987654, "cannot be opened")):
            with pytest.raises(SegmentRefused, match=reason):
                OpenSegment(SegmentAddress(os.getpid(), fd, 7))
    assert (tmp_path / "file").read_bytes() == b"precious" * 1024
    os.close(unsealed)


def test_a_segment_does_not_outlive_its_processes_and_cannot_shrink():
    segment = SharedSegment(1 << 12, pinned=False)
    address = segment.address(5)
    with pytest.raises(PermissionError):
        os.truncate(address.fd, 0)
    opened = OpenSegment(address)
    assert segment.is_read_by(5)
    assert os.readlink(f"/proc/self/fd/{address.fd}").endswith("(deleted)")  # it has no name
    segment.ring[0] = 9
    assert opened.ring[0] == 9
