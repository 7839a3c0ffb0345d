"""What arrives at the trainer, and what never did."""

import pytest
import torch
import zmq

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import Captured, Finished, Span, TensorLayout, encode_header
from sglang_specforge.sockets import EndpointTaken
from trainer.assemble import Assembler
from trainer.inbox import Inbox


@pytest.fixture
def ledger():
    return TokenLedger()


@pytest.fixture
def inbox(tmp_path, ledger):
    inbox = Inbox(f"ipc://{tmp_path}/spans", Assembler(ledger, 100), ledger)
    yield inbox
    inbox.close()


@pytest.fixture
def send(tmp_path):
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.connect(f"ipc://{tmp_path}/spans")
    yield socket.send_multipart
    socket.close()


def first_sample(inbox):
    for _ in range(50):
        if samples := inbox.receive(0.1):
            return samples[0]
    raise AssertionError("no sample within 5 s")


def captured(start, length, sent_before):
    tensors = [
        ("aux_N3H", torch.zeros(length, 6)),
        ("last_NH", torch.zeros(length, 2)),
        ("tokens_N", torch.arange(length)),
    ]
    layouts = [TensorLayout(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors]
    header = encode_header(Captured("s", sent_before, 0, [Span("a", start, length, 0, 4, 0)], layouts))
    return [header, *(t.numpy().tobytes() for _, t in tensors)]


def finished(total, sent_before):
    return [encode_header(Finished("s", sent_before, "a", total, False))]


def test_samples_come_out_when_requests_end(inbox, ledger, send):
    send(captured(0, 4, 0))
    send(captured(4, 2, 4))
    send(finished(6, 6))
    sample = first_sample(inbox)
    assert len(sample) == 6
    assert ledger.received == 6
    assert ledger.dropped == {}


def test_tokens_lost_on_the_way_are_counted(inbox, ledger, send):
    send(captured(0, 4, 0))
    send(captured(9, 2, 9))  # five tokens were sent in between
    send(finished(11, 11))
    sample = first_sample(inbox)
    assert len(sample) == 4
    assert ledger.received == 11
    assert ledger.dropped == {"lost_in_transit": 5, "gap": 2}


def test_rubbish_and_replays_are_left_out(inbox, ledger, send):
    send([b"rubbish"])
    send(captured(0, 4, 0))
    send(captured(0, 4, 0))
    send(finished(4, 4))
    sample = first_sample(inbox)
    assert len(sample) == 4
    assert inbox.malformed == 2
    assert ledger.received == 4


def test_a_second_reader_of_a_stream_is_refused_with_what_to_do(tmp_path):
    endpoint, ledger = f"ipc://{tmp_path}/taken", TokenLedger()
    first = Inbox(endpoint, Assembler(ledger, 100), ledger)
    with pytest.raises(EndpointTaken, match="--draft-training-trainer none"):
        Inbox(endpoint, Assembler(ledger, 100), ledger)
    first.close()
    Inbox(endpoint, Assembler(ledger, 100), ledger).close()
