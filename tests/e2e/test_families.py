"""The loop on a tiny random target of each family that SGLang serves with EAGLE3 on a CPU (the rest: docs/training.md).

A random target's answers teach little; what is shown is that its states arrive aligned, that twenty steps train, and
that SGLang loads what they made.
"""

import random

import pytest

from tests.e2e.conftest import assert_every_token_is_accounted_for, settled, wait_for
from tests.e2e.families import FAMILIES, make_target

TRAINING = {
    "publish-every-s": 2, "batch-tokens": 128, "ttt-steps": 3, "holdout-every": 2, "loss-on": "all",
    "learning-rate": 2e-3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mixtral"}))
def test_states_of_the_family_train_a_draft_that_sglang_loads(start, tmp_path, family):
    target = make_target(family, tmp_path / "target")
    flags = FAMILIES[family].flags
    client = start(*flags, "--skip-tokenizer-init", "--disable-radix-cache", training=TRAINING, model=target)
    rng = random.Random(0)

    def enough():
        client.generate_all([[rng.randrange(5, 1024) for _ in range(16)] for _ in range(4)], tokens=24)
        status = client.status()
        trainer = status["trainer"]
        return trainer["step"] >= 20 and trainer["parity"]["compared"] >= 50 and status["draft"]["swaps"] >= 1

    wait_for("twenty steps, a swap and 50 compared proposals", enough, 180)
    status = settled(client)
    parity, rounds = status["trainer"]["parity"], "bfloat16" in flags
    assert parity["agreed"] >= (0.99 if rounds else 1) * parity["compared"]
    assert status["draft"]["refused"] == {}
    assert_every_token_is_accounted_for(status)
