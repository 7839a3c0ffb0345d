"""Windows of an A/B on one server: which version each replica shows, and what its verifications commit meanwhile."""

import time

from sglang_specforge.ab.comparison import Turn
from sglang_specforge.export.acceptance import Histogram, Standing, add_up
from sglang_specforge.swaps import SwapRefused, Swaps


class NotCounted(RuntimeError):
    """A replica does not count acceptance any more; the message says why."""


class Windows:
    """A ``turns.Stage`` whose places are the numbers of the server's replicas."""

    def __init__(self, swaps: Swaps) -> None:
        self._swaps = swaps
        self._number = 0  # never used again: counters of an earlier A/B must not add to a later one's
        self._begun_s = 0.0

    def check_there_are_any(self) -> None:
        """Raises SwapRefused: this server verifies nothing."""
        if self._swaps.only_prefills:
            raise SwapRefused("a prefill server verifies nothing that could be compared; ask its decode server")

    async def places(self) -> list[int]:
        return sorted({rank["bank"]["replica"] for rank in await self._swaps.ranks()})

    async def open(self, versions: dict[int, int]) -> None:
        """Raises SwapRefused: a version is not resident on every rank."""
        self._number += 1
        await self._swaps.show_each(versions, draft_training_window=self._number)
        self._begun_s = time.monotonic()

    async def close(self, version: int) -> None:
        """Show a version outside of any window. Raises SwapRefused."""
        await self._swaps.show(version, draft_training_window=0)

    async def look(self) -> dict[int, Turn]:
        """Raises NotCounted."""
        ranks = [rank for rank in await self._swaps.ranks() if rank["export"]]
        seconds = time.monotonic() - self._begun_s
        if failures := [rank["export"]["failure"] for rank in ranks if rank["export"].get("failure")]:
            raise NotCounted(f"acceptance is not counted any more: {failures[0]}")
        seen: dict[int, list[list[Histogram]]] = {}
        for rank in ranks:
            of_window = rank["export"]["committed_by_window"].get(str(self._number), [[] for _ in Standing])
            seen.setdefault(rank["bank"]["replica"], []).append(of_window)
        return {
            replica: Turn(
                window=self._number, seconds=seconds, committed=[add_up(pair) for pair in zip(*found, strict=True)]
            )
            for replica, found in seen.items()
        }
