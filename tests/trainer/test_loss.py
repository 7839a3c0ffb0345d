"""The loss and its gradient against a float64 loop over rows and steps, for every objective."""

from dataclasses import replace

import pytest
import torch

from sglang_specforge.training_settings import TrainingSettings
from tests.tiny import HIDDEN, VOCAB, make_run, make_sample, make_target
from trainer import loss
from trainer.learner import load_draft
from trainer.loss import FrozenTarget, Goal, unroll
from trainer.roots import Roots
from trainer.sample import count_rows, pack

STEPS, LK_WEIGHTS = 3, [0.9, 0.5, 0.2]


def row_loss(objective, logits, teacher_logits, ids, kl_weight):
    """One row, written as the papers write it."""
    p, q = teacher_logits.softmax(-1)[ids], logits.softmax(-1)
    known = p / p.sum()
    best = ids.index(int(teacher_logits.argmax()))
    rate = torch.minimum(p, q).sum()
    kl = (known * (known.log() - logits.log_softmax(-1))).sum()
    return {
        "soft_ce": lambda: -(known * logits.log_softmax(-1)).sum(),
        "forward_kl": lambda: kl,
        "hard_ce": lambda: -logits.log_softmax(-1)[best],
        "tv": lambda: 1 - rate,
        "lk_alpha": lambda: -rate.log(),
        "lk_lambda": lambda: kl_weight * kl + (1 - kl_weight) * (1 - rate),
    }[objective]()


def reference(draft, target, samples, settings):
    ids = draft.target_ids_D.tolist()
    per_step, correct, rates = [[] for _ in range(STEPS)], [0] * STEPS, [0.0] * STEPS
    for sample in samples:
        T, is_token_T = len(sample), sample.tokens_T >= 0
        embed_TH = target.embed_VH[sample.tokens_T.clamp(min=0)]
        embed_TH[~is_token_T] = sample.embeds_MH
        logits = draft(
            embed_TH, sample.aux_T3H, sample.start + torch.arange(T),
            Roots.everywhere([(0, T)], torch.device("cpu")),
            lambda begun: [draft.lm_head(hidden) for hidden in begun.unroll(STEPS)],
        )  # fmt: skip
        teacher_logits = sample.last_TH @ target.head_VH.T
        if target.softcap:
            teacher_logits = target.softcap * torch.tanh(teacher_logits / target.softcap)
        for t in range(T):
            for k in range(STEPS):
                m = t + 1 + k
                if m >= T or (settings.loss_on == "generated" and not sample.generated_T[m]):
                    continue
                if m + 1 < T and not is_token_T[m + 1]:
                    continue
                best, rejected = int(teacher_logits[m].argmax()), int(sample.rejected_T[m])
                correct[k] += best == ids[int(logits[k][t].argmax())]
                p_of_ids, q = teacher_logits[m].softmax(-1)[ids], logits[k][t].softmax(-1)
                rates[k] += torch.minimum(p_of_ids, q).sum().item()
                value = torch.zeros((), dtype=torch.float64)
                if best in ids:
                    weight = 1 + settings.rejection_weight * (rejected in ids)
                    value = row_loss(settings.objective, logits[k][t], teacher_logits[m], ids, LK_WEIGHTS[k])
                    if rejected in ids:
                        value = value - settings.rejection_penalty * (1 - q[ids.index(rejected)]).log()
                    value = weight * value
                per_step[k].append(value)
    return sum(w * torch.stack(v).mean() for w, v in zip(settings.step_weights, per_step, strict=True)), correct, rates


def compare(tmp_path, draft_vocab, softcap=None, image=slice(0), **given):
    """``image``: where the second sample has one."""
    settings = TrainingSettings(ttt_steps=STEPS, **given)
    run = make_run(tmp_path, make_target(tmp_path / "target"), draft_vocab_size=draft_vocab)
    draft = load_draft(run, run.version_path(0)).double()
    torch.manual_seed(1)
    target = FrozenTarget(torch.randn(VOCAB, HIDDEN).double(), torch.randn(VOCAB, HIDDEN).double(), softcap)
    samples = []
    for tokens, prompt, start in [(12, 5, 0), (7, 9, 3)]:
        sample = make_sample(tokens, prompt, seed=tokens, start=start)
        rejected_T = torch.randint(VOCAB, (tokens,)).where(torch.rand(tokens) < 0.5, -1)
        samples.append(
            replace(sample, aux_T3H=sample.aux_T3H.double(), last_TH=sample.last_TH.double(), rejected_T=rejected_T)
        )
    samples[1].tokens_T[image] = -5
    shown = len(samples[1].tokens_T[image])
    samples[1] = replace(
        samples[1], embeds_MH=torch.randn(shown, HIDDEN).double(), places_M3=torch.zeros(shown, 3, dtype=torch.int32)
    )
    samples[0] = replace(samples[0], embeds_MH=samples[0].embeds_MH.double())
    rows_K = count_rows(samples, STEPS, settings.loss_on == "generated")
    # exp(-decay * rate) = LK_WEIGHTS
    rates_K = [-float(torch.tensor(w).log()) / settings.lk_decay for w in LK_WEIGHTS]
    goal = Goal.of(settings, rows_K, rates_K)
    result = unroll(draft, target, pack(samples, torch.device("cpu")), goal)
    result.loss.backward()
    found = [p.grad.clone() for p in draft.parameters()]
    draft.zero_grad()
    wanted, correct, rates = reference(draft, target, samples, settings)
    wanted.backward()
    torch.testing.assert_close(result.loss.double(), wanted, atol=1e-6, rtol=1e-6)
    for grad, parameter in zip(found, draft.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-6, rtol=1e-5)
    assert result.correct_K.tolist() == correct
    if settings.objective == "lk_lambda":
        assert result.rate_K.tolist() == pytest.approx(rates)


@pytest.mark.parametrize("draft_vocab", [VOCAB, 32])
@pytest.mark.parametrize("objective", ["soft_ce", "forward_kl", "hard_ce", "tv", "lk_alpha", "lk_lambda"])
def test_each_objective_and_its_gradient(tmp_path, objective, draft_vocab):
    compare(tmp_path, draft_vocab, objective=objective)


@pytest.mark.parametrize("objective", ["soft_ce", "lk_alpha"])
def test_rejections_weigh_and_are_pushed_down(tmp_path, objective):
    compare(tmp_path, 32, objective=objective, rejection_weight=0.7, rejection_penalty=0.3)


@pytest.mark.parametrize("draft_vocab", [VOCAB, 32])
def test_a_target_whose_logits_are_bounded_teaches_what_it_samples_from(tmp_path, draft_vocab):
    compare(tmp_path, draft_vocab, softcap=3.0)


def test_weights_of_steps_and_prompts_too(tmp_path):
    compare(tmp_path, 32, ttt_weights="1,0.25,0.5", loss_on="all")


@pytest.mark.parametrize("loss_on", ["all", "generated"])
def test_an_image_is_read_as_the_target_read_it_and_nothing_learns_to_draft_it(tmp_path, loss_on):
    compare(tmp_path, 32, loss_on=loss_on, image=slice(2, 4))


@pytest.mark.parametrize("rows", [5, 1])  # of one row, the draft vocabulary may have no token to learn
def test_chunks_change_nothing(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(loss, "_chunk_rows", lambda *_: rows)
    compare(tmp_path, 32, objective="soft_ce", rejection_penalty=0.3)


@pytest.mark.parametrize("D", [4096, 32768, 131072])
def test_a_chunk_takes_no_more_memory_for_a_larger_vocabulary(D):
    head_VH, steps = torch.empty(131072, 1), 7
    logits = loss._chunk_rows(head_VH, steps, D) * (131072 + 3 * steps * D)
    assert logits < 1.5 * loss._CHUNK_LOGITS["cpu"]


def test_a_batch_without_a_row_to_learn_from_has_a_finite_loss(tmp_path):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    draft = load_draft(run, run.version_path(0))
    target = FrozenTarget(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    batch = pack([make_sample(5, prompt_tokens=50)], torch.device("cpu"))
    result = unroll(draft, target, batch, Goal.of(TrainingSettings(ttt_steps=3), [0, 0, 0], [0.0] * 3))
    result.loss.backward()
    assert result.loss == 0
    assert draft.fc.weight.grad.abs().sum() == 0
