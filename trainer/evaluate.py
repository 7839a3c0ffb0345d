"""Acceptance length by simulation: what a chain or tree of drafts would have committed along recorded sequences.

A verification that starts at a row commits the leading drafts that are accepted, and one token of the target's. Where
acceptance is a matter of chance, the expected number of verifications follows from the chance that one starts at each
row, so the result is exact for the recorded sequence. Shapes: N rows, L roots of chains among them, K drafts one after
another, C rows of a chunk, D draft vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sglang_specforge.contracts.control import Verdict
from sglang_specforge.training_settings import Speculation
from trainer.draft import Begun, Draft
from trainer.draft_tree import accepted_by_tree
from trainer.loss import FrozenTarget, Taught, Teacher, run_draft
from trainer.roots import Roots, Run, rows_of
from trainer.sample import Pack, Sample, pack

# greedy: the target's top token, as at temperature 0. target_only: a top draft is taken with the target's probability
# of it, as SGLang does for chains at temperature 1. sampled: the draft is sampled too (speculative sampling), which
# accepts with chance sum(min(p, q)).
Way = Literal["greedy", "target_only", "sampled"]


@dataclass(frozen=True)
class Simulated:
    """Over some sequences. ``tokens`` counts those that each sequence's prefill gave."""

    tokens: int
    sequences: int
    verify_steps: float
    accepted_K: list[float]  # verifications that accepted a draft at each place after the first token

    @classmethod
    def nothing(cls, steps: int) -> "Simulated":
        return cls(0, 0, 0.0, [0.0] * steps)

    def __add__(self, other: "Simulated") -> "Simulated":
        return Simulated(
            self.tokens + other.tokens,
            self.sequences + other.sequences,
            self.verify_steps + other.verify_steps,
            [a + b for a, b in zip(self.accepted_K, other.accepted_K, strict=True)],
        )

    @property
    def length(self) -> float | None:
        """Tokens committed per verification, bonus token included."""
        return (self.tokens - self.sequences) / self.verify_steps if self.verify_steps else None

    @property
    def by_position(self) -> list[float]:
        """Share of verifications in which a draft was accepted at each place."""
        return [accepted / self.verify_steps if self.verify_steps else 0.0 for accepted in self.accepted_K]


@dataclass(frozen=True)
class Evaluated:
    """A version on held-out samples."""

    overall: Simulated
    slices: dict[str, Simulated]
    verdict: Verdict | None  # against the draft in service, where there is one


@torch.no_grad()
def simulate(
    draft: Draft, target: FrozenTarget, samples: list[Sample], speculation: Speculation, way: Way = "greedy"
) -> Simulated:
    """Speculation on each sample's generated tokens, from the weights as they are.

    Raises:
        ValueError: a tree in another way than greedy.
    """
    if speculation.topk > 1 and way != "greedy":
        raise ValueError(f"a tree of drafts is simulated greedily only, not {way}")
    device, steps = target.head_VH.device, speculation.steps
    found = Simulated.nothing(steps)
    for sample in samples:
        packed = pack([sample], device)
        if speculation.topk > 1:
            roots = Roots.everywhere(packed.samples, device)
            chances = partial(accepted_by_tree, target=target, pack=packed, speculation=speculation)
        else:
            taught = packed.taught(generated_only=True)
            roots = Roots.of_chains_to(taught, len(sample), steps, device)
            chances = partial(_chances, target=target, pack=packed, taught=taught, steps=steps, way=way)
        chances_KN = run_draft(draft, target, packed, roots, chances).tolist()
        for _, start, end in packed.generated:
            found += Simulated(end - start, 1, *_walk([row[start:end] for row in chances_KN]))
    return found


def by_slice(found: Iterable[tuple[str, Simulated]]) -> dict[str, Simulated]:
    """The sum of each slice."""
    sums: dict[str, Simulated] = {}
    for name, simulated in found:
        sums[name] = sums[name] + simulated if name in sums else simulated
    return dict(sorted(sums.items()))


def _walk(chances_KN: list[list[float]]) -> tuple[float, list[float]]:
    """Expected verifications over one generated run, and how many of them accept a draft at each place."""
    rows = len(chances_KN[0])
    starts = [1.0] + [0.0] * (rows + len(chances_KN))  # chance that a verification starts at the row
    accepted_K = [0.0] * len(chances_KN)
    for n in range(rows - 1):
        left = starts[n]
        for k, chances_N in enumerate(chances_KN):
            taken = left * (chances_N[n] if n + 1 + k < rows else 0.0)
            accepted_K[k] += taken
            starts[n + 1 + k] += left - taken
            left = taken
        starts[n + 1 + len(chances_KN)] += left
    return sum(starts[: rows - 1]), accepted_K


def _chances(begun: Begun, target: FrozenTarget, pack: Pack, taught: list[Run], steps: int, way: Way) -> Tensor:
    """Chance that the target accepts the draft of row n at step k, [K, N]; zero where it drafts no generated token."""
    hidden_KLH, head, roots = begun.unroll(steps), begun.draft.lm_head, begun.past.roots
    chances_KN = torch.zeros(steps, roots.rows, device=roots.device)
    for chunk in Teacher(begun.draft, target, pack).in_chunks(rows_of(taught, roots.device)):
        for k, hidden_LH in enumerate(hidden_KLH):
            n_C, counts_C = chunk.learners(k)
            logits_CD = head(hidden_LH[roots.place_N[n_C]]).to(chunk.teacher_CD.dtype)
            chances_KN[k].index_add_(0, n_C, (_chance(logits_CD, chunk, way) * counts_C).to(chances_KN.dtype))
    return chances_KN


def _chance(logits_CD: Tensor, taught: Taught, way: Way) -> Tensor:
    if way == "greedy":
        return (logits_CD.argmax(-1) == taught.best_C) & taught.known_C
    target_CD = taught.teacher_CD * taught.mass_C[:, None]
    if way == "sampled":
        return torch.minimum(target_CD, logits_CD.softmax(-1)).sum(-1)
    return target_CD.gather(-1, logits_CD.argmax(-1, keepdim=True))[:, 0]
