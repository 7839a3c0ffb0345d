"""What older versions of SGLang do otherwise: last hidden states packed, control and answers by other ways."""

from types import SimpleNamespace

import pytest
import torch

from server_patches.common import outputs
from server_patches.common.control import Order
from server_patches.v0_5_17.outputs import after_accept
from server_patches.v0_5_21 import control
from server_patches.v0_5_22 import packing


class Processor:
    """Stores aux states as ``LogitsProcessor`` does: of every row, or only of each request's last."""

    def _get_hidden_states_to_store(self, hidden, before_norm, aux, rows):
        return None if aux is None else torch.cat(aux, -1)[rows]


def test_last_hidden_states_ride_behind_the_aux_states_and_are_taken_off_again():
    processor = Processor()
    packing.pack(processor)
    aux, last = [torch.randn(5, 4) for _ in range(3)], torch.randn(5, 4)
    packed = processor._get_hidden_states_to_store(last, None, aux, slice(None))
    logits = SimpleNamespace(hidden_states=packed)
    packing.unpack(SimpleNamespace(logits_output=logits))
    torch.testing.assert_close(logits.hidden_states, torch.cat(aux, -1), rtol=0, atol=0)
    torch.testing.assert_close(logits.last_hidden_states, last, rtol=0, atol=0)


def test_states_of_last_rows_alone_and_of_passes_without_aux_states_are_left_as_they_are():
    processor = Processor()
    packing.pack(processor)
    aux, last = [torch.randn(5, 7) for _ in range(3)], torch.randn(5, 7)
    alone = processor._get_hidden_states_to_store(last, None, aux, slice(4, 5))
    assert alone.shape == (1, 21)
    assert processor._get_hidden_states_to_store(last, None, None, slice(None)) is None
    for states in (alone, None):
        logits = SimpleNamespace(hidden_states=states)
        packing.unpack(SimpleNamespace(logits_output=logits))
        assert logits.hidden_states is states
    packing.unpack(SimpleNamespace(logits_output=None))


@pytest.fixture
def ordered(monkeypatch):
    """Orders that note what they did; one refuses."""
    done = []
    ours = {
        "draft_training_load": Order(lambda value: done.append(("load", value))),
        "draft_training_window": Order(lambda value: done.append(("window", value))),
        "draft_training_prepare": Order(lambda value: None, lambda value: f"no {value}"),
    }
    monkeypatch.setattr(control, "orders", lambda step: ours)
    return done


def ask(**values):
    return control.around_set(lambda scheduler, asked: "SGLang's", None, SimpleNamespace(server_args=values))


def test_our_numbers_are_followed_and_others_are_left_to_sglang(ordered):
    assert ask(draft_training_load=3, draft_training_window=7).updated
    assert ordered == [("load", 3), ("window", 7)]
    assert ask(pp_max_micro_batch_size=8) == "SGLang's"
    assert ask() == "SGLang's"


def test_where_one_number_is_refused_none_is_followed(ordered):
    assert not ask(draft_training_load=3, draft_training_prepare=4).updated
    assert ordered == []


class Request:
    def __init__(self, rid):
        self.rid = rid


def test_answers_name_their_draft_versions_in_their_own_places():
    first, second, third = (Request(name) for name in "abc")
    outputs.note([first, third], 4)
    outputs.note([third], 5)
    answer = SimpleNamespace(rids=[], customized_info={})
    for req in (first, second, third):
        answer.rids.append(req.rid)
        if answer.customized_info and req is second:  # as SGLang pads what a request did not bring
            answer.customized_info[outputs.KEY].append([None, None])
        after_accept(None, answer, req=req)
    assert answer.customized_info == {outputs.KEY: [[4], [], [4, 5]]}


def test_a_request_that_sends_nothing_yet_keeps_what_is_to_be_said():
    req, answer = Request("a"), SimpleNamespace(rids=["other"], customized_info={})
    outputs.note([req], 6)
    after_accept(None, answer, req=req)
    assert answer.customized_info == {}
    assert outputs.take(req) == [6]
