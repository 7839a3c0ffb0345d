"""Who gets a server's states over the network: the one that holds the key it gave, for as long as its lease lasts."""

import stat

import pydantic
import pytest
import torch
import zmq

from sglang_specforge import reader as readers
from sglang_specforge.curve import Door, Identity
from sglang_specforge.reader import Lease, Reader, ReaderHeld
from sglang_specforge.sockets import EndpointTaken
from tests.sglang_specforge.test_export import endpoint, exporting, wait_for, way_file  # noqa: F401 - a fixture
from tests.sglang_specforge.test_shared_memory import read, receive, serve
from trainer.assemble import Assembler
from trainer.inbox import Inbox, TokenLedger

TRAINER = Identity.new()


def reader_at(port, key=TRAINER.public):
    return Reader(spans_endpoint=f"tcp://127.0.0.1:{port}", control_endpoint="tcp://127.0.0.1:9", key=key)


def listen(identity, admitted):
    """An inbox at a free port, and its port."""
    door = Door(identity, admitted)
    inbox = Inbox("tcp://127.0.0.1:*", Assembler(TokenLedger(), 100), TokenLedger(), door=door)
    return inbox, door, int(inbox.endpoint.rpartition(":")[2])


@pytest.fixture
def doors():
    opened = []
    yield opened
    for door in opened:
        door.close()


@pytest.fixture
def exporter_and_copier(endpoint):  # noqa: F811
    exporter, copier = exporting(endpoint, 1 << 14)
    yield exporter, copier
    exporter.stop()


def test_states_turn_to_the_reader_elsewhere_bit_by_bit_and_back_to_the_one_here(
    endpoint, exporter_and_copier, doors  # noqa: F811
):  # fmt: skip
    exporter, copier = exporter_and_copier
    here, _ = read(endpoint)
    lease = Lease(way_file(endpoint))
    for turn in (1, 2):
        states = serve(exporter, copier, f"{turn}-here")
        assert torch.equal(receive(here).aux_T3H, states["aux_N3H"])
        far, door, port = listen(TRAINER, lease.own.public)
        doors.append(door)
        assert lease.take(reader_at(port))
        exporter.reader = turn
        wait_for(lambda: exporter.counters()["transport"] == "tcp" and exporter.counters()["closed"] is None)
        states = serve(exporter, copier, f"{turn}-far", rows=50)
        assert torch.equal(receive(far).last_TH, states["last_NH"])
        assert not here.receive(0)
        wait_for(lambda: exporter.ring.used_bytes == 0)
        lease.end()
        exporter.reader = 0
        wait_for(lambda: exporter.counters()["transport"] != "tcp" and exporter.counters()["closed"] is None)
    here.close()


@pytest.mark.parametrize("wrong", ["listener's", "server's"])
def test_nothing_is_sent_where_a_key_is_not_the_one_that_was_told(endpoint, exporter_and_copier, doors, wrong):  # noqa: F811
    exporter, _ = exporter_and_copier
    lease = Lease(way_file(endpoint))
    listener = Identity.new() if wrong == "listener's" else TRAINER
    admitted = Identity.new().public if wrong == "server's" else lease.own.public
    far, door, port = listen(listener, admitted)
    doors.append(door)
    failed = far._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    lease.take(reader_at(port))
    exporter.reader = 1
    wait_for(lambda: failed.get(zmq.EVENTS) & zmq.POLLIN)
    assert exporter.counters()["closed"] == "nobody_listening"
    assert exporter.failure is None
    far._socket.disable_monitor()
    failed.close()


def test_where_the_states_go_is_for_the_server_s_user_alone(endpoint):  # noqa: F811
    Lease(way_file(endpoint)).take(reader_at(9))
    assert stat.S_IMODE(way_file(endpoint).stat().st_mode) == 0o600


def test_a_lease_that_is_not_to_be_read_leaves_the_reader_here(endpoint, exporter_and_copier):  # noqa: F811
    exporter, copier = exporter_and_copier
    way_file(endpoint).write_text("rubbish")
    exporter.reader = 1
    here, _ = read(endpoint)
    states = serve(exporter, copier, "a")
    assert torch.equal(receive(here).aux_T3H, states["aux_N3H"])
    here.close()


def test_a_lease_is_renewed_by_its_holder_and_others_wait_until_it_runs_out(endpoint, monkeypatch):  # noqa: F811
    now_s = 1000.0
    monkeypatch.setattr(readers.time, "monotonic", lambda: now_s)
    lease, other = Lease(way_file(endpoint)), reader_at(9, Identity.new().public)
    assert lease.take(reader_at(9))
    assert not lease.take(reader_at(9))
    now_s += readers.LEASE_S - 1
    assert not lease.take(reader_at(9))
    now_s += readers.LEASE_S - 1
    with pytest.raises(ReaderHeld, match="tcp://127.0.0.1:9"):
        lease.take(other)
    now_s += 2
    assert lease.has_run_out()
    assert lease.take(other)


@pytest.mark.parametrize(
    "at",
    ["127.0.0.1:9", "ipc:///tmp/x", "tcp://:9", "tcp://*:9", "tcp://a:0", "tcp://a:65536", "tcp://a b:9", "tcp://a"],
)
def test_an_endpoint_that_is_none_of_tcp_is_refused(at):
    with pytest.raises(pydantic.ValidationError, match="tcp://HOST:PORT"):
        Reader(spans_endpoint=at, control_endpoint="tcp://a:9", key=TRAINER.public)


@pytest.mark.parametrize("key", ["", "x" * 39, "x" * 45, "\u00e9" * 40, " " * 40])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(pydantic.ValidationError, match="public key of CURVE"):
        Reader(spans_endpoint="tcp://a:9", control_endpoint="tcp://a:9", key=key)


def test_a_port_that_is_taken_is_said_to_be(doors):
    _, door, port = listen(TRAINER, TRAINER.public)
    second = Door(TRAINER, TRAINER.public)
    doors += [door, second]
    with pytest.raises(EndpointTaken, match="--listen"):
        Inbox(f"tcp://127.0.0.1:{port}", Assembler(TokenLedger(), 100), TokenLedger(), door=second)
