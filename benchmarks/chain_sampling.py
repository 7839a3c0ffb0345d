"""The acceptance that evaluation works out, against the sampling that serves::

    python benchmarks/chain_sampling.py [--device cuda] [--quick] [--json FILE]

Evaluation gives a sampled chain of drafts its exact expected length (``trainer/evaluate.py``: each draft is accepted
with chance ``sum(min(p, q))``). Here drafts are sampled and verified many times: on a GPU by
``flashinfer.sampling.chain_speculative_sampling``, otherwise by rejection sampling (arXiv 2302.01318) in PyTorch. B
repeats, K drafts, V vocabulary. Exit code 1 where they differ by more than chance allows.
"""

import math
from typing import Annotated

import torch
import typer
from measuring import JsonFile, Quick, save_record
from torch import Tensor

K, V = 3, 1024
BATCH, BATCHES = 4096, 16
SIGMAS = 4.0


def expected_drafts(target_KV: Tensor, draft_KV: Tensor) -> float:
    """Accepted of K."""
    return float(torch.minimum(target_KV, draft_KV).sum(-1).cumprod(0).sum())


def sampled_drafts_B(target_BKV: Tensor, draft_BKV: Tensor, drafts_BK: Tensor) -> Tensor:
    if target_BKV.device.type == "cuda":
        from flashinfer.sampling import chain_speculative_sampling

        last_B1V = target_BKV[:, -1:]  # of the token after the drafts, which is not counted
        *_, emitted_B = chain_speculative_sampling(draft_BKV, drafts_BK.int(), torch.cat([target_BKV, last_B1V], 1))
        return emitted_B
    chances_BK = (target_BKV / draft_BKV).gather(-1, drafts_BK[..., None])[..., 0]
    return (torch.rand_like(chances_BK) < chances_BK).long().cumprod(1).sum(1)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    torch.manual_seed(0)
    torch.set_default_device(device)
    target_KV = (2 * torch.randn(K, V)).softmax(-1)
    draft_KV = (target_KV.log() + torch.randn(K, V)).softmax(-1)
    target_BKV, draft_BKV = (x.expand(BATCH, K, V).contiguous() for x in (target_KV, draft_KV))
    found = []
    for _ in range(BATCHES // 4 if quick else BATCHES):
        drafts_BK = torch.multinomial(draft_KV, BATCH, replacement=True).T.contiguous()
        found.append(sampled_drafts_B(target_BKV, draft_BKV, drafts_BK).double())
    sampled = torch.cat(found)
    expected, mean = expected_drafts(target_KV, draft_KV), float(sampled.mean())
    error = float(sampled.std()) / math.sqrt(sampled.numel())
    print(f"accepted of {K} drafts: expected {expected:.4f}, sampled {mean:.4f} (standard error {error:.4f})")
    if json_file:
        sample = {"expected": expected, "sampled": mean, "error": error, "repeats": sampled.numel()}
        save_record(json_file, {"sampled / expected": mean / expected}, [sample])
    raise typer.Exit(abs(mean - expected) > SIGMAS * error)


if __name__ == "__main__":
    typer.run(main)
