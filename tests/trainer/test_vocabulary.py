"""The draft vocabulary follows what is served, and what was learnt of a token stays."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from sglang_specforge.checkpoint import load_checked, load_config
from sglang_specforge.contracts.control import TokenLedger, Vocabulary
from sglang_specforge.settings import Run
from sglang_specforge.target import load_embedding_and_head
from sglang_specforge.versions import VersionFolder
from tests.tiny import VOCAB, make_run, make_sample, make_target
from tests.trainer.bare_source import BareSource
from trainer.learner import Learner
from trainer.loop import Trainer
from trainer.replay import ReplayBuffer
from trainer.resume import Checkpoints, OfflinePosition
from trainer.vocabulary import VocabularyWatch, take_rows

CPU = torch.device("cpu")
HAS_V = torch.arange(8) < 4  # the first four of eight tokens


def counts(*tokens: int) -> torch.Tensor:
    """In thousands."""
    return 1000 * torch.tensor(tokens)


def test_the_most_frequent_tokens_are_taken_and_of_equals_those_that_it_has():
    watch = VocabularyWatch(least_gain=0.01)
    assert watch.better(counts(5, 0, 0, 1, 9, 0, 0, 0), HAS_V).tolist() == [0, 1, 3, 4]
    assert watch.seen == Vocabulary(tokens=4, counted=15_000, coverage=0.4, chosen=1)


@pytest.mark.parametrize(
    ("counts_V", "has_V", "least_gain"),
    [
        pytest.param(counts(1, 0, 0, 1, 2, 0, 0, 0), HAS_V, 0.01, id="too few tokens were seen"),
        pytest.param(counts(50, 50, 50, 49, 50, 0, 0, 0), HAS_V, 0.01, id="it would hold little more"),
        pytest.param(counts(50, 0, 0, 0, 50, 0, 0, 0), HAS_V, 1.0, id="the operator wants none"),
        pytest.param(counts(9, 9, 9, 9, 9, 9, 9, 9), HAS_V | True, 0.01, id="it has all"),
        pytest.param(counts(0, 0, 0, 0, 0, 0, 0, 0), HAS_V, 0.01, id="nothing was seen"),
    ],
)
def test_it_stays_where(counts_V, has_V, least_gain):
    watch = VocabularyWatch(least_gain)
    assert watch.better(counts_V, has_V) is None
    assert watch.seen.chosen == 0


def test_tokens_are_counted_where_the_draft_learns_them_and_not_of_what_is_held_out():
    prompt_then_answer = torch.tensor([7, 7, 7, 7, 3, 3, -5, 3])  # a part of an image is no token
    for generated_only, expected in ((True, {3: 3}), (False, {3: 3, 7: 3})):
        for holdout_every in (1 << 32, 1):
            buffer = ReplayBuffer(1000, holdout_every, seed=0, epochs=1.0)
            held_out = buffer.add(make_sample(8, tokens_T=prompt_then_answer), TokenLedger())
            counts_V = buffer.count_tokens(VOCAB, generated_only)
            assert counts_V.nonzero().flatten().tolist() == ([] if held_out else sorted(expected))
            assert all(counts_V[token] == (0 if held_out else count) for token, count in expected.items())


class OneSample(BareSource):
    """A source whose draft is to say other tokens after the first version; notes what the draft is before each step."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner, steps=4)
        self.drafts, self.moments, self.losses = [], [], []
        states_TH = 100 * torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
        self._passes = [[make_sample(24, last_TH=states_TH)]] if dist.get_rank() == 0 else [[]]

    def draw(self):
        self.drafts.append(copy.deepcopy(self.learner.export()))
        self.moments.append(copy.deepcopy(moments(self.learner)))
        return self._passes

    def better_vocabulary(self, t2d_V):
        assert dist.get_rank() == 0
        assert t2d_V.nonzero().flatten().tolist() == list(range(31))
        return torch.arange(5, 36)

    def trained(self, result):
        self.losses.append(result.loss)

    def wants_version(self, step):
        return step == 1


def moments(learner: Learner) -> list[torch.Tensor]:
    """Of AdamW, of the head's rows."""
    [optimizer] = (o for o in learner.optimizers if isinstance(o, torch.optim.AdamW))
    found = [s for p, s in optimizer.state.items() if p.shape == (31, 16)]
    return [value.full_tensor() for state in found for value in state.values() if isinstance(value, DTensor)]


def learn(rank: int, processes: int, folder: Path, run: Run) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    learner = Learner(run, CPU)
    source = OneSample(learner)
    Trainer(run, learner, source, told_to_stop=lambda: False).run()
    if rank == 0:
        told = {"draft": source.drafts[1], "moments": source.moments[1], "losses": source.losses}
        torch.save(told, folder / "told")
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), {"optimizer": "muon"}], ids=str)
def test_rows_move_with_their_moments_and_two_processes_do_as_one(tmp_path, settings):
    target, told = make_target(tmp_path / "target"), []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = make_run(folder, target, draft_vocab_size=31, loss_on="all", **settings)
        mp.spawn(learn, (processes, folder, run), nprocs=processes)
        told.append(torch.load(folder / "told", weights_only=True))
    one, two = told
    before = load_checked(run.version_path(1), load_config(run.version_path(0)), run.target_fingerprint)
    chosen = one["draft"]
    stay = slice(31 - 5)
    torch.testing.assert_close(chosen["lm_head.weight"][stay], before["lm_head.weight"][5:], rtol=1e-4, atol=1e-6)
    _, head_VH = load_embedding_and_head(target)
    assert torch.equal(chosen["lm_head.weight"][31 - 5 :], head_VH[31:36])
    assert chosen["t2d"].nonzero().flatten().tolist() == list(range(5, 36))
    assert (chosen["d2t"] == 5).all()
    assert len(one["moments"]) == 2
    for moment in one["moments"]:
        assert moment[stay].abs().sum(1).all()
        assert not moment[31 - 5 :].any()
    assert one["losses"][-1] < one["losses"][0]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name in ("lm_head.weight", "d2t", "t2d"):
        torch.testing.assert_close(two["draft"][name], chosen[name], rtol=1e-4, atol=1e-6)


def test_a_version_with_another_vocabulary_is_whole_and_resumed_from(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run = make_run(tmp_path, make_target(tmp_path / "target"), draft_vocab_size=31, loss_on="all")
        first = Learner(run, CPU)
        first.train([[make_sample(20)]])
        first.choose_vocabulary(torch.arange(9, 40))
        version = VersionFolder(run.run_dir).publish(first.config, first.export(), keep=3)
        loaded = load_checked(run.version_path(version), first.config, run.target_fingerprint)
        assert loaded["t2d"].nonzero().flatten().tolist() == list(range(9, 40))
        Checkpoints(run).save(first, OfflinePosition(dataset="d"))
        second = Learner(run, CPU)
        Checkpoints(run).resume(second)
        assert torch.equal(second.draft.d2t, first.draft.d2t)
        assert second.train([[make_sample(20)]]) == first.train([[make_sample(20)]])
        bias_D = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (1,)))
        take_rows(bias_D, torch.tensor([2, -1, 0, 3]), 9.0)
        assert bias_D.full_tensor().tolist() == [2.0, 9.0, 0.0, 3.0]
    finally:
        dist.destroy_process_group()
