"""Where a trainer computes, when nobody says."""

import pytest
import torch

from sglang_specforge.settings import SettingsError, check_machine
from sglang_specforge.training_settings import TrainingSettings
from trainer.process import settle_device

GIB = 1 << 30


@pytest.mark.parametrize(
    ("used_gib", "processes", "asked", "device"),
    [
        ([], 1, "auto", "cpu"),
        ([1, 1], 1, "auto", "cuda:0"),
        ([70, 1, 70], 1, "auto", "cuda:1"),
        ([70, 70], 1, "auto", "cpu"),
        ([1, 1], 2, "auto", "cuda:0"),
        ([1], 2, "auto", "cpu"),
        ([70, 1], 1, "cuda:0", "cuda:0"),
        ([1], 1, "cpu", "cpu"),
    ],
)
def test_it_is_an_idle_gpu_or_the_cpu_and_what_was_asked_for_stays(
    monkeypatch, caplog, used_gib, processes, asked, device
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(used_gib))
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda gpu: used_gib[gpu] * GIB)
    assert settle_device(TrainingSettings(trainer_device=asked)).trainer_device == device
    assert ("computes on the CPU" in caplog.text) == (asked == "auto" and device == "cpu" and bool(used_gib))


def test_several_processes_need_as_many_gpus_from_the_first_one_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_machine(TrainingSettings(trainer_device="cuda:2"), 2)
    with pytest.raises(SettingsError, match="needs 5 GPU"):
        check_machine(TrainingSettings(trainer_device="cuda:2"), 3)


def test_a_driver_that_does_not_say_what_is_in_use_is_no_obstacle(monkeypatch):
    def refuse(gpu):
        raise RuntimeError("NVML not supported")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_memory_used", refuse)
    assert settle_device(TrainingSettings()).trainer_device == "cpu"
