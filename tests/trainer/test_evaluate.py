"""Acceptance by simulation against a server's own procedure, played out step by step."""

import random
from functools import partial

import pytest
import torch

from sglang_specforge.training_settings import Speculation
from tests.tiny import HIDDEN, VOCAB, make_run, make_sample, make_target
from trainer.draft_tree import accepted_by_tree
from trainer.evaluate import _chance, _walk, simulate
from trainer.learner import load_draft
from trainer.loss import FrozenTarget, Taught, run_draft
from trainer.roots import Roots
from trainer.sample import pack

CPU = torch.device("cpu")

STEPS = 3
CHAIN = Speculation(STEPS)


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


def test_the_chance_of_a_sampled_draft_is_that_of_speculative_sampling_played_out():
    g, games = torch.Generator().manual_seed(0), 200_000
    target_D, logits_D = torch.randn(12, generator=g).softmax(-1) * 0.9, torch.randn(12, generator=g)
    nothing = torch.zeros(1, dtype=torch.int64)
    taught = Taught(
        nothing, target_D[None] / 0.9, torch.tensor([0.9]), nothing, nothing.bool(), nothing, nothing.bool(), nothing
    )
    draft_D = logits_D.softmax(-1)
    drafted = torch.multinomial(draft_D, games, replacement=True, generator=g)
    accepted = torch.rand(games, generator=g) < target_D[drafted] / draft_D[drafted]
    assert float(_chance(logits_D[None], taught, "sampled")) == pytest.approx(float(accepted.float().mean()), abs=0.005)


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
            target.embed_VH[sample.tokens_T], sample.aux_T3H, torch.arange(14), Roots.everywhere([(0, 14)], CPU),
            lambda begun: [draft.lm_head(hidden) for hidden in begun.unroll(STEPS)],
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
    found = simulate(draft, target, [sample, sample], CHAIN, way)
    assert (found.tokens, found.sequences) == (20, 2)
    assert found.verify_steps == pytest.approx(2 * verify_steps, rel=1e-4)
    assert found.by_position == pytest.approx([a / verify_steps for a in accepted], abs=1e-5)
    assert found.length == pytest.approx(9 / verify_steps, rel=1e-4)


def test_each_generated_stretch_is_walked_for_itself_and_nothing_generated_is_no_length(given):
    draft, target = given
    turns = torch.tensor([False, True, True, True, False, False, True, True])
    found = simulate(draft, target, [make_sample(8, generated_T=turns)], CHAIN)
    assert (found.tokens, found.sequences) == (5, 2)
    assert 2 <= found.verify_steps <= 3
    assert simulate(draft, target, [make_sample(8, prompt_tokens=50)], CHAIN).length is None


def grow_tree(next_probs, shape):
    """Paths of a tree's verified tokens, as SGLang's select_top_k_tokens and organize_draft_results choose them."""
    beams, taken = [((), 1.0)], {}
    for _ in range(shape.steps):
        after = {}
        for path, score in beams:
            probs = next_probs(path)
            for token in probs.topk(shape.topk).indices.tolist():
                after[*path, token] = score * float(probs[token])
        taken |= after
        beams = sorted(after.items(), key=lambda item: -item[1])[: shape.topk]
    return sorted(taken, key=taken.get, reverse=True)[: shape.drafts]


@pytest.mark.parametrize("shape", [Speculation(3, 4, 8), Speculation(4, 3), Speculation(2, 2, 3)])
def test_a_tree_holds_the_targets_path_where_the_servers_tree_does(given, shape):
    draft, target = given
    T = 40
    sample, ids, rng = make_sample(T), draft.target_ids_D.tolist(), random.Random(2)

    def next_probs(row, path):
        """The draft's distribution after a row's own next token and a path of draft ids."""
        tokens = [*sample.tokens_T[: row + 2].tolist(), *(ids[i] for i in path)]
        return draft(
            target.embed_VH[tokens], sample.aux_T3H.repeat(2, 1)[: len(tokens)], torch.arange(len(tokens)),
            Roots.everywhere([(0, len(tokens))], CPU),
            lambda begun: draft.lm_head(begun.unroll(1 + len(path))[-1][row]).softmax(-1),
        )  # fmt: skip

    with torch.no_grad():
        target.head_VH.copy_(torch.nn.functional.normalize(target.head_VH))
        draft.lm_head.weight *= 40  # so sure of itself that trees are deep
        paths, thought_of = [], []
        for row in range(T - 1):
            paths.append(grow_tree(partial(next_probs, row), shape))
            # What the target says next is mostly what some tree had thought of.
            thought_of = thought_of or list(max(paths[-1], key=len))
            said = ids[thought_of.pop(0)] if rng.random() < 0.9 else rng.randrange(VOCAB)
            sample.last_TH[row + 1] = target.head_VH[said]
            if row + 2 < T:
                sample.tokens_T[row + 2] = said
        packed = pack([sample], CPU)
        find = partial(accepted_by_tree, target=target, pack=packed, speculation=shape)
        found_KN = run_draft(draft, target, packed, Roots.everywhere(packed.samples, CPU), find)
        best_T = (sample.last_TH @ target.head_VH.T).argmax(-1).tolist()
        assert best_T[1:-1] == sample.tokens_T[2:].tolist()
    hits_K = [0] * shape.steps
    for row in range(T - 1):
        right = [ids.index(t) if t in ids else None for t in best_T[row + 1 :]]
        for k in range(shape.steps):
            expected = k < len(right) and tuple(right[: k + 1]) in paths[row]
            assert bool(found_KN[k][row]) == expected, (row, k)
            hits_K[k] += expected
    assert 0 < hits_K[-1] < hits_K[0] < T - 1


def test_a_trees_acceptance_counts_its_commits(given):
    """With every branch of the whole vocabulary taken, a tree of one step accepts whatever the draft vocabulary has."""
    draft, target = given
    sample = make_sample(14, prompt_tokens=5)
    known_T = draft.t2d[(sample.last_TH @ target.head_VH.T).argmax(-1)]
    chances = [[float(known_T[n + 1]) if n + 1 < 14 else 0.0 for n in range(4, 14)]]
    verify_steps, accepted = _walk(chances)
    found = simulate(draft, target, [sample], Speculation(1, topk=32, tokens=33))
    assert found.verify_steps == verify_steps
    assert found.accepted_K == accepted
    assert accepted[0] > 1


def test_a_tree_is_not_simulated_at_random(given):
    with pytest.raises(ValueError, match="greedily only, not sampled"):
        simulate(*given, [make_sample(8)], Speculation(3, topk=2), "sampled")
