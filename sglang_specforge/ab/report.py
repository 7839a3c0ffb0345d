"""What an A/B has found so far: the arms, every block, and what can be said of them."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel

from sglang_specforge.ab.comparison import Block, Judgement, judge
from sglang_specforge.ab.plan import Plan
from sglang_specforge.export.acceptance import summary


class Arm(BaseModel):
    """Totals over its turns, without what is left out at their beginnings; tokens/s is a replica's."""

    version: int
    path: str
    passes: int = 0
    acceptance_length: float | None = None
    tokens_per_s: float | None = None
    out_after_blocks: int | None = None


class Report(BaseModel):
    """``GET /draft/ab/{id}``, and the file ``<run_dir>/ab/<id>.json``. Of several servers, versions are numbered as the
    first one does."""

    id: str
    state: Literal["running", "ended", "stopped", "failed", "interrupted"] = "running"
    who: str
    plan: Plan
    servers: list[str] = []  # where there are several
    incumbent: int
    arms: list[Arm]
    blocks: list[Block] = []
    judgement: Judgement
    outcome: str | None = None  # better, worse, alike, or undecided after all blocks; of the first arm's rivals
    winner: int | None = None  # a version
    promoted: bool = False
    why: str = ""
    began: datetime
    ended: datetime | None = None

    @property
    def to_promote(self) -> int | None:
        """The winner, where it is to be activated and is not active already, as it may be on one of several servers."""
        known_active = not self.servers and self.winner == self.incumbent
        return self.winner if self.plan.promote and not known_active else None

    def add(self, block: Block) -> None:
        """Judge and sum up anew, with one block more."""
        self.blocks.append(block)
        self.judgement = judge(self.blocks, len(self.arms), self.plan)
        for place, arm in enumerate(self.arms):
            turns = [block[place] for block in self.blocks if block[place]]
            counted = summary(turn.counted for turn in turns)
            arm.passes, arm.acceptance_length = counted["passes"], counted["length"]
            tokens = sum(summary(turn.committed)["tokens"] for turn in turns)
            arm.tokens_per_s = tokens / sum(turn.seconds for turn in turns)
            if place in self.judgement.out and arm.out_after_blocks is None:
                arm.out_after_blocks = len(turns)

    def conclude(self) -> None:
        """Say what has come out of it."""
        self.outcome = self.judgement.outcome or "undecided"
        if (winner := self.judgement.winner) is not None:
            self.winner = self.arms[winner].version
        self.why = self._in_words()

    def _in_words(self) -> str:
        blocks = f"after {len(self.blocks)} blocks"
        if self.winner is not None:
            return f"version {self.winner} commits most tokens a verification ({self.outcome}), {blocks}"
        if self.outcome == "alike":
            return f"no difference of {self.plan.smallest_difference:.1%} or more, {blocks}"
        return f"undecided {blocks}"
