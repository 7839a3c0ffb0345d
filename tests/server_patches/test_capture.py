"""What the hooks of a pass do: without a request in it, and where states are on another device than the host."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from server_patches.common import process
from server_patches.common.capture import after_verify, around_prefill
from server_patches.cpu.hooks import _rotate_some
from sglang_specforge.export.entry import HostCopier
from sglang_specforge.export.pace import Pace
from sglang_specforge.export.ring import HostRing
from tests.other_device import OTHER, OtherDevice

CPU, HIDDEN, VOCAB = torch.device("cpu"), 8, 48
IDLE = SimpleNamespace(reqs=[], forward_mode=SimpleNamespace(is_idle=lambda: True))


def test_a_rank_that_is_idle_under_dp_attention_captures_nothing_and_goes_on(monkeypatch):
    monkeypatch.setattr(process, "this", None)  # whoever asks for anything of this process fails
    after_verify(SimpleNamespace(accept_index=torch.empty(0)), None, IDLE)


def test_no_rows_are_rotated_into_no_rows():
    empty = torch.empty(0, 64)
    assert _rotate_some(None, None, torch.empty(0), empty, empty) == (empty, empty)
    assert _rotate_some(lambda *given: "rotated", None, torch.ones(1), empty, empty) == "rotated"


class Req:
    """One of SGLang's, running."""

    cached_tokens, origin_input_ids = 0, ()

    def finished(self):
        return False


def admit(left_out):
    request = SimpleNamespace(is_counted=True, slice="", prompt_tokens=4)
    return SimpleNamespace(left_out="budget" if left_out else None, enter=lambda window: None, request=request)


def capture(monkeypatch, left_out, travel, hook):
    """The entries that ``hook`` makes of a pass in which some requests are left out."""
    entries, admitted = [], [admit(out) for out in left_out]
    exporter = SimpleNamespace(
        failure=None, timed=nullcontext, pace=Pace(), capture=entries.append, fail=pytest.fail,
        admission=SimpleNamespace(pick=lambda requests, nbytes: admitted),
    )  # fmt: skip
    this = SimpleNamespace(
        exporter=exporter,
        copier=HostCopier(HostRing(1 << 16, pinned=False), CPU),
        bank=SimpleNamespace(window=0, active_version=3),
        run=SimpleNamespace(settings=SimpleNamespace(capture_dtype=travel)),
    )
    monkeypatch.setattr(process, "this", this)
    hook([Req() for _ in left_out])
    return entries


def verify(reqs, device, topk):
    B, D, R = len(reqs), 6 if topk > 1 else 4, 4
    g = torch.Generator().manual_seed(0)
    accept_index_BR = torch.arange(B)[:, None] * D + torch.arange(R)
    accept_index_BR[0, 2:] = -1
    logits = SimpleNamespace(
        hidden_states=torch.randn(B * D, 3 * HIDDEN, generator=g).to(device, non_blocking=True),
        last_hidden_states=torch.randn(B * D, HIDDEN, generator=g).to(device, non_blocking=True),
    )
    result = SimpleNamespace(
        accept_index=accept_index_BR.int().to(device, non_blocking=True),
        accept_lens=(accept_index_BR >= 0).sum(1).int().to(device, non_blocking=True),
        logits_output=logits,
    )
    batch = SimpleNamespace(
        reqs=reqs,
        forward_mode=SimpleNamespace(is_idle=lambda: False),
        seq_lens=torch.arange(5, 5 + B).to(device, non_blocking=True),
        spec_info=SimpleNamespace(
            draft_token=torch.randint(VOCAB, (B * D,), generator=g).to(device, non_blocking=True), topk=topk
        ),
    )
    after_verify(result, None, batch)


def prefill(reqs, device):
    lengths = [3, 5, 2][: len(reqs)]
    g = torch.Generator().manual_seed(0)
    logits = SimpleNamespace(
        hidden_states=torch.randn(sum(lengths), 3 * HIDDEN, generator=g).to(device, non_blocking=True),
        last_hidden_states=torch.randn(sum(lengths), HIDDEN, generator=g).to(device, non_blocking=True),
    )
    batch = SimpleNamespace(
        reqs=reqs,
        forward_mode=SimpleNamespace(is_idle=lambda: False),
        input_ids=torch.randint(VOCAB, (sum(lengths),), generator=g).to(device, non_blocking=True),
        extend_lens=lengths,
        prefix_lens=[0] * len(reqs),
    )
    around_prefill(lambda worker, batch: SimpleNamespace(logits_output=logits), None, batch)


PASSES = {
    "a chain": lambda reqs, device: verify(reqs, device, topk=1),
    "a tree": lambda reqs, device: verify(reqs, device, topk=2),
    "prompts": prefill,
}


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("left_out", [[False] * 3, [False, True, False]], ids=["all", "some"])
@pytest.mark.parametrize("travel", ["served", "float8"])
def test_states_of_another_device_are_captured_without_waiting_for_it(monkeypatch, which, left_out, travel):
    [expected] = capture(monkeypatch, left_out, travel, lambda reqs: PASSES[which](reqs, CPU))
    with OtherDevice() as device:
        [found] = capture(monkeypatch, left_out, travel, lambda reqs: PASSES[which](reqs, OTHER))
    assert set(device.waits) == {"aten.copy_.default"}  # into the ring: without waiting, where it is pinned
    assert len(expected.states) == 2
    for (name, rows), (expected_name, expected_rows) in zip(found.states, expected.states, strict=True):
        assert name == expected_name
        assert torch.equal(rows, expected_rows)
    assert torch.equal(found.tokens_N, expected.tokens_N)
    assert found.prefilled == expected.prefilled
    if found.verified:
        assert found.verified.facts() == expected.verified.facts()
