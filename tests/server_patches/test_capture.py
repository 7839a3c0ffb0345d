"""What the hooks of a pass do: without a request in it, and where states are on another device than the host."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from server_patches.common import process
from server_patches.common.capture import after_verify, around_prefill
from server_patches.cpu.hooks import _rotate_some
from sglang_specforge.export.entry import HostCopier
from sglang_specforge.export.pace import Pace
from sglang_specforge.export.ring import HostRing
from tests.other_device import OTHER, OtherDevice

CPU, HIDDEN, VOCAB, PAD = torch.device("cpu"), 8, 48, (1 << 61) + 3
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

    cached_tokens, origin_input_ids, multimodal_inputs = 0, (), None

    def finished(self):
        return False


def admit(left_out):
    request = SimpleNamespace(is_counted=True, slice="", prompt_tokens=4)
    return SimpleNamespace(left_out="budget" if left_out else None, enter=lambda window: None, request=request)


def capture(monkeypatch, left_out, travel, serve, device):
    """The entry that is made of a pass in which some requests are left out."""
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
    serve([Req() for _ in left_out], Rows(device))
    [entry] = entries
    return entry


def tokens(entry):
    """Of its rows, as they are sent."""
    return entry.message("stream", 0, [])[1][-1]


class Rows:
    """Random tensors on a device, the same on every one."""

    def __init__(self, device):
        self._device, self._generator = device, torch.Generator().manual_seed(0)

    def put(self, tensor):
        return tensor.to(self._device, non_blocking=True)

    def tokens(self, rows):
        return self.put(torch.randint(VOCAB, (rows,), generator=self._generator))

    def logits(self, rows):
        aux, last = (torch.randn(rows, width, generator=self._generator) for width in (3 * HIDDEN, HIDDEN))
        return SimpleNamespace(hidden_states=self.put(aux), last_hidden_states=self.put(last))


def prefill_with_images(reqs, rows):
    """SGLang has put its own numbers in place of the ids that stand for images by the time that a pass is captured."""
    first, shown, other = reqs
    for req in (shown, other):
        turned_by = torch.arange(100, 115).view(3, 5) if req is shown else None
        req.multimodal_inputs = SimpleNamespace(mrope_positions=turned_by)
        req.origin_input_ids = [7, PAD, PAD + 1, 8, PAD][: 5 if req is shown else 1]
    prompts = batch(reqs, input_ids=rows.tokens(10), extend_lens=[3, 5, 2], prefix_lens=[0, 0, 0])
    logits = rows.logits(10)
    logits.mm_input_embeds = rows.put(torch.arange(10.0)[:, None].repeat(1, HIDDEN))
    around_prefill(lambda worker, batch: SimpleNamespace(logits_output=logits), None, prompts)


def batch(reqs, **fields):
    return SimpleNamespace(reqs=reqs, forward_mode=SimpleNamespace(is_idle=lambda: False), **fields)


def verify(reqs, rows, topk, R=4):
    B, D = len(reqs), 6 if topk > 1 else R
    accept_index_BR = torch.arange(B)[:, None] * D + torch.arange(R)
    accept_index_BR[0, 2:] = -1
    result = SimpleNamespace(
        accept_index=rows.put(accept_index_BR.int()),
        accept_lens=rows.put((accept_index_BR >= 0).sum(1).int()),
        logits_output=rows.logits(B * D),
    )
    spec_info = SimpleNamespace(draft_token=rows.tokens(B * D), topk=topk)
    after_verify(result, None, batch(reqs, seq_lens=rows.put(torch.arange(5, 5 + B)), spec_info=spec_info))


def prefill(reqs, rows):
    lengths = [3, 5, 2]
    result = SimpleNamespace(logits_output=rows.logits(sum(lengths)))
    prompts = batch(reqs, input_ids=rows.tokens(sum(lengths)), extend_lens=lengths, prefix_lens=[0, 0, 0])
    around_prefill(lambda worker, batch: result, None, prompts)


PASSES = {
    "a chain": partial(verify, topk=1), "a tree": partial(verify, topk=2),
    "nothing drafted": partial(verify, topk=1, R=1), "prompts": prefill, "prompts with images": prefill_with_images,
}  # fmt: skip


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("left_out", [[False] * 3, [False, True, False]], ids=["all", "some"])
@pytest.mark.parametrize("travel", ["served", "float8"])
def test_states_of_another_device_are_captured_without_waiting_for_it(monkeypatch, which, left_out, travel):
    expected = capture(monkeypatch, left_out, travel, PASSES[which], CPU)
    with OtherDevice() as device:
        found = capture(monkeypatch, left_out, travel, PASSES[which], OTHER)
    assert set(device.waits) == {"aten.copy_.default"}  # into the ring: without waiting, where it is pinned
    shows = which == "prompts with images" and not left_out[1]
    assert [name for name, _ in expected.states] == ["aux_N3H", "last_NH"] + ["embeds_MH"] * shows
    for (name, rows), (expected_name, expected_rows) in zip(found.states, expected.states, strict=True):
        assert name == expected_name
        assert torch.equal(rows, expected_rows)
    assert torch.equal(tokens(found), tokens(expected))
    assert found.prefilled == expected.prefilled
    if found.verified:
        assert found.verified.facts() == expected.verified.facts()


def test_parts_of_images_go_with_their_embeddings_in_place_of_tokens(monkeypatch):
    entry = capture(monkeypatch, [False] * 3, "served", prefill_with_images, CPU)
    assert (tokens(entry) < 0).nonzero().flatten().tolist() == [4, 5, 7]
    assert tokens(entry)[[4, 5, 7]].tolist() == [-PAD, -PAD - 1, -PAD]
    assert dict(entry.states)["embeds_MH"][:, 0].tolist() == [4, 5, 7]
    places = np.frombuffer(entry.message("stream", 0, [])[0].places, np.int32).reshape(3, 3)
    assert places.tolist() == [[101, 106, 111], [102, 107, 112], [104, 109, 114]]
    entry = capture(monkeypatch, [True, False, False], "served", prefill_with_images, CPU)
    assert (tokens(entry) < 0).nonzero().flatten().tolist() == [1, 2, 4]
    assert dict(entry.states)["embeds_MH"][:, 0].tolist() == [4, 5, 7]


def test_nothing_is_copied_of_a_pass_that_drafted_nothing_and_is_not_captured(monkeypatch):
    with OtherDevice() as device:
        entry = capture(monkeypatch, [True] * 3, "served", PASSES["nothing drafted"], OTHER)
    assert not device.waits
    assert entry.region is None
    assert entry.verified.facts_BF is None
    assert entry.verified.committed() == [1, 1, 1]
