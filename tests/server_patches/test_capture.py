"""What the hooks of a pass do without a request in it."""

from types import SimpleNamespace

import torch

from server_patches.common import process
from server_patches.common.capture import after_verify
from server_patches.cpu.hooks import _rotate_some

IDLE = SimpleNamespace(reqs=[], forward_mode=SimpleNamespace(is_idle=lambda: True))


def test_a_rank_that_is_idle_under_dp_attention_captures_nothing_and_goes_on(monkeypatch):
    monkeypatch.setattr(process, "this", None)  # whoever asks for anything of this process fails
    after_verify(SimpleNamespace(accept_index=torch.empty(0)), None, IDLE)


def test_no_rows_are_rotated_into_no_rows():
    empty = torch.empty(0, 64)
    assert _rotate_some(None, None, torch.empty(0), empty, empty) == (empty, empty)
    assert _rotate_some(lambda *given: "rotated", None, torch.ones(1), empty, empty) == "rotated"
