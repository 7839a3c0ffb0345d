"""The trainer's arithmetic on a device that is not the host: it computes the same, and hardly ever waits."""

import json
from typing import get_args

import pytest
import torch

from sglang_specforge.checkpoint import load_config
from sglang_specforge.training_settings import Objective, Speculation, TrainingSettings
from tests.other_device import OTHER, Elsewhere, OtherDevice
from tests.tiny import HIDDEN, VOCAB, make_run, make_sample, make_target
from tests.trainer.plain_flex import plain_flex
from trainer import attention, loss
from trainer.evaluate import simulate
from trainer.learner import load_draft, load_target
from trainer.loss import Goal, unroll
from trainer.sample import count_rows, pack

CPU, STEPS = torch.device("cpu"), 3
SAMPLES = [
    make_sample(tokens, prompt, seed=tokens, start=start, rejected_T=torch.arange(tokens) % VOCAB)
    for tokens, prompt, start in [(40, 9, 0), (31, 12, 3), (9, 4, 0)]
]
SHOWN = {"embeds_MH": torch.randn(3, HIDDEN), "places_M3": torch.tensor([[4, 4, 4], [4, 4, 5], [4, 5, 4]]).int()}
SAMPLES.append(make_sample(20, 12, **SHOWN))
SAMPLES[-1].tokens_T[4:7] = -7


@pytest.fixture
def other_device(monkeypatch):
    monkeypatch.setitem(loss._CHUNK_LOGITS, OTHER.type, 1 << 12)  # several chunks
    monkeypatch.setattr(attention, "_compiled_flex", lambda: plain_flex)
    return OtherDevice()


@pytest.fixture(params=["one position", "three positions"])
def run(request, tmp_path):
    """Whose draft turns its heads by so many."""
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    if request.param == "three positions":
        config = load_config(run.version_path(0))
        config["rope_parameters"]["mrope_section"] = [2, 1, 1]
        (run.version_path(0) / "config.json").write_text(json.dumps(config))
    return run


def on_device(run, device):
    return load_draft(run, run.version_path(0)).to(device), load_target(run, torch.float32, device)


def learn(draft, target, **given):
    """Loss, right choices and gradients of a pass."""
    settings, device = TrainingSettings(ttt_steps=STEPS, **given), target.head_VH.device
    draft.checkpoints_activations = settings.activation_checkpointing
    goal = Goal.of(settings, count_rows(SAMPLES, STEPS, settings.loss_on == "generated"), [0.9, 0.5, 0.2])
    found = unroll(draft, target, pack(SAMPLES, device), goal)
    found.loss.backward()
    return [found.loss.detach(), found.correct_K, *(p.grad for p in draft.parameters())]


@pytest.mark.parametrize(
    "given",
    [
        *({"objective": objective} for objective in get_args(Objective)),
        {"rejection_weight": 1.0, "rejection_penalty": 0.5},
        {"loss_on": "all", "activation_checkpointing": True},
    ],
    ids=str,
)
def test_a_pass_learns_what_it_learns_on_the_host(run, other_device, given):
    expected = learn(*on_device(run, CPU), **given)
    with other_device:
        found = learn(*on_device(run, OTHER), **given)
        assert all(isinstance(x, Elsewhere) for x in found)
        torch.testing.assert_close([x.cpu() for x in found], expected, rtol=1e-4, atol=1e-6)


def test_a_pass_waits_once_a_chunk_for_the_device(run, other_device):
    """For how many of its rows the draft vocabulary has."""
    with other_device:
        draft_and_target = on_device(run, OTHER)
        learn(*draft_and_target)
        other_device.waits.clear()  # of what is copied to it once: weights and rotary frequencies
        learn(*draft_and_target)
    rows = sum(int(s.generated_T[1:].sum()) for s in SAMPLES)
    chunks = -(-rows // loss._chunk_rows(torch.empty(VOCAB, 1, device=OTHER), STEPS, 32))
    assert chunks > 1
    assert other_device.waits == ["aten.nonzero.default"] * chunks


@pytest.mark.parametrize("way", ["greedy", "target_only", "sampled", "a tree"])
def test_simulation_is_that_on_the_host(run, other_device, way):
    speculation, way = (Speculation(3, 2, 6), "greedy") if way == "a tree" else (Speculation(3), way)
    expected = simulate(*on_device(run, CPU), SAMPLES, speculation, way)
    with other_device:
        found = simulate(*on_device(run, OTHER), SAMPLES, speculation, way)
    assert found.length == pytest.approx(expected.length, rel=1e-4)


def test_what_is_computed_on_the_host_meets_nothing_of_the_device():
    """The stand-in itself: a forgotten ``device=`` is found, and host indices are allowed, as on a GPU."""
    with OtherDevice():
        x = torch.arange(4.0, device=OTHER)
        with pytest.raises(RuntimeError, match="meets those of another device"):
            x + torch.ones(4)
        assert x[torch.tensor([2, 0])].tolist() == [2.0, 0.0]
        assert (x * torch.tensor(2.0)).add_(1).cpu().tolist() == [1.0, 3.0, 5.0, 7.0]
