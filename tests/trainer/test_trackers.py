"""Metrics: a line a step, later lines of a life that was cut off taken back, and other trackers by name."""

import json
import sys
from types import SimpleNamespace

import pytest

from sglang_specforge.contracts.control import Verdict
from sglang_specforge.training_settings import TrainingSettings
from trainer.evaluate import Evaluated, Simulated
from trainer.learner import Trained
from trainer.trackers import MissingTracker, Trackers

NOTHING = Simulated.nothing(1)


def log(settings, first, last):
    trackers = Trackers(settings, first - 1)
    for step in range(first, last + 1):
        trackers.log(Trained(step, step / 10, 1.0, [0.5, 0.25], [64]))
    slices = {"": NOTHING, "code": Simulated(7, 1, 3.0, [2.0])}
    verdict = Verdict(samples=5, gain=0.5, low=0.25, passed=True, why="")
    trackers.log_version(1, last, Evaluated(Simulated(10, 1, 3.0, [2.0]), slices, verdict))
    trackers.close()


def lines(settings):
    return [json.loads(line) for line in (settings.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_and_those_of_a_life_cut_off_are_taken_back(tmp_path):
    settings = TrainingSettings(run_dir=tmp_path)
    log(settings, 1, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    log(settings, 4, 6)
    found = lines(settings)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 6]
    assert found[3] == {"step": 4, "loss": 0.4, "grad_norm": 1.0, "tokens": 64, "accuracy_0": 0.5, "accuracy_1": 0.25}
    assert found[-1] == {
        "step": 6, "version": 1, "held_out_acceptance_length": 3.0, "held_out_acceptance_0": pytest.approx(2 / 3),
        "held_out_acceptance_length/code": 2.0, "held_out_gain": 0.5, "held_out_gain_low": 0.25,
    }  # fmt: skip


def test_mfu_is_in_the_line_of_a_step_that_knows_it(tmp_path):
    trackers = Trackers(settings := TrainingSettings(run_dir=tmp_path), 0)
    trackers.log(Trained(1, 0.1, 1.0, [0.5], [64], mfu=0.25))
    trackers.close()
    assert lines(settings)[0]["mfu"] == 0.25


def test_a_step_that_is_not_finite_is_a_line_of_json_without_its_loss(tmp_path):
    trackers = Trackers(settings := TrainingSettings(run_dir=tmp_path), 0)
    trackers.log(Trained(1, None, None, [0.5], [64], skipped_steps=1))
    trackers.close()
    assert lines(settings) == [{"step": 1, "tokens": 64, "accuracy_0": 0.5, "skipped_steps": 1}]


def test_a_slice_of_which_nothing_is_known_is_left_out(tmp_path):
    trackers = Trackers(settings := TrainingSettings(run_dir=tmp_path), 0)
    trackers.log_version(1, 6, Evaluated(Simulated.nothing(1), {"code": Simulated.nothing(1)}, None))
    trackers.close()
    assert lines(settings) == [{"step": 6, "version": 1}]


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    log(TrainingSettings(run_dir=tmp_path, trackers="tensorboard"), 3, 3)
    assert written[0] == (tmp_path / "tensorboard", 3)
    assert ("loss", 0.3, 3) in written
    assert ("held_out_acceptance_length", 3.0, 3) in written
    assert written[-1] == "closed"


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_named_with_what_to_install(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingTracker, match=f"pip install {name}"):
        Trackers(TrainingSettings(run_dir=tmp_path, trackers=name), 0)
