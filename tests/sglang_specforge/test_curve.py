"""Connections between machines, where one of them goes."""

import multiprocessing
import time

import zmq

from sglang_specforge import curve

QUEUED = 4  # messages, on either side


def read_nothing_of_a_server_that_goes(heartbeat_ms):
    """As a trainer in a long step: its queue is full, so that libzmq has stopped to read, and then the server goes."""
    curve._HEARTBEAT_EVERY_MS = heartbeat_ms
    server, own = curve.Identity.new(), curve.Identity.new()
    door, context = curve.Door(own, server.public), zmq.Context()
    reading, sending = door.context.socket(zmq.PULL), context.socket(zmq.PUSH)
    reading.rcvhwm = sending.sndhwm = QUEUED
    door.bind(reading, "tcp://127.0.0.1:*")
    sending.setsockopt(zmq.IMMEDIATE, 1)
    curve.connect(sending, reading.last_endpoint.decode(), server, own.public)
    while sending.poll(500, zmq.POLLOUT):
        sending.send(bytes(1 << 20))
    sending.close(linger=0)
    context.term()
    time.sleep(0.02 * heartbeat_ms)  # twenty heartbeats; there is nothing to wait for but time
    while reading.poll(500):
        reading.recv()
    door.close()


def test_a_reader_that_is_busy_outlives_a_server_that_goes():
    process = multiprocessing.get_context("spawn").Process(target=read_nothing_of_a_server_that_goes, args=(50,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
