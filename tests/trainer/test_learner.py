"""The training step and its checkpoints, under FSDP2 in one process as the trainer runs it."""

import math
from pathlib import Path

import pytest
import torch

from sglang_specforge.checkpoint import load_checked, save_checkpoint
from sglang_specforge.contracts.control import Parity, TokenLedger
from sglang_specforge.versions import VersionFolder
from tests.tiny import make_run, make_sample, make_target
from trainer.evaluate import by_slice
from trainer.fused import fuse
from trainer.learner import Learner
from trainer.parity import ParityCheck
from trainer.resume import Checkpoints, OfflinePosition, OnlinePosition, ResumeError, StreamPosition
from trainer.roots import Roots

CPU = torch.device("cpu")
POSITION = OfflinePosition(dataset="d")


@pytest.fixture(autouse=True, scope="module")
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_stays_compiled():
    yield
    fuse(False)
    torch.compiler.reset()


@pytest.fixture
def run(tmp_path):
    return make_run(
        tmp_path, make_target(tmp_path / "target"), learning_rate=1e-2, warmup_steps=2, loss_on="all", ttt_steps=3
    )


def test_the_loss_falls_and_acceptance_rises_on_a_sample_seen_again(run):
    # The head's weights are small: large states make a teacher that has something to say.
    learner, samples = Learner(run, CPU), [make_sample(24, last_TH=100 * torch.randn(24, 16))]
    before = by_slice(learner.simulate([samples]))[""].length
    first = learner.train([samples]).loss
    for _ in range(60):
        last = learner.train([samples])
    assert last.loss < 0.7 * first
    assert last.step == 61
    assert by_slice(learner.simulate([samples]))[""].length > before


@pytest.mark.parametrize(("objective", "activation_checkpointing"), [("soft_ce", False), ("lk_lambda", True)])
def test_a_compiled_step_learns_the_same(run, objective, activation_checkpointing):
    given = {"objective": objective, "activation_checkpointing": activation_checkpointing, "rejection_penalty": 0.5}
    rejected_T = torch.arange(24).where(torch.arange(24) % 3 == 0, -1)
    passes = [
        [make_sample(24, last_TH=100 * torch.randn(24, 16), rejected_T=rejected_T), make_sample(9)],
        [make_sample(17)],
    ]
    found = []
    for compiles in (False, True):
        settings = run.settings.model_copy(update={**given, "compile": compiles})
        learner = Learner(run.model_copy(update={"settings": settings}), CPU)
        trained = [learner.train(passes) for _ in range(3)]
        found.append([number for t in trained for number in (t.loss, t.grad_norm, *t.accuracy_K)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("objective", ["soft_ce", "lk_lambda"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_learns(run, objective):
    settings = run.settings.model_copy(update={"objective": objective})
    learner, good = Learner(run.model_copy(update={"settings": settings}), CPU), make_sample(24)
    learner.train([[good]])
    before = {name: tensor.clone() for name, tensor in learner.export().items()}
    bad = learner.train([[make_sample(24, last_TH=torch.full((24, 16), torch.nan))], [good]])
    assert (bad.step, bad.loss, bad.grad_norm, bad.skipped_steps) == (2, None, None, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.export().items())
    after = learner.train([[good]])
    assert math.isfinite(after.loss)
    assert (after.step, after.skipped_steps) == (3, 1)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learner.export().items())


def test_mfu_is_told_where_the_peak_of_the_device_is_known(run, monkeypatch):
    assert Learner(run, CPU).train([[make_sample(24)]]).mfu is None
    monkeypatch.setattr("trainer.learner.peak_flops", lambda device, dtype: 1e10)
    assert 0 < Learner(run, CPU).train([[make_sample(24)]]).mfu < 1


def test_acceptance_is_told_apart_by_slice(run):
    learner = Learner(run, CPU)
    samples = [make_sample(16, seed=i, slice=name) for i, name in enumerate(["code", "chat", "code"])]
    found = by_slice(learner.simulate([[s] for s in samples] + [[]]))
    assert {name: (s.sequences, s.tokens) for name, s in found.items()} == {"chat": (1, 13), "code": (2, 26)}
    assert learner.simulate([[samples[1]]]) == [("chat", found["chat"])]


def test_a_checkpoint_is_simulated_beside_what_is_being_trained(run):
    learner, samples = Learner(run, CPU), [make_sample(24, last_TH=100 * torch.randn(24, 16))]
    started_from = learner.simulate([samples])
    for _ in range(60):
        learner.train([samples])
    assert learner.simulate([samples], run.version_path(0)) == started_from
    assert learner.simulate([samples]) != started_from


def test_a_published_version_passes_the_servers_checks_and_carries_the_weights(run):
    learner = Learner(run, CPU)
    learner.train([[make_sample(24)]])
    version = VersionFolder(run.run_dir).publish(learner.config, learner.export(), keep=3)
    loaded = load_checked(run.version_path(version), learner.config, run.target_fingerprint)
    assert torch.equal(loaded["fc.weight"], learner.draft.fc.weight.full_tensor())
    assert loaded["fc.weight"].dtype == torch.float32


def test_resuming_goes_on_exactly(run):
    ledger, parity = TokenLedger(trained=5, streams={"s": 7}), Parity(compared=3, agreed=3)
    position = OnlinePosition(streams=[StreamPosition(spans_endpoint=run.spans_endpoint, ledger=ledger, parity=parity)])
    first = Learner(run, CPU)
    for seed in range(3):
        first.train([[make_sample(20, seed=seed)]])
    Checkpoints(run).save(first, position, best=1.5)
    expected = [first.train([[make_sample(20, seed=seed)]]) for seed in range(3, 6)]

    second = Learner(run, CPU)
    progress = Checkpoints(run).resume(second)
    assert second.step == 3
    assert (progress.position, progress.best_acceptance_length) == (position, 1.5)
    assert [second.train([[make_sample(20, seed=seed)]]) for seed in range(3, 6)] == expected


@pytest.mark.parametrize(("optimizer", "anew"), [("adamw", False), ("muon", True)])
def test_settings_of_the_optimizer_may_change_between_runs(run, caplog, optimizer, anew):
    first = Learner(run, CPU)
    first.train([[make_sample(20)]])
    Checkpoints(run).save(first, POSITION)
    settings = run.settings.model_copy(update={"optimizer": optimizer, "weight_decay": 0.5})
    changed = run.model_copy(update={"settings": settings})
    second = Learner(changed, CPU)
    Checkpoints(changed).resume(second)
    assert second.step == 1
    assert torch.equal(second.draft.fc.weight.full_tensor(), first.draft.fc.weight.full_tensor())
    assert ("muon starts anew: the checkpoint's is adamw" in caplog.text) == anew
    assert {group["weight_decay"] for each in second.optimizers for group in each.param_groups} == {0.5}
    moments = second.optimizers[0].state[second.draft.lm_head.weight].get("exp_avg")
    assert (moments is None or not moments.full_tensor().any()) == anew
    assert second.train([[make_sample(20)]]).step == 2


def test_the_account_goes_on_after_the_last_step(run):
    checkpoints, learner = Checkpoints(run), Learner(run, CPU)
    checkpoints.note(POSITION)  # there is none to note it in
    checkpoints.save(learner, POSITION, best=1.5)
    later = OnlinePosition(
        streams=[StreamPosition(spans_endpoint="ipc:///s", ledger=TokenLedger(trained=5), parity=Parity())]
    )
    checkpoints.note(later)
    progress = Checkpoints(run).resume(Learner(run, CPU))
    assert (progress.position, progress.best_acceptance_length) == (later, 1.5)


def test_a_checkpoint_of_another_target_is_refused_by_name(run):
    Checkpoints(run).save(Learner(run, CPU), POSITION)
    other = run.model_copy(update={"target_fingerprint": "0123456789abcdef"})
    with pytest.raises(ResumeError, match="0123456789abcdef"):
        Checkpoints(other).resume(Learner(run, CPU))


def test_a_checkpoint_of_another_shape_is_refused_with_what_to_do(run, tmp_path):
    Checkpoints(run).save(Learner(run, CPU), POSITION)
    (tmp_path / "wide").mkdir()
    wide = make_run(tmp_path / "wide", Path(run.target_path), draft_vocab_size=40)
    wide = wide.model_copy(update={"settings": run.settings})
    with pytest.raises(ResumeError, match="does not fit the draft and its optimizer; give another run folder"):
        Checkpoints(wide).resume(Learner(wide, CPU))


def test_a_step_that_is_not_finite_changes_nothing(run):
    learner = Learner(run, CPU)
    before = learner.draft.fc.weight.full_tensor().clone()
    learner.train([[make_sample(12, aux_T3H=torch.full((12, 48), float("nan")))]])
    assert torch.equal(learner.draft.fc.weight.full_tensor(), before)


def test_parity_tells_the_served_version_from_another(run, caplog):
    learner = Learner(run, CPU)
    tensors = {name: t.clone() for name, t in learner.export().items()}
    check = ParityCheck(run, learner.target, Parity(), run.version_path)
    draft = check._draft(0)
    sample = make_sample(20)
    embed = learner.target.embed_VH[sample.tokens_T]
    with torch.no_grad():
        logits = draft(
            embed, sample.aux_T3H, torch.arange(20), Roots.everywhere([(0, 20)], CPU),
            lambda begun: draft.lm_head(begun.unroll(1)[0]),
        )  # fmt: skip
    top = logits.argmax(-1)
    proposals = [(p, int(top[p - 1])) for p in range(4, 19)]
    check.compare(make_sample(20, proposals=proposals))
    assert (check.parity.agreed, check.parity.compared) == (15, 15)

    tensors["fc.weight"] = torch.randn_like(tensors["fc.weight"])
    save_checkpoint(run.version_path(1), learner.config, tensors)
    check.compare(make_sample(20, proposals=proposals, draft_version=1))
    assert check.parity.compared == 30
    assert check.parity.agreed < 25
    assert not caplog.records
    for _ in range(20):
        check.compare(make_sample(20, proposals=proposals, draft_version=1))
    assert len(caplog.records) == 1
    check.parity.compared = 30
    check.compare(make_sample(20, proposals=proposals, start=3))  # its prefix is not known
    check.compare(make_sample(20, proposals=proposals, draft_version=None))
    check.compare(make_sample(20, proposals=proposals, restored=2))  # the server's draft may have read older keys there
    assert check.parity.compared == 30
