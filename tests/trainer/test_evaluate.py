"""Acceptance by simulation against a server's own procedure, played out step by step."""

import random

import pytest
import torch

from tests.tiny import HIDDEN, VOCAB, make_run, make_sample, make_target
from trainer.evaluate import _walk, simulate
from trainer.learner import load_draft
from trainer.loss import FrozenTarget

STEPS = 3


def play(chances, rng):
    """Verifications until the run's last token, and accepted drafts by place."""
    rows, n, verifications, accepted = len(chances[0]), 0, 0, [0] * len(chances)
    while n < rows - 1:
        verifications += 1
        k = 0
        while k < len(chances) and n + 1 + k < rows and rng.random() < chances[k][n]:
            accepted[k] += 1
            k += 1
        n += k + 1
    return verifications, accepted


def test_where_nothing_is_left_to_chance_the_walk_is_the_servers():
    rng = random.Random(0)
    for rows in range(1, 40):
        chances = [[float(rng.random() < 0.6) for _ in range(rows)] for _ in range(STEPS)]
        assert _walk(chances) == play(chances, rng)


def test_the_expected_number_of_verifications_is_what_playing_gives_on_average():
    rng = random.Random(1)
    chances = [[rng.random() for _ in range(30)] for _ in range(STEPS)]
    games = [play(chances, rng) for _ in range(20_000)]
    expected, accepted = _walk(chances)
    assert sum(v for v, _ in games) / len(games) == pytest.approx(expected, rel=0.01)
    for k in range(STEPS):
        assert sum(a[k] for _, a in games) / len(games) == pytest.approx(accepted[k], rel=0.03)


@pytest.fixture
def given(tmp_path):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    torch.manual_seed(0)
    draft = load_draft(run, run.version_path(0))
    return draft, FrozenTarget(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))


@pytest.mark.parametrize("way", ["greedy", "target_only", "sampled"])
def test_chances_of_acceptance(given, way):
    draft, target = given
    sample = make_sample(14, prompt_tokens=5)
    with torch.no_grad():
        logits = draft(
            target.embed_VH[sample.tokens_T], sample.aux_T3H, torch.arange(14), [(0, 14)], STEPS,
            lambda hidden, head: [h @ head.T for h in hidden],
        )  # fmt: skip
    p_TV, ids = (sample.last_TH @ target.head_VH.T).softmax(-1), draft.target_ids_D

    def chance(k, n):
        top = int(ids[logits[k][n].argmax()])
        if way == "greedy":
            return float(top == int(p_TV[n + 1 + k].argmax()))
        if way == "target_only":
            return float(p_TV[n + 1 + k][top])
        return float(torch.minimum(p_TV[n + 1 + k][ids], logits[k][n].softmax(-1)).sum())

    first = int(sample.generated_T.nonzero()[0])
    assert first == 4
    chances = [[chance(k, n) if n + 1 + k < 14 else 0.0 for n in range(first, 14)] for k in range(STEPS)]
    verify_steps, accepted = _walk(chances)
    found = simulate(draft, target, [sample, sample], STEPS, way)
    assert (found.tokens, found.sequences) == (20, 2)
    assert found.verify_steps == pytest.approx(2 * verify_steps, rel=1e-4)
    assert found.by_position == pytest.approx([a / verify_steps for a in accepted], abs=1e-5)
    assert found.length == pytest.approx(9 / verify_steps, rel=1e-4)


def test_each_generated_stretch_is_walked_for_itself_and_nothing_generated_is_no_length(given):
    draft, target = given
    turns = torch.tensor([False, True, True, True, False, False, True, True])
    found = simulate(draft, target, [make_sample(8, generated_T=turns)], STEPS)
    assert (found.tokens, found.sequences) == (5, 2)
    assert 2 <= found.verify_steps <= 3
    assert simulate(draft, target, [make_sample(8, prompt_tokens=50)], STEPS).length is None
