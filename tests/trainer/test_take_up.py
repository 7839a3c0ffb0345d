"""Where the draft in service is clearly better than what the trainer publishes, training goes on from that draft."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from sglang_specforge.checkpoint import load_checked, load_config
from sglang_specforge.contracts.control import Verdict
from sglang_specforge.settings import Run
from sglang_specforge.versions import VersionFolder
from tests.tiny import make_run, make_sample, make_target
from tests.trainer.bare_source import BareSource
from trainer import loop
from trainer.learner import Learner
from trainer.loop import Trainer
from trainer.resume import Checkpoints

CPU = torch.device("cpu")
WORSE, A_LITTLE_WORSE = (
    Verdict(samples=9, gain=gain, low=gain - 0.1, served=2.0, passed=False, why="") for gain in (-0.5, -0.18)
)


class Publishing(BareSource):
    """A source whose every step makes a version; notes the draft, and what the optimizers know, before each."""

    def __init__(self, learner: Learner, served: Path, steps: int) -> None:
        super().__init__(learner, steps)
        self._served = served
        self.drafts, self.known, self.results = [], [], []
        self._passes = [[make_sample(24)]] if dist.get_rank() == 0 else [[]]

    def draw(self):
        self.drafts.append({name: tensor.clone() for name, tensor in self.learner.export().items()})
        states = (state for optimizer in self.learner.optimizers for state in optimizer.state.values())
        moments = [value.full_tensor() for state in states for value in state.values() if isinstance(value, DTensor)]
        self.known.append(sum(float(moment.abs().sum()) for moment in moments))
        return self._passes

    def rival(self):
        return self._served

    def trained(self, result):
        self.results.append(result)

    def wants_version(self, step):
        return True


def serve_another(run: Run) -> Path:
    """A draft with other weights and another vocabulary, as an operator put it into service."""
    other = Learner(run, CPU)
    other.choose_vocabulary(torch.arange(9, 40))
    other.train([[make_sample(20, seed=5)] if dist.get_rank() == 0 else []])
    versions, tensors = VersionFolder(run.run_dir), other.export()
    if dist.get_rank() == 0:
        versions.publish(other.config, tensors, keep=3)
    dist.barrier()
    return versions.path(1)


def learn(rank: int, processes: int, folder: Path, run: Run, verdicts: list[Verdict]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    served, given = serve_another(run), iter(verdicts)
    loop.compare = lambda *_: next(given)
    learner = Learner(run, CPU)
    source = Publishing(learner, served, steps=len(verdicts))
    Trainer(run, learner, source, told_to_stop=lambda: False).run()
    if rank == 0:
        told = {"drafts": source.drafts, "known": source.known, "losses": [result.loss for result in source.results]}
        torch.save(told | {"taken_up": [result.taken_up for result in source.results]}, folder / "told")
    dist.destroy_process_group()


@pytest.fixture
def ran(tmp_path):
    """Runs the loop with the gate's verdicts in some processes; what it noted."""
    target = make_target(tmp_path / "target")

    def run_loop(verdicts: list[Verdict], processes: int = 1, **settings):
        folder = tmp_path / str(processes)
        run = make_run(folder, target, draft_vocab_size=31, loss_on="all", keep_versions=9, **settings)
        mp.spawn(learn, (processes, folder, run, verdicts), nprocs=processes)
        served = load_checked(run.version_path(1), load_config(run.version_path(0)), run.target_fingerprint)
        return torch.load(folder / "told", weights_only=True), served, run

    return run_loop


@pytest.mark.parametrize("settings", [{}, pytest.param({"optimizer": "muon"}, marks=pytest.mark.slow)], ids=str)
def test_the_third_in_succession_takes_up_weights_and_vocabulary_and_two_processes_do_as_one(ran, settings):
    verdicts = [WORSE, A_LITTLE_WORSE, WORSE, WORSE, WORSE, WORSE]
    one, served, _ = ran(verdicts, **settings)
    assert one["taken_up"] == [0, 0, 0, 0, 0, 1]
    assert one["known"][4] > 0
    assert one["known"][5] == 0
    for name, tensor in served.items():
        assert torch.equal(one["drafts"][5][name], tensor), name
    assert not torch.equal(one["drafts"][4]["t2d"], served["t2d"])
    two, *_ = ran(verdicts, processes=2, **settings)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, tensor in served.items():
        torch.testing.assert_close(two["drafts"][5][name], tensor, rtol=1e-4, atol=1e-6)


def test_nothing_is_taken_up_where_the_operator_wants_that(ran):
    one, *_ = ran([WORSE] * 4, take_up_loss=1)
    assert one["taken_up"] == [0] * 4


def test_a_trainer_that_stops_then_goes_on_from_what_it_took_up(ran):
    _, served, run = ran([WORSE] * 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        learner = Learner(run, CPU)
        Checkpoints(run).resume(learner)
        assert (learner.step, learner.begun) == (3, 3)
        for name, tensor in learner.export().items():
            assert torch.equal(tensor, served[name]), name
    finally:
        dist.destroy_process_group()
