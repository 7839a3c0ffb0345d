"""What numbers from the HTTP process do in a scheduler: those of other replicas nothing."""

from types import SimpleNamespace

import pytest

from server_patches.common import control, process


@pytest.fixture
def activated(monkeypatch):
    """By this process, the second of three replicas."""
    done = []
    bank = SimpleNamespace(
        replica=1, activate=lambda version, step: done.append((version, step)), evict=None, load=None,
        is_resident=lambda version: version == 4, refuses=lambda version: False,
    )  # fmt: skip
    monkeypatch.setattr(process, "this", SimpleNamespace(run=SimpleNamespace(replicas=3), bank=bank))
    monkeypatch.setattr(control, "_agree_on", lambda version: None if bank.is_resident(version) else "not here")
    return done


def test_each_replica_follows_its_own_number_and_one_for_all(activated):
    orders = control.orders(lambda: 9)
    for key, version in {"activate_0": 1, "activate_1": 2, "activate_2": 3, "activate": 4}.items():
        orders[f"draft_training_{key}"].apply(version)
    assert activated == [(2, 9), (4, 9)]


def test_a_version_that_is_not_resident_here_is_refused_unless_it_is_for_another_replica(activated):
    refusals = {key: order.refusal(5) for key, order in control.orders(lambda: 9).items() if "_activate" in key}
    assert refusals == {
        "draft_training_activate": "not here",
        "draft_training_activate_0": None,
        "draft_training_activate_1": "not here",
        "draft_training_activate_2": None,
    }


def test_a_process_without_draft_training_follows_nothing(monkeypatch):
    monkeypatch.setattr(process, "this", None)
    assert control.orders(lambda: 0) == {}
    assert control.rank_state() == {}
