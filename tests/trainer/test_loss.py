"""The loss against a float64 loop over rows and steps."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import HIDDEN, VOCAB, make_run, make_sample, make_target
from trainer.learner import load_draft
from trainer.loss import FrozenTarget, unroll
from trainer.sample import collate


def reference(draft, target, samples, steps, decay, generated_only):
    ids = (draft.d2t + torch.arange(len(draft.d2t))).tolist()
    total = 0.0
    per_step = [[] for _ in range(steps)]
    committed = []
    for sample in samples:
        T = len(sample)
        embed = target.embed_VH[sample.tokens_T]
        shifted = torch.cat([embed[1:], torch.zeros(1, HIDDEN, dtype=embed.dtype)])
        logits = draft(shifted[None], sample.aux_T3H[None], sample.start + torch.arange(T)[None], steps)
        teacher_logits = sample.last_TH @ target.head_VH.T
        for t in range(T):
            run_length, whole = 0, True
            for k in range(steps):
                teacher_row = t + 1 + k
                if teacher_row >= T:
                    whole = False
                    break
                predicted_position = sample.start + t + 2 + k
                if generated_only and predicted_position < sample.prompt_tokens:
                    whole = False
                    continue
                best = int(teacher_logits[teacher_row].argmax())
                draft_best = ids[int(logits[k][0, t].argmax())]
                run_length += run_length == k and draft_best == best
                if best in ids:
                    teacher = teacher_logits[teacher_row][ids].softmax(-1)
                    per_step[k].append(-(teacher * logits[k][0, t].log_softmax(-1)).sum())
            if whole:
                committed.append(1 + run_length)
    for k in range(steps):
        total = total + decay**k * torch.stack(per_step[k]).mean()
    return total, committed


@pytest.mark.parametrize("generated_only", [False, True])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 32])
def test_loss_gradient_and_acceptance_match_the_reference(tmp_path, generated_only, draft_vocab):
    run = make_run(tmp_path, make_target(tmp_path / "target"), draft_vocab_size=draft_vocab)
    draft = load_draft(run, run.version_path(0)).double()
    torch.manual_seed(1)
    target = FrozenTarget(torch.randn(VOCAB, HIDDEN).double(), torch.randn(VOCAB, HIDDEN).double())
    samples = [
        make_sample(tokens, prompt, seed=tokens, start=start) for tokens, prompt, start in [(12, 5, 0), (7, 9, 3)]
    ]
    samples = [replace(s, aux_T3H=s.aux_T3H.double(), last_TH=s.last_TH.double()) for s in samples]
    steps = 3

    result = unroll(draft, target, collate(samples, torch.device("cpu")), steps, 0.8, generated_only)
    result.loss.backward()
    found = draft.fc.weight.grad.clone()
    draft.zero_grad()
    wanted, committed = reference(draft, target, samples, steps, 0.8, generated_only)
    wanted.backward()

    # The unrolled attention takes its softmax in float32, whatever the inputs.
    torch.testing.assert_close(result.loss.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, draft.fc.weight.grad, atol=1e-5, rtol=1e-4)
    assert result.acceptance_length(steps) == (sum(committed), len(committed))


def test_a_batch_without_a_row_to_learn_from_has_a_finite_loss(tmp_path):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    draft = load_draft(run, run.version_path(0))
    target = FrozenTarget(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    batch = collate([make_sample(5, prompt_tokens=50)], torch.device("cpu"))
    result = unroll(draft, target, batch, 3, 0.8, generated_only=True)
    result.loss.backward()
    assert result.loss == 0
    assert draft.fc.weight.grad.abs().sum() == 0
