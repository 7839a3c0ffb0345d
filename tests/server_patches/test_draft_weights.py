"""A swap on a device that works while the scheduler does."""

from types import SimpleNamespace

import torch
from torch import nn

from server_patches.common.draft_weights import LiveDraft


def test_a_swap_lets_the_step_that_is_under_way_end_first(monkeypatch):
    live = nn.Linear(2, 2, bias=False)
    under_way, waited_for = object(), []

    class SchedulersStream:
        def wait_stream(self, stream):
            waited_for.append((stream, live.weight.clone()))

    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(current_stream=lambda: SchedulersStream())
    )
    worker = SimpleNamespace(
        device="cuda",
        draft_worker=SimpleNamespace(draft_runner=SimpleNamespace(model=live), hot_token_id=None),
        target_worker=SimpleNamespace(model_runner=SimpleNamespace(forward_stream=under_way)),
    )
    before, after = live.weight.clone(), torch.ones(2, 2)
    LiveDraft(worker, "device").copy_in({"weight": after})
    [(stream, then)] = waited_for
    assert stream is under_way
    assert torch.equal(then, before)
    assert torch.equal(live.weight, after)
