"""Connections between machines, while one end is busy."""

import zmq

from sglang_specforge import curve

QUEUED = 4  # messages, on either side
LONG_STEP_MS = 12_000


def test_a_reader_in_a_long_step_keeps_its_connection_and_all_that_was_sent():
    """Its queue is full, so that libzmq has stopped to read."""
    server, own = curve.Identity.new(), curve.Identity.new()
    door, context = curve.Door(own, server.public), zmq.Context()
    reading, sending = door.context.socket(zmq.PULL), context.socket(zmq.PUSH)
    reading.rcvhwm = sending.sndhwm = QUEUED
    door.bind(reading, "tcp://127.0.0.1:*")
    sending.setsockopt(zmq.IMMEDIATE, 1)
    partings = sending.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    curve.connect(sending, reading.last_endpoint.decode(), server, own.public)
    sent = 0
    while sending.poll(500, zmq.POLLOUT):
        sending.send(sent.to_bytes(1 << 20, "big"))
        sent += 1

    assert not partings.poll(LONG_STEP_MS)
    assert [int.from_bytes(reading.recv(), "big") for _ in range(sent) if reading.poll(5_000)] == list(range(sent))

    sending.disable_monitor()
    partings.close()
    sending.close()
    context.term()
    door.close()
