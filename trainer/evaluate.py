"""Acceptance length by simulation: what a chain of drafts would have committed along recorded sequences.

A verification that starts at a row commits the leading drafts that are accepted, and one token of the target's. Where
acceptance is a matter of chance, the expected number of verifications follows from the chance that one starts at each
row, so the result is exact for the recorded sequence. Shapes: N rows, K drafts of a chain, C rows of a chunk, D draft
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.draft import Draft
from trainer.loss import FrozenTarget, Taught, Teacher, run_draft
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
    accepted_K: list[float]  # verifications that accepted the draft at each place in the chain

    @property
    def length(self) -> float | None:
        """Tokens committed per verification, bonus token included."""
        return (self.tokens - self.sequences) / self.verify_steps if self.verify_steps else None

    @property
    def by_position(self) -> list[float]:
        """Share of verifications in which the draft at each place in the chain was accepted."""
        return [accepted / self.verify_steps if self.verify_steps else 0.0 for accepted in self.accepted_K]


@torch.no_grad()
def simulate(draft: Draft, target: FrozenTarget, samples: list[Sample], steps: int, way: Way = "greedy") -> Simulated:
    """A chain of ``steps`` drafts on each sample's generated tokens, from the weights as they are."""
    device = target.head_VH.device
    tokens, sequences, verify_steps, accepted_K = 0, 0, 0.0, [0.0] * steps
    for sample in samples:
        packed = pack([sample], device)
        chances_KN = run_draft(draft, target, packed, steps, _Chances(draft, target, packed, way)).tolist()
        for first, last in _runs(sample.generated_T):
            tokens, sequences = tokens + last - first + 1, sequences + 1
            expected, accepted = _walk([row[first : last + 1] for row in chances_KN])
            verify_steps += expected
            accepted_K = [a + b for a, b in zip(accepted_K, accepted, strict=True)]
    return Simulated(tokens, sequences, verify_steps, accepted_K)


def _walk(chances_KN: list[list[float]]) -> tuple[float, list[float]]:
    """Expected verifications over one generated run, and how many of them accept the draft at each place."""
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


def _runs(generated_T: Tensor) -> Iterator[tuple[int, int]]:
    """First and last row of each stretch of rows whose next token was generated."""
    edges = torch.diff(generated_T.int(), prepend=torch.zeros(1), append=torch.zeros(1)).tolist()
    firsts, ends = ([i for i, edge in enumerate(edges) if edge == sign] for sign in (1, -1))
    yield from ((first, end - 1) for first, end in zip(firsts, ends, strict=True))


class _Chances:
    """Chance that the target accepts the draft of row n at step k, [K, N]; zero where a sample has no teacher row."""

    def __init__(self, draft: Draft, target: FrozenTarget, packed: Pack, way: Way) -> None:
        self._draft, self._target, self._pack, self._way = draft, target, packed, way

    def __call__(self, hidden_KNH: list[Tensor], head_DH: Tensor) -> Tensor:
        teacher = Teacher(self._target.head_VH, self._pack, self._draft.target_ids_D, self._draft.t2d)
        first_N = self._pack.first_row_N
        chances_KN = torch.zeros(len(hidden_KNH), first_N.numel(), device=head_DH.device)
        for chunk in teacher.in_chunks(torch.arange(first_N.numel(), device=head_DH.device)):
            for k, hidden_NH in enumerate(hidden_KNH):
                n_C, counts_C = chunk.learners(k)
                logits_CD = F.linear(hidden_NH[n_C], head_DH).to(chunk.teacher_CD.dtype)
                chances_KN[k].index_add_(0, n_C, (self._of(logits_CD, chunk) * counts_C).to(chances_KN.dtype))
        return chances_KN

    def _of(self, logits_CD: Tensor, taught: Taught) -> Tensor:
        if self._way == "greedy":
            return (logits_CD.argmax(-1) == taught.best_C) & taught.known_C
        target_CD = taught.teacher_CD * taught.mass_C[:, None]
        if self._way == "sampled":
            return torch.minimum(target_CD, logits_CD.softmax(-1)).sum(-1)
        return target_CD.gather(-1, logits_CD.argmax(-1, keepdim=True))[:, 0]
