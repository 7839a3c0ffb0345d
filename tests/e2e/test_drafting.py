"""Drafting only while it pays, on the real server: clients get the same, and capture and training go on."""

import pytest

from tests.e2e.conftest import TRAINING, prompts, wait_for
from tests.e2e.test_versions import command, events, load

AUTO = {**TRAINING, "drafting": "auto"}


def drafting(client):
    return client.status()["draft"]["drafting"]


def passes(client):
    return client.status()["acceptance"]["passes"]


def switch(client, mode, depth):
    command(client, "drafting", mode, "--why", "to see")
    wait_for(f"drafting is {depth}", lambda: drafting(client)["depth"] == depth)


def answers_undrafted(client, done):
    """Whether the next answers come without one verification; a new version may have its trial among them."""
    verified, answered = passes(client), len(done)
    wait_for("more answers", lambda: len(done) > answered + 20)
    return passes(client) == verified


@pytest.fixture
def client(start, reference):
    reference()
    return start("--dtype", "float32", training=AUTO)


def test_a_random_draft_does_not_draft_and_is_trained_all_the_same(client, reference):
    with load(client, reference()) as done:
        wait_for("a trial", lambda: events(client, "drafting_off"))
        wait_for("its end", lambda: drafting(client)["depth"] != "on")
        wait_for("answers without drafting", lambda: answers_undrafted(client, done))
        trained = client.status()["tokens"]["trained"]
        wait_for("training", lambda: client.status()["tokens"]["trained"] > trained)
    (event,) = events(client, "drafting_off")
    assert "acceptance length 1." in event["why"]
    assert drafting(client)["break_even_length"] > drafting(client)["gain"] > 0
    status = wait_for("all is at rest", lambda: (s := client.status())["tokens"]["in_flight"] == 0 and s)
    tokens = status["tokens"]
    fates = tokens["trained"] + tokens["held_out"] + tokens["buffered"] + sum(tokens["dropped"].values())
    assert tokens["captured"] == fates
    assert status["trainer"]["parity"]["compared"] == status["trainer"]["parity"]["agreed"]


def test_an_operator_switches_it_and_a_comparison_has_it_on(client, reference):
    with load(client, reference()):
        switch(client, "never", "asleep")
        verified = passes(client)
        answer = client.generate(prompts(1)[0])
        assert answer["meta_info"]["draft_versions"] == []
        assert passes(client) == verified
        switch(client, "always", "on")
        wait_for("verifications of drafts", lambda: passes(client) > verified)
        assert client.generate(prompts(1)[0])["meta_info"]["draft_versions"] == [
            client.status()["draft"]["active_version"]
        ]
        switch(client, "never", "asleep")
        plan = {"arms": ["active", 0], "window_s": 0.2, "max_blocks": 1000}
        id = client.post("/draft/ab", json=plan).json()["id"]
        wait_for("drafting for the comparison", lambda: drafting(client)["depth"] == "on")
        command(client, "ab", "stop", id)
        wait_for("its end", lambda: drafting(client)["depth"] == "asleep")
    assert events(client, "drafting_mode")[-1]["why"] == "to see"


@pytest.mark.slow
def test_all_ranks_switch_at_the_same_step(start, reference):
    expected = reference()
    client = start("--dtype", "float32", training={**AUTO, "trainer": "none"}, tp=2)
    with load(client, expected):
        for i in range(6):
            switch(client, *(("always", "on") if i % 2 else ("never", "asleep")))
