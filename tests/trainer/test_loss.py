"""The loss against a float64 loop over rows and steps."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import HIDDEN, VOCAB, make_run, make_sample, make_target
from trainer import loss
from trainer.learner import load_draft
from trainer.loss import FrozenTarget, unroll
from trainer.sample import pack


def reference(draft, target, samples, steps, decay, generated_only):
    """The loss, and for each row that counts at every step the tokens a chain from it would commit."""
    ids = draft.target_ids_D.tolist()
    per_step, committed = [[] for _ in range(steps)], []
    for sample in samples:
        T = len(sample)
        logits = draft(
            target.embed_VH[sample.tokens_T], sample.aux_T3H, sample.start + torch.arange(T), [(0, T)], steps,
            lambda hidden, head: [h @ head.T for h in hidden],
        )  # fmt: skip
        teacher_logits = sample.last_TH @ target.head_VH.T
        for t in range(T):
            right, counts = [], []
            for k in range(steps):
                row, position = t + 1 + k, sample.start + t + 2 + k
                counts.append(row < T and not (generated_only and position < sample.prompt_tokens))
                if counts[-1]:
                    best = int(teacher_logits[row].argmax())
                    right.append(best == ids[int(logits[k][t].argmax())])
                    teacher = teacher_logits[row][ids].softmax(-1)
                    per_step[k].append(-(teacher * logits[k][t].log_softmax(-1)).sum() * (best in ids))
            if all(counts):
                committed.append(1 + (right + [False]).index(False))
    return sum(decay**k * torch.stack(losses).mean() for k, losses in enumerate(per_step)), committed


@pytest.mark.parametrize("chunk", [1 << 21, 5 * 32])
@pytest.mark.parametrize("generated_only", [False, True])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 32])
def test_loss_gradient_and_acceptance_match_the_reference(tmp_path, monkeypatch, generated_only, draft_vocab, chunk):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", chunk)
    run = make_run(tmp_path, make_target(tmp_path / "target"), draft_vocab_size=draft_vocab)
    draft = load_draft(run, run.version_path(0)).double()
    torch.manual_seed(1)
    target = FrozenTarget(torch.randn(VOCAB, HIDDEN).double(), torch.randn(VOCAB, HIDDEN).double())
    samples = [
        make_sample(tokens, prompt, seed=tokens, start=start) for tokens, prompt, start in [(12, 5, 0), (7, 9, 3)]
    ]
    samples = [replace(s, aux_T3H=s.aux_T3H.double(), last_TH=s.last_TH.double()) for s in samples]
    steps = 3

    result = unroll(draft, target, pack(samples, torch.device("cpu")), steps, 0.8, generated_only)
    result.loss.backward()
    found = [p.grad.clone() for p in draft.parameters()]
    draft.zero_grad()
    wanted, committed = reference(draft, target, samples, steps, 0.8, generated_only)
    wanted.backward()

    torch.testing.assert_close(result.loss.double(), wanted, atol=1e-6, rtol=1e-6)
    for grad, parameter in zip(found, draft.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-6, rtol=1e-5)
    assert result.acceptance_length(steps) == (sum(committed), len(committed))


def test_a_batch_without_a_row_to_learn_from_has_a_finite_loss(tmp_path):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    draft = load_draft(run, run.version_path(0))
    target = FrozenTarget(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    batch = pack([make_sample(5, prompt_tokens=50)], torch.device("cpu"))
    result = unroll(draft, target, batch, 3, 0.8, generated_only=True)
    result.loss.backward()
    assert result.loss == 0
    assert draft.fc.weight.grad.abs().sum() == 0
