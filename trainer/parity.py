"""The alignment self-test: do the served weights, run here, propose what the live worker proposed?

Where capture, transport or the draft's arithmetic were off (a layer, a position, another request's states),
training would go well and acceptance would stay near 1. This compares tokens that came over the wire.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.contracts.control import Parity
from sglang_specforge.settings import Run
from trainer.draft import Begun, Draft
from trainer.learner import load_draft
from trainer.loss import FrozenTarget, run_draft
from trainer.roots import Roots
from trainer.sample import Sample, pack

logger = logging.getLogger(__name__)

_ENOUGH, _ALIGNED = 200, 0.95


class ParityCheck:
    """Runs step 0 of the version that was active while a sample was captured, in the served dtype."""

    def __init__(
        self, run: Run, target: FrozenTarget, parity: Parity, version_path: Callable[[int], Path | None]
    ) -> None:
        self.parity, self._version_path = parity, version_path
        self._run, self._target, self._dtype = run, target, getattr(torch, run.served_dtype)
        self._device = target.embed_VH.device
        self._loaded: tuple[int, Draft] | None = None
        self._warned = False

    @torch.no_grad()
    def compare(self, sample: Sample) -> None:
        """Counts the sample's proposals; leaves out samples whose prefix or version is not known entirely.

        Where the server had a prefix cached, the draft's keys there may be those of an older version.
        """
        if sample.start != 0 or sample.restored or sample.draft_version is None or not sample.proposals:
            return
        draft = self._draft(sample.draft_version)
        if draft is None:
            return
        packed = pack([sample], self._device)
        roots = Roots.everywhere(packed.samples, self._device)
        top_T = run_draft(draft, self._target, packed, roots, _top_of_first_step)
        top_ids_T = draft.target_ids_D[top_T].tolist()
        # The proposal for position p+1 was made after reading token p beside the states of p-1.
        for position, proposed in sample.proposals:
            self.parity.compared += 1
            self.parity.agreed += top_ids_T[position - 1] == proposed
        self._warn_once()

    def _warn_once(self) -> None:
        parity = self.parity
        if not self._warned and parity.compared >= _ENOUGH and parity.agreed < _ALIGNED * parity.compared:
            self._warned = True
            logger.error(
                "draft training: the served weights propose other tokens here than in the server (%d of %d agree). "
                "What is trained will not be accepted: are capture layers, rotary settings and dtype the server's?",
                parity.agreed, parity.compared,
            )  # fmt: skip

    def _draft(self, version: int) -> Draft | None:
        if self._loaded is None or self._loaded[0] != version:
            if (path := self._version_path(version)) is None:
                return None  # it is on another machine
            try:
                # Its own config holds: that of the server's first draft may be on another machine.
                draft = load_draft(self._run.model_copy(update={"draft_path": str(path)}), path)
            except CheckpointError:
                return None  # so old that it was deleted
            self._loaded = version, draft.to(self._device, self._dtype)
        return self._loaded[1]


def _top_of_first_step(begun: Begun) -> Tensor:
    return begun.draft.lm_head(begun.unroll(1)[0]).argmax(-1)
