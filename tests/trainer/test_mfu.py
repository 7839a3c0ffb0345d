"""FLOPs of a pass, as PyTorch counts them; and what a device could do."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sglang_specforge.training_settings import TrainingSettings
from tests.tiny import HIDDEN, VOCAB, make_run, make_sample, make_target
from trainer.learner import load_draft
from trainer.loss import FrozenTarget, Goal, unroll
from trainer.mfu import peak_flops
from trainer.sample import count_rows, pack

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.mark.parametrize("prompt", [1, 300])
def test_flops_are_those_of_the_products_that_are_computed(tmp_path, prompt):
    run = make_run(tmp_path, make_target(tmp_path / "target"), draft_vocab_size=24)
    draft, steps = load_draft(run, run.version_path(0)), 5
    target = FrozenTarget(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    samples = [make_sample(400, prompt_tokens=prompt), make_sample(200, prompt_tokens=prompt // 2)]
    goal = Goal.of(TrainingSettings(ttt_steps=steps), count_rows(samples, steps, True), [0.0] * steps)
    with FlopCounterMode(display=False) as counter:
        found = unroll(draft, target, pack(samples, torch.device("cpu")), goal)
        found.loss.backward()
    counted = counter.get_flop_counts()["Global"]
    # No gradient of the captured states is computed, so all that is counted is a little more.
    assert found.flops == pytest.approx(sum(counted[product] for product in PRODUCTS), rel=0.06)
    assert found.flops > sum(counted[product] for product in PRODUCTS)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989e12),
        ("NVIDIA H200", torch.float32, None),
        ("NVIDIA T4", torch.bfloat16, None),
    ],
)
def test_the_peak_of_a_device(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == peak
    assert peak_flops(torch.device("cpu"), dtype) is None
