"""A tree of drafts after each row of a sequence, grown as SGLang grows it, and how far along it the target agrees.

SGLang's ``select_top_k_tokens`` and ``organize_draft_results``: the first step's B best tokens are the first beams;
each later step reads the beams and takes B tokens after each, of which the B best, by the product of probabilities, are
the next beams. Of all tokens taken the best are verified. Beam b of all rows is unrolled as a chain of its own, whose
keys follow its ancestors; all chains share the keys of the verified prefix. Shapes: N rows of one sample, B beams, K
steps, D draft vocabulary, G key heads, P head size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_specforge.training_settings import Speculation
from trainer.draft import Begun, Draft, Past
from trainer.loss import FrozenTarget, Teacher
from trainer.sample import Pack

_NONE = -1


class _Taken(NamedTuple):
    """The B best tokens after each beam of each row."""

    score_NM: Tensor  # product of probabilities from the root; M = B, or B*B
    id_NM: Tensor  # int64, draft ids
    on_path_N: Tensor  # int64, which of the M the target agrees with, as with all before it, or -1


def accepted_by_tree(begun: Begun, target: FrozenTarget, pack: Pack, speculation: Speculation) -> Tensor:
    """Whether the tree after row n holds the target's greedy tokens up to place k, bool [K, N]; one sample is packed.

    The sequence is one that the target generated greedily, so that its own tokens are the right ones.
    """
    draft, steps, B = begun.draft, speculation.steps, speculation.topk
    best_KN = _greedy_ids(draft, target, pack, steps)
    hidden_NH, state_NF = draft.advance(_next(begun.read_NF), begun.state_NF, begun.positions_N, begun.past)
    prob_NB, id_NB = _best(draft, hidden_NH, B)
    taken = [_Taken(prob_NB, id_NB, _find(id_NB == best_KN[0][:, None]))]
    beams = _Beams(prob_NB, id_NB, taken[0].on_path_N, [state_NF] * B, [begun.past] * B)
    after: list[_After] = []
    for k in range(1, steps):
        if after:
            beams = _next_beams(taken[-1], after)
        after = [_advance(draft, target, beams, b, begun.positions_N + k) for b in range(B)]
        taken.append(_take(beams, after, best_KN[k]))
    return _verified(taken, speculation.drafts)


class _Beams(NamedTuple):
    score_NB: Tensor
    id_NB: Tensor
    on_path_N: Tensor  # int64, the beam that the target agrees with, or -1
    states: list[Tensor]  # of each beam [N, F]
    pasts: list[Past]  # of each beam


_After = tuple[Tensor, Tensor, Tensor, Past]  # probabilities and ids of the best tokens, state, past


def _advance(draft: Draft, target: FrozenTarget, beams: _Beams, b: int, positions_N: Tensor) -> _After:
    """One step of beam ``b``, whose past the others may share."""
    state_NF, shared = beams.states[b], beams.pasts[b]
    past = Past(shared.roots, [*shared.keys], [*shared.values])
    embed_NH = target.embed(draft.target_ids_D[beams.id_NB[:, b]], state_NF.dtype)
    hidden_NH, next_NF = draft.advance(draft.read(embed_NH), state_NF, positions_N, past)
    return *_best(draft, hidden_NH, len(beams.pasts)), next_NF, past


def _take(beams: _Beams, after: list[_After], best_N: Tensor) -> _Taken:
    score_NBB = beams.score_NB[:, :, None] * torch.stack([prob_NB for prob_NB, *_ in after], 1)
    id_NBB = torch.stack([id_NB for _, id_NB, *_ in after], 1)
    is_beam_NB = torch.arange(len(after), device=best_N.device) == beams.on_path_N[:, None]
    agrees_NBB = is_beam_NB[:, :, None] & (id_NBB == best_N[:, None, None])
    return _Taken(score_NBB.flatten(1), id_NBB.flatten(1), _find(agrees_NBB.flatten(1)))


def _next_beams(taken: _Taken, after: list[_After]) -> _Beams:
    B = len(after)
    score_NB, at_NB = taken.score_NM.topk(B)
    parent_BN = (at_NB // B).T
    rows_N = torch.arange(len(at_NB), device=at_NB.device)
    states_BNF = torch.stack([state_NF for *_, state_NF, _ in after])[parent_BN, rows_N]
    pasts = [past for *_, past in after]

    def of_parents(of_beams: list[Tensor]) -> list[Tensor]:
        """[G, N, P] of each new beam."""
        return list(torch.stack(of_beams).transpose(1, 2)[parent_BN, rows_N].transpose(1, 2))

    later = range(1, len(pasts[0].keys))  # the prefix is the same for all
    keys = [of_parents([past.keys[k] for past in pasts]) for k in later]
    values = [of_parents([past.values[k] for past in pasts]) for k in later]
    pasts = [
        Past(first.roots, [*first.keys[:1], *(k[b] for k in keys)], [*first.values[:1], *(v[b] for v in values)])
        for b, first in enumerate(pasts)
    ]
    on_path_N = _find(at_NB == taken.on_path_N[:, None])
    return _Beams(score_NB, taken.id_NM.gather(1, at_NB), on_path_N, list(states_BNF), pasts)


def _verified(taken: list[_Taken], drafts: int) -> Tensor:
    """Whether the token on the target's path is among the best of all that were taken, [K, N]."""
    score_NM = torch.cat([t.score_NM for t in taken], 1)
    chosen_NM = torch.zeros_like(score_NM, dtype=torch.bool).scatter(1, score_NM.topk(drafts).indices, True)
    found, before = [], 0
    for step in taken:
        at_N = before + step.on_path_N.clamp(min=0)
        found.append(chosen_NM.gather(1, at_N[:, None])[:, 0] & (step.on_path_N != _NONE))
        before += step.score_NM.shape[1]
    return torch.stack(found)


def _greedy_ids(draft: Draft, target: FrozenTarget, pack: Pack, steps: int) -> Tensor:
    """Draft id of the target's top token that row n predicts at step k, [K, N]; -1 where there is none."""
    rows_N = torch.arange(pack.first_row_N.numel(), device=pack.first_row_N.device)
    chunks = Teacher(draft, target, pack).in_chunks(rows_N)
    best_N = torch.cat([chunk.best_C.where(chunk.known_C, _NONE) for chunk in chunks])
    padded_N = F.pad(best_N, (0, steps), value=_NONE)
    return torch.stack([padded_N[1 + k : 1 + k + len(best_N)] for k in range(steps)])


def _best(draft: Draft, hidden_NH: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Probabilities [N, B] and draft ids of the best tokens; few rows' logits at a time."""
    found = [draft.lm_head(rows_CH).float().softmax(-1).topk(B) for rows_CH in hidden_NH.split(1024)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _find(is_it_NM: Tensor) -> Tensor:
    """Which of the M it is, or -1."""
    return is_it_NM.int().argmax(1).where(is_it_NM.any(1), _NONE)


def _next(read_NF: Tensor) -> Tensor:
    return F.pad(read_NF, (0, 0, 0, 1))[1:]
