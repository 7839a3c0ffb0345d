"""A trainer on another machine that pulls states out of the server's memory, by the engine that does RDMA."""

import pytest

from tests.e2e.conftest import assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.test_attach import STREAMED
from tests.e2e.test_far import far_trainer
from tests.e2e.test_layouts import NO_CACHE

pytest.importorskip("mooncake.engine", reason="needs libibverbs1", exc_type=ImportError)
HERE = "tcp://127.0.0.1"


def carried_by(server):
    return {export["transport"] for export in server.status()["export"]}


def test_states_are_pulled_by_whoever_can_and_sent_to_others(start, reference, tmp_path):
    expected = reference()
    server = start("--dtype", "float32", NO_CACHE, training={**STREAMED, "pull": HERE})
    trainer = far_trainer(server, tmp_path, "--pull", HERE)

    def swapped_twice():
        server.generate_all(prompts(24, seed=len(rounds)), tokens=40)
        rounds.append(1)
        return server.status()["draft"]["swaps"] >= 2

    rounds = []
    wait_for("two versions that were brought to the server", swapped_twice, 240)
    assert carried_by(server) == {"mooncake"}
    assert outputs(server.generate_all(prompts(50))) == expected
    pulled = settled(server)
    trainer.end()
    wait_for("the lease ends", lambda: server.status()["reader"]["lease"] is None)
    other = far_trainer(server, tmp_path)  # cannot pull
    assert outputs(server.generate_all(prompts(50))) == expected
    assert carried_by(server) == {"tcp"}
    sent = settled(server)
    other.end()
    for status in (pulled, sent):
        assert_every_token_is_accounted_for(status)
        assert status["export"][0]["failure"] is None
        assert status["trainer"]["malformed_messages"] == 0
    assert pulled["tokens"]["dropped"].keys() <= {"past_finish", "duplicate"}
    assert sent["tokens"]["dropped"].keys() <= {"past_finish", "duplicate", "trainer_restarted"}
    assert 0 < pulled["trainer"]["parity"]["compared"] == pulled["trainer"]["parity"]["agreed"]
    assert sent["tokens"]["captured"] > pulled["tokens"]["captured"]
