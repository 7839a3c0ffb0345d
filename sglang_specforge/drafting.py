"""Drafting only while it pays: short trials on live traffic tell whether steps that draft make answers faster.

A draft that is rarely right costs time. What acceptance length is enough (the break-even) depends on the machine, the
model and the load, so it is measured: for a moment drafting is the other way, and tokens a second of decode passes of
about the same batch size are compared. Output does not depend on any of it.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

from sglang_specforge.manifest import Drafting
from sglang_specforge.swaps import Engine, NotAttached, Swaps

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_TURN_S, _LONGEST_TURN_S = 1.0, 6.0
_WARM_UP_S = 5.0  # of the draft's KV cache, before a trial, where it was not kept
_MIN_PASSES = 20  # of a batch size, in a turn
_CLOSE = 1.25  # a gain, or loss, that soon may be the other way
_PAYS, _PAYS_STILL = 1.02, 0.98  # gains where drafting begins, and stays: between them neither costs anything
_SOON_S, _LATER_S = 20.0, 120.0  # to the next trial
_MAY_COST = 0.01  # of the time: where a trial lost more, the next one is put off

Window = dict[str, list[float]]  # ``export.pace.Pace.status``: passes, seconds, verifications and tokens by batch size


class Depth(IntEnum):
    """What a step does with the draft."""

    ASLEEP = 0  # nothing
    WARM = 1  # nothing is proposed, but the draft's KV cache is kept whole
    ON = 2


class DraftingFixed(RuntimeError):
    """The server was not started so that drafting can be switched off."""


class Trial(NamedTuple):
    """Drafting against none, at the batch sizes that both had."""

    gain: float  # tokens a second, ratio
    length: float  # acceptance length
    break_even: float  # acceptance length that makes up for the time of drafting and of longer verifications


class Governor:
    """Decides for all ranks of one server; ``fixed``: always to draft."""

    def __init__(self, swaps: Swaps, engine: Engine, fixed: bool = False) -> None:
        self._swaps, self._engine, self._fixed = swaps, engine, fixed
        self._resting = Depth.ON if self._fixed else Depth.WARM  # between trials
        self._depth = self._resting  # that the schedulers were told last
        self._last: Trial | None = None
        self._trials = 0
        self._due_s = time.monotonic() + _WARM_UP_S
        self._version: int | None = None
        self._promised: float | None = None

    @property
    def mode(self) -> Drafting:
        return "always" if self._fixed else self._swaps.drafting

    def status(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "depth": self._depth.name.lower(),
            "trials": self._trials,
            "gain": self._last and self._last.gain,
            "break_even_length": self._last and self._last.break_even,
        }

    @property
    def is_on(self) -> bool:
        """But for trials."""
        return self.mode == "always" or (self.mode == "auto" and self._resting is Depth.ON)

    def set_mode(self, mode: Drafting, who: str, why: str = "") -> None:
        """From now on, and after restarts.

        Raises:
            DraftingFixed: the server always drafts.
        """
        if self._fixed and mode != "always":
            raise DraftingFixed("this server always drafts; start it with --draft-drafting auto, or never")
        self._swaps.set_drafting(mode, who, why)

    async def run(self, promised: Callable[[], float | None]) -> None:
        """Until cancelled. ``promised()``: the active version's acceptance length on held-out samples, if known."""
        while not self._fixed:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                self._promised = promised()
                await self._look()
            except NotAttached:  # said where the status is asked for
                continue
            except Exception:  # drafting stays as it is
                logger.exception("draft training: drafting cannot be tried")

    async def _look(self) -> None:
        if self.mode == "auto" and self._swaps.holder is None:
            await self._tell(self._resting)
            if self._is_due():
                await self._try()
        else:
            await self._tell(Depth.ASLEEP if self.mode == "never" and self._swaps.holder is None else Depth.ON)

    def _is_due(self) -> bool:
        now_s = time.monotonic()
        if self._version != (version := self._swaps.active):
            self._version = version
            if self._resting is not Depth.ON and self._promises(self._last):
                self._due_s = min(self._due_s, now_s + _WARM_UP_S)
        return now_s >= self._due_s

    def _promises(self, last: Trial | None) -> bool:
        """Whether the active version may come near the break-even, for all that is known of it."""
        return last is None or self._promised is None or self._promised * _CLOSE > last.break_even

    async def _try(self) -> None:
        """One trial, if there is traffic for it; afterwards all is as it was, or as was found to be better."""
        resting = await self._turn(self._resting)
        self._due_s = time.monotonic() + _WARM_UP_S
        if not resting:
            return
        if self._resting is Depth.ASLEEP:
            await self._tell(Depth.WARM)
            await self._pause(_WARM_UP_S)
        was_on, begun_s = self._resting is Depth.ON, time.monotonic()
        other = await self._turn(Depth.WARM if was_on else Depth.ON)
        lasted_s = time.monotonic() - begun_s
        found = compare(resting, other) if was_on else compare(other, resting)
        if found is None or self.mode != "auto" or self._swaps.holder is not None:
            return
        self._last, self._trials = found, self._trials + 1
        self._settle(found)
        clear = self._resting is Depth.ASLEEP or found.gain > _CLOSE
        lost_s = lasted_s * (1 - (1 / found.gain if was_on else found.gain))
        self._due_s = time.monotonic() + max(_LATER_S if clear else _SOON_S, lost_s / _MAY_COST)
        await self._tell(self._resting)

    def _settle(self, found: Trial) -> None:
        pays = found.gain > (_PAYS_STILL if self._resting is Depth.ON else _PAYS)
        # Requests that were served asleep are accepted less of than others will be: what is promised counts as well.
        near = found.gain > 1 / _CLOSE or (self._promised is not None and self._promises(found))
        resting = Depth.ON if pays else Depth.WARM if near else Depth.ASLEEP
        if (resting is Depth.ON) != (self._resting is Depth.ON) or self._trials == 1:
            why = (
                f"acceptance length {found.length:.2f} against a break-even of {found.break_even:.2f}: "
                f"{found.gain:.2f} times the tokens a second"
            )
            self._swaps.audit.write(
                f"drafting_{'on' if pays else 'off'}", "server", version=self._swaps.active, why=why
            )
            logger.info("draft training: drafting is %s: %s", "on" if pays else "off", why)
        self._resting = resting

    async def _turn(self, depth: Depth) -> Window:
        """What passes of this depth did within about a second; nothing where there is too little traffic."""
        await self._tell(depth)
        before, begun_s = await self._paced(depth), time.monotonic()
        while self._swaps.holder is None and time.monotonic() - begun_s < _LONGEST_TURN_S:
            await self._pause(_TURN_S)
            window = _between(before, await self._paced(depth))
            most = max((passes for passes, *_ in window.values()), default=0)
            if most >= _MIN_PASSES:
                return window
            if not most:
                break
        return {}

    async def _pause(self, seconds: float) -> None:
        """Whoever comes to hold the draft does not wait for it."""
        end_s = time.monotonic() + seconds
        while self._swaps.holder is None and (left_s := end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, _LOOK_EVERY_S))

    async def _paced(self, depth: Depth) -> Window:
        kind, total = "drafted" if depth is Depth.ON else "undrafted", {}
        for rank in await self._swaps.ranks():
            for size, counts in (rank["export"]["pace"][kind] if rank["export"] else {}).items():
                total[size] = [a + b for a, b in zip(total.get(size, [0] * len(counts)), counts, strict=True)]
        return total

    async def _tell(self, depth: Depth) -> None:
        if depth is not self._depth:
            await self._engine.set_state(draft_training_drafting=int(depth))
            self._depth = depth


def compare(on: Window, off: Window) -> Trial | None:
    """Geometric means over batch sizes, weighted by the drafted passes; None where no size has enough of both."""
    sizes = [s for s in on.keys() & off.keys() if min(on[s][0], off[s][0]) >= _MIN_PASSES]
    if not sizes:
        return None
    slower = length = 0.0
    weight = sum(on[s][0] for s in sizes)
    for size in sizes:
        passes, seconds, verifications, tokens = on[size]
        off_passes, off_seconds, *_ = off[size]
        slower += passes / weight * math.log(seconds / passes / (off_seconds / off_passes))
        length += passes / weight * math.log(tokens / verifications)
    return Trial(math.exp(length - slower), math.exp(length), math.exp(slower))


def _between(before: Window, after: Window) -> Window:
    empty = [0, 0.0, 0, 0]
    return {size: [b - a for a, b in zip(before.get(size, empty), now, strict=True)] for size, now in after.items()}
