"""Samples that one process holds, in two."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.tiny import HIDDEN, make_sample
from trainer.rows import Rows
from trainer.share import Dealer


def make_samples():
    """Those of more than six tokens show an image of three rows."""
    samples = []
    for tokens in (5, 9, 12, 7, 6):
        embeds_MH = torch.full((3 if tokens > 6 else 0, HIDDEN), tokens + 0.5)
        shown = {"embeds_MH": embeds_MH, "places_M3": embeds_MH[:, :3].int()}
        sample = make_sample(tokens, seed=tokens, start=tokens % 3, slice=f"s{tokens}", **shown)
        sample.tokens_T[2 : 2 + len(embeds_MH)] = -7
        samples.append(sample)
    return samples


def share(rank, store, folder):
    """Each process says what it got."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dealer, got = Dealer(), []
    for samples in (make_samples(), make_samples()[:1]):
        passes = dealer.share_out(samples if rank == 0 else None, 16)
        got.append([(s.slice, s.start, s.rows, s.generated_T, s.rejected_T) for own in passes for s in own])
    assert dealer.share_out(None, 16) is None
    torch.save(got, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_each_sample_reaches_one_process_bit_by_bit(tmp_path):
    mp.spawn(share, (tmp_path / "store", tmp_path), nprocs=2)
    torch.serialization.add_safe_globals([Rows])
    hands = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    assert {len(dealt[2].embeds_MH) for dealt in hands[1][0]} == {0, 3}  # of those that were sent, some show images
    for turn, samples in enumerate((make_samples(), make_samples()[:1])):
        got = {name: rest for hand in hands for name, *rest in hand[turn]}
        assert len(got) == len(samples)
        for sample in samples:
            start, rows, *masks = got[sample.slice]
            assert start == sample.start
            expected = [*sample.rows, sample.generated_T, sample.rejected_T]
            assert all(map(torch.equal, [*rows, *masks], expected))
