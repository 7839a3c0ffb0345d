"""Putting versions into the bank takes no more of the machine than the operator allows."""

from types import SimpleNamespace

import pytest
import torch

from sglang_specforge import draft_bank
from sglang_specforge.draft_bank import paced

MIB = 1 << 20


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in sleeps."""
    clock = SimpleNamespace(now_s=0.0)

    def sleep(seconds):
        clock.now_s += seconds

    monkeypatch.setattr(draft_bank, "time", SimpleNamespace(monotonic=lambda: clock.now_s, sleep=sleep))
    return clock


def tensors(*mib):
    return {f"t{i}": torch.zeros(size * MIB, dtype=torch.uint8) for i, size in enumerate(mib)}


def test_each_tensor_comes_when_those_before_it_may_have_been_copied(clock):
    assert [(name, clock.now_s) for name, _ in paced(tensors(4, 2, 8), 2.0)] == [("t0", 0.0), ("t1", 2.0), ("t2", 3.0)]


def test_time_that_copying_took_is_not_waited_for_again(clock):
    came_s = []
    for _ in paced(tensors(4, 2, 8), 2.0):
        came_s.append(clock.now_s)
        clock.now_s += 2.5
    assert came_s == [0.0, 2.5, 5.0]


def test_without_a_limit_nothing_waits(clock):
    assert [name for name, _ in paced(tensors(4, 2), None)] == ["t0", "t1"]
    assert clock.now_s == 0.0
