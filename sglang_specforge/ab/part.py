"""A server's part in an A/B of several servers: another process leads it, and says which version is shown when.

A leader that is not heard of for ``LEASE_S`` has left: what was active before is active again.
"""

import asyncio
import logging
import time
from functools import reduce
from operator import add

from sglang_specforge.ab.comparison import Turn
from sglang_specforge.ab.windows import Windows
from sglang_specforge.swaps import DraftHeld, Swaps

logger = logging.getLogger(__name__)

LEASE_S = 30.0


class NoPart(LookupError):
    """This server takes no part in the leader's A/B, or none any more."""


class Part:
    """One at a time, as long as it holds the draft. Every word of the leader renews its lease."""

    def __init__(self, swaps: Swaps, windows: Windows) -> None:
        self._swaps, self._windows = swaps, windows
        self._leader: str | None = None
        self._heard_s = 0.0
        self._one_word = asyncio.Lock()

    async def join(self, leader: str, versions: list[int], who: str) -> float:
        """From now on the leader decides alone which of these versions is shown, each resident on every rank; returns
        the seconds of silence after which it has left.

        Raises:
            DraftHeld: somebody else does.
            UnknownVersion, SwapRefused: a version cannot be served; or this server verifies nothing.
        """
        self._windows.check_there_are_any()
        async with self._one_word:
            if self._leader is not None:
                raise DraftHeld(f"{_holder(self._leader)} has this server's part already")
            await self._swaps.hold(_holder(leader), sorted({self._swaps.active, *versions}))
            self._leader, self._heard_s = leader, time.monotonic()
            self._swaps.audit.write("ab_joined", who, leader=leader, versions=versions)
            return LEASE_S

    async def show(self, leader: str, version: int) -> None:
        """Begin a window with this version on all replicas. Raises NoPart, SwapRefused."""
        async with self._one_word:
            self._hear(leader)
            await self._windows.open(dict.fromkeys(await self._windows.places(), version))

    async def look(self, leader: str) -> Turn:
        """What the window has seen so far, of all replicas. Raises NoPart, NotCounted."""
        async with self._one_word:
            self._hear(leader)
            return reduce(add, (await self._windows.look()).values())

    async def end(self, leader: str, who: str, why: str = "", promote: int | None = None) -> None:
        """What was active before is active again, or the version that is promoted.

        Raises:
            NoPart.
            UnknownVersion, SwapRefused: it is not promoted; the part has ended all the same.
        """
        async with self._one_word:
            self._hear(leader)
            await self._end(who, why, promote)

    async def end_if_left(self) -> None:
        """Where the leader is not heard of any more. Does not wait: its word may take long, and is one."""
        if self._one_word.locked():
            return
        async with self._one_word:
            if self._leader is not None and time.monotonic() - self._heard_s > LEASE_S:
                logger.warning("draft training: the leader of A/B %s has left", self._leader)
                await self._end("server", f"its leader was not heard of for {LEASE_S:.0f} s", None)

    async def _end(self, who: str, why: str, promote: int | None) -> None:
        leader, self._leader = self._leader, None
        promoted = None
        try:
            await self._windows.close(self._swaps.active)
            if promote is not None:
                await self._swaps.activate(self._swaps.known(promote), _holder(leader), why)
            promoted = promote
        finally:
            self._swaps.let_go()
            self._swaps.audit.write("ab_left", who, leader=leader, promoted=promoted, why=why)

    def _hear(self, leader: str) -> None:
        if leader != self._leader:
            raise NoPart(
                f"this server takes no part in an A/B of leader {leader}; one that says nothing for {LEASE_S:.0f} s "
                "has left it"
            )
        self._heard_s = time.monotonic()


def _holder(leader: str) -> str:
    return f"ab/led/{leader}"
