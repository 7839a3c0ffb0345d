"""Learning rates over a run, and which optimizer has which parameter."""

import pytest
from torch import nn

from sglang_specforge.training_settings import TrainingSettings
from trainer.optimizer import make_optimizers, schedule_factor, set_learning_rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.1, 1, 1, 1, 1]), ("cosine", [0.1, 1, 0.55, 0.1, 0.1]), ("wsd", [0.1, 1, 1, 0, 0])],
)
def test_schedules(schedule, expected):
    settings = TrainingSettings(schedule=schedule, warmup_steps=10, schedule_steps=110)
    found = [schedule_factor(settings, step) for step in (0, 10, 60, 110, 500)]
    assert found == pytest.approx(expected)


def test_wsd_falls_in_a_line_at_the_end():
    settings = TrainingSettings(schedule="wsd", warmup_steps=0, schedule_steps=100, wsd_decay_share=0.5)
    assert [schedule_factor(settings, s) for s in (49, 75, 90)] == pytest.approx([1, 0.5, 0.2])


def test_muon_has_the_inner_matrices_and_adamw_the_rest():
    draft = nn.ModuleDict({"fc": nn.Linear(4, 4), "lm_head": nn.Linear(4, 8, bias=False)})
    adamw, muon = make_optimizers(draft, TrainingSettings(optimizer="muon"))
    assert muon.param_groups[0]["params"] == [draft["fc"].weight]
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {id(draft["fc"].bias), id(draft["lm_head"].weight)}
    settings = TrainingSettings(optimizer="muon", learning_rate=0.5, muon_learning_rate=0.25, warmup_steps=2)
    set_learning_rates([adamw, muon], settings, 0)
    assert (adamw.param_groups[0]["lr"], muon.param_groups[0]["lr"]) == (0.25, 0.125)
