"""A draft that can say few of the target's tokens comes to say those that are served, on the real server."""

from itertools import count

from tests.e2e.conftest import prompts, wait_for
from tests.e2e.test_layouts import NO_CACHE, STEADY, run_loop


def test_every_rank_comes_to_draft_what_is_served_and_no_answer_changes(start, reference):
    expected = reference()
    few = {**STEADY, "holdout-every": 8, "draft-vocab-size": 256}  # the lowest ids: letters and their like
    client = start("--dtype", "float32", NO_CACHE, training=few, tp=2)
    more = (prompts(24, seed) for seed in count(1))

    def coverage():
        client.generate_all(next(more))
        return client.status()["trainer"]["vocabulary"]["coverage"]

    before = wait_for("a version, and tokens to count", coverage)
    wait_for("a version that can say more of them", lambda: coverage() > before + 0.1)
    assert client.status()["trainer"]["vocabulary"]["tokens"] == 256
    status = run_loop(client, expected, acceptance=1.5)
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"]
