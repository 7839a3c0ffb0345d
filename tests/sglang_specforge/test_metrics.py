"""What a scrape shows of a status."""

from prometheus_client import CollectorRegistry, generate_latest

from sglang_specforge.metrics import Metrics


def status(versions=(), active=0, **trainer):
    counts = {"passes": 10, "tokens": 25, "length": 2.5}
    return {
        "draft": {
            "active_version": active, "swaps": 3, "drift": {"moved": {}},
            "drafting": {"depth": "on", "break_even_length": None},
        },
        "acceptance_by_version": {str(version): counts for version in versions},
        "acceptance_by_slice": {"secret": counts},
        "tokens": {"captured": 7, "trained": 5, "dropped": {"late": 2}},
        "trainer": {
            "held_out_acceptance_length": None, "vocabulary": {"coverage": None}, "step": 4, "skipped_steps": 0,
            "taken_up": 0, "silent_s": None, "prefixes": {"unspilled_blocks": 0}, **trainer,
        },
    }  # fmt: skip


def scrape(status):
    registry = CollectorRegistry()
    registry.register(Metrics(lambda: status))
    return samples(registry)


def samples(registry):
    lines = generate_latest(registry).decode().splitlines()
    found = (line.removeprefix("sglang_specforge:").rsplit(" ", 1) for line in lines if line[0] != "#")
    return {name: float(value) for name, value in found}


def test_before_the_first_status_there_is_nothing():
    assert scrape(None) == {}


def test_counts_are_told_by_version_and_never_by_slice():
    found = scrape(status(versions=[4, 5], active=5))
    assert found['verifications_total{version="4"}'] == found['verifications_total{version="5"}'] == 10
    assert found['committed_tokens_total{version="5"}'] == 25
    assert not any("secret" in name for name in found)  # anybody may read them
    assert found['dropped_tokens_total{reason="late"}'] == 2
    assert (found["active_version"], found["acceptance_length"], found["drafting"]) == (5, 2.5, 1)


def test_versions_that_the_status_forgot_have_no_series():
    newest = {}
    registry = CollectorRegistry()
    registry.register(Metrics(lambda: newest["status"]))
    for first in range(1000):  # as of months
        newest["status"] = status(versions=range(first, first + 32))
        found = samples(registry)
    assert sum(name.startswith("verifications_total") for name in found) == 32


def test_what_is_not_known_has_no_sample():
    found = scrape(status(active=3))
    assert {"acceptance_length", "held_out_acceptance_length", "trainer_silent_seconds"}.isdisjoint(found)
    found = scrape(status(versions=[3], active=3, silent_s=0.5))
    assert (found["acceptance_length"], found["trainer_silent_seconds"]) == (2.5, 0.5)
