"""The bank's memory, and a swap on a device that works while the scheduler does."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from server_patches.common.draft_weights import LiveDraft

UNDER_WAY = object()  # the stream of the step before


class Draft(nn.Linear):
    """Loads as SGLang's models do: a class's function, on whatever has parameters by name."""

    def load_weights(self, tensors):
        parameters = dict(self.named_parameters())
        for name, tensor in tensors:
            parameters[name].data.copy_(tensor)


@pytest.fixture
def draft():
    return Draft(2, 2, bias=False)


def live_draft(draft, device="cpu", slots=2):
    worker = SimpleNamespace(
        device=device,
        draft_worker=SimpleNamespace(draft_runner=SimpleNamespace(model=draft), hot_token_id=None),
        target_worker=SimpleNamespace(model_runner=SimpleNamespace(forward_stream=UNDER_WAY)),
    )
    return LiveDraft(worker, "device", slots)


def loaded(live, value):
    return live.load_shadows([("weight", torch.full((2, 2), value))])


def test_a_swap_lets_the_step_that_is_under_way_end_first(draft, monkeypatch):
    waited_for = []

    class SchedulersStream:
        def wait_stream(self, stream):
            waited_for.append((stream, draft.weight.clone()))

    device = SimpleNamespace(current_stream=SchedulersStream)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    before, live = draft.weight.clone(), live_draft(draft, "cuda")
    live.copy_in(loaded(live, 1.0))
    [(stream, then)] = waited_for
    assert stream is UNDER_WAY
    assert torch.equal(then, before)
    assert torch.equal(draft.weight, torch.ones(2, 2))


def test_versions_take_turns_in_memory_that_was_there_from_the_start(draft):
    live = live_draft(draft)
    first, second = live.copy_out(), loaded(live, 2.0)
    places = {shadows["weight"].data_ptr() for shadows in (first, second)}
    live.release(second)
    third = loaded(live, 3.0)
    assert third["weight"].data_ptr() in places
    assert torch.equal(first["weight"], draft.weight)
    live.copy_in(third)
    assert draft.weight.unique().tolist() == [3.0]
    assert loaded(live, 4.0)["weight"].data_ptr() not in places  # more than there are slots


def test_what_cannot_be_loaded_gives_its_memory_back(draft):
    live = live_draft(draft, slots=1)
    live.release(first := loaded(live, 1.0))
    with pytest.raises(KeyError):
        live.load_shadows([("bias", torch.zeros(2))])
    assert loaded(live, 2.0)["weight"].data_ptr() == first["weight"].data_ptr()


def test_the_token_map_goes_with_a_version(draft):
    live = live_draft(draft)
    live._worker.hot_token_id = torch.arange(3)  # SGLang has it later than the weights
    first = live.copy_out()
    live.copy_in({**first, "hot_token_id": torch.tensor([4, 5, 6])})
    assert live._worker.hot_token_id.tolist() == [4, 5, 6]
    live.copy_in(first)
    assert live._worker.hot_token_id.tolist() == [0, 1, 2]
