"""Changing the served draft: which versions the banks hold, which one is active, and who may change that.

One change at a time. A change has two phases: every rank of every replica says that it has the version, and only then
all are told to activate it; each rank group does so in one scheduler iteration. Every change is an event of the audit
log, and the manifest says what a restarted server serves.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sglang_specforge.audit import AuditLog
from sglang_specforge.checkpoint import FINGERPRINT_KEY, CheckpointError, load_config
from sglang_specforge.foreign_draft import import_draft
from sglang_specforge.manifest import Drafting, Manifest, Mode
from sglang_specforge.settings import Run
from sglang_specforge.target import TargetError
from sglang_specforge.uploads import Uploads
from sglang_specforge.versions import VersionFolder

logger = logging.getLogger(__name__)

_POLL_S = 0.2  # each look costs the scheduler a copy of its configuration
_LOAD_LIMIT_S = 120.0
TRAINER = "trainer"  # who it is that changes something


class Engine(Protocol):
    """What is asked of the serving engine; both reach every scheduler."""

    async def set_state(self, **values: int) -> bool:
        """Hand numbers to all ranks of a group in one scheduler iteration; False where a group declined."""

    async def get_states(self) -> list[dict[str, Any]]: ...


class NotAttached(RuntimeError):
    """The schedulers do not run the plugin."""


class SwapRefused(RuntimeError):
    """A version cannot be activated; the active one stays."""


class UnknownVersion(LookupError):
    """The run folder has no such version."""


class DraftHeld(RuntimeError):
    """Somebody else decides at present which version is active; the message says who, and how to end it."""


class Overtaken(RuntimeError):
    """A change was allowed by what is not so any more; the active version stays."""


class Change(NamedTuple):
    """The active version before and after; the same where there was nothing to change."""

    before: int
    version: int


class Swaps:
    """Of one server."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self.only_prefills = run.disaggregation == "prefill"
        self.versions, self.audit = VersionFolder(run.run_dir), AuditLog(run.run_dir)
        self.uploads = Uploads(run.run_dir)
        self.holder: str | None = None  # whoever decides alone which version is active
        self.is_free = asyncio.Event()  # nobody holds the draft
        self.is_free.set()
        self.failed: dict[int, str] = {}  # versions that no rank refused; the banks keep their own
        self._run, self._engine = run, engine
        self._manifest = Manifest.load(self.versions.root)
        self._used: list[int] = []  # versions in the order of their last use
        self._changing = asyncio.Lock()
        if self._manifest.active != run.draft_version:
            self._manifest.activated(run.draft_version)
        if run.draft_version:
            self._number_the_first()
        else:
            self._manifest.first = Path(run.draft_path).name
        self._manifest.earlier = [v for v in self._manifest.earlier if v in self.known_versions()]
        self._manifest.pinned, self._manifest.moved = [], {}
        self._note()

    @property
    def gate(self) -> Mode:
        return self._manifest.gate or self._run.settings.gate

    @property
    def drafting(self) -> Drafting:
        return self._manifest.drafting or self._run.settings.drafting

    @property
    def active(self) -> int:
        """In service but for an A/B, whose windows do not count."""
        return self._manifest.active

    @property
    def is_chosen(self) -> bool:
        """Somebody put the active version into service, not the trainer."""
        return self._manifest.chosen

    @property
    def earlier(self) -> list[int]:
        """What was active before, the latest last."""
        return self._manifest.earlier

    def set_gate(self, mode: Mode, who: str, why: str = "") -> None:
        """What becomes of versions that the trainer publishes, from now on and after restarts."""
        if mode != self.gate:
            self.audit.write("gate", who, before=self.gate, mode=mode, why=why)
        self._manifest.gate = mode
        self._note()

    def set_drafting(self, mode: Drafting, who: str, why: str = "") -> None:
        """Whether steps draft, from now on and after restarts."""
        if mode != self.drafting:
            self.audit.write("drafting_mode", who, before=self.drafting, mode=mode, why=why)
        self._manifest.drafting = mode
        self._note()

    def set_moved(self, moved: dict[str, float]) -> None:
        """Slices ("": all) whose traffic has changed, and when, in seconds of the epoch: the trainer reads it."""
        self._manifest.moved = moved
        self._note()

    async def add(self, checkpoint: Path, who: str) -> int:
        """Make a checkpoint a version of the run folder; returns its number. Trainers' come and go, others are kept.

        Raises:
            CheckpointError: it cannot be read or copied, or is another trainer's and does not fit the target.
        """
        if number := self.versions.number(checkpoint):
            return self.known(number)
        before = self.versions.newest() or 0
        version = await asyncio.to_thread(self._adopt, checkpoint)
        if version > before:
            self.audit.write("added", who, version=version, path=checkpoint)
            if who != TRAINER:
                self._manifest.keep(version)
                self._note()
        return version

    def _adopt(self, checkpoint: Path) -> int:
        imported = self.uploads.new()
        try:
            ours = self._in_our_layout(checkpoint, imported)
            return self.versions.adopt(ours, self._run.settings.keep_versions)
        finally:
            for copied in (checkpoint, imported):
                self.uploads.forget(copied)

    def _in_our_layout(self, checkpoint: Path, imported: Path) -> Path:
        """The checkpoint itself, or what ``import_draft`` makes of one that says no target, as other trainers' do."""
        if FINGERPRINT_KEY in load_config(checkpoint):
            return checkpoint
        try:
            return import_draft(checkpoint, Path(self._run.target_path), imported)
        except (OSError, TargetError) as error:
            raise CheckpointError(f"draft checkpoint {checkpoint} cannot be taken in: {error}") from error

    def known(self, version: int) -> int:
        """The version itself, where there is one. Raises UnknownVersion."""
        if version not in (there := self.known_versions()):
            raise UnknownVersion(f"there is no draft version {version}; there are {', '.join(map(str, there))}")
        return version

    def known_versions(self) -> list[int]:
        """Oldest first; 0 is a draft that this server started with and that the trainer did not make."""
        return [*([] if self._run.draft_version else [0]), *self.versions.published()]

    def path(self, version: int) -> Path:
        return self._run.version_path(version)

    async def load(self, version: int) -> None:
        """Have a version resident on every rank.

        Raises:
            UnknownVersion, SwapRefused.
        """
        async with self._changing:
            await self._load(self.known(version))

    async def activate(
        self,
        version: int,
        who: str,
        why: str = "",
        *,
        event: str = "activated",
        if_still: Callable[[], bool] = lambda: True,
    ) -> Change:
        """Make a version active on all ranks, or on none; nothing happens where it is.

        ``if_still`` is asked last: somebody may roll back, swap, or set the gate, while this waits and loads.

        Raises:
            DraftHeld, UnknownVersion, SwapRefused, Overtaken: the active version stays.
        """
        async with self._changing:
            self._check_held(who)
            ranks = await self.ranks()
            before = ranks[0]["bank"]["active_version"]
            if before == version == self.active:
                return Change(before, version)
            resident = all(self.known(version) in rank["bank"]["resident_versions"] for rank in ranks)
            if not resident or len(ranks) > 1:
                await self._load(version)
            if not if_still():
                raise Overtaken(f"version {self.active} is in service, and the gate at {self.gate!r}")
            await self.show(version)
            if version != self.active:
                self._manifest.activated(version, chosen=who != TRAINER)
            self._note()
            step = (await self.ranks())[0]["bank"]["active_since_step"]
            self.audit.write(event, who, **Change(before, version)._asdict(), step=step, why=why)
            return Change(before, version)

    async def roll_back(self, who: str, why: str = "", to: int | None = None) -> Change:
        """Activate what was active before, or ``to``; what the trainer publishes waits from then on.

        Raises:
            DraftHeld, UnknownVersion, SwapRefused: the active version stays.
        """
        self._check_held(who)
        if to is None and not self.earlier:
            raise SwapRefused(f"version {self.active} is the first that is active; there is none to go back to")
        change = await self.activate(self.earlier[-1] if to is None else to, who, why, event="rolled_back")
        self.set_gate("propose", who, "after a rollback")
        return change

    async def show(self, version: int, **more: int) -> None:
        """Put a version that is resident on every rank into service, without a note of it. Raises SwapRefused."""
        await self._show({"draft_training_activate": version}, more)

    async def show_each(self, versions: dict[int, int], **more: int) -> None:
        """The same with a version for each replica, each at a step of its own. Raises SwapRefused."""
        await self._show({f"draft_training_activate_{replica}": one for replica, one in versions.items()}, more)

    async def hold(self, holder: str, versions: list[int]) -> None:
        """From now on ``holder`` decides alone, with these versions resident.

        Raises:
            DraftHeld, UnknownVersion, SwapRefused: nobody holds the draft.
        """
        async with self._changing:
            self._check_held(holder)
            try:
                self._manifest.pinned = [self.known(version) for version in versions]
                for version in self._manifest.pinned:
                    await self._load(version)
                self.holder = holder
                self.is_free.clear()
            finally:
                if self.holder != holder:
                    self._manifest.pinned = []
                self._note()

    def let_go(self) -> None:
        self.holder, self._manifest.pinned = None, []
        self.is_free.set()
        self._note()

    async def ranks(self) -> list[dict[str, Any]]:
        """``bank`` and ``export`` of each replica's first rank. Raises NotAttached."""
        states = await self._engine.get_states()
        if not all("draft_training" in state for state in states):
            raise NotAttached("a scheduler runs without draft training: its plugin did not load; see the server's log")
        return [state["draft_training"] for state in states]

    def _number_the_first(self) -> None:
        """To a server that starts with a later version, 0 is no draft any more: what it was, is given a number."""
        if 0 not in self._manifest.earlier:
            return
        first = self.versions.root / self._manifest.first
        try:
            number = self.versions.adopt(first, self._run.settings.keep_versions)
        except CheckpointError as error:
            logger.error("draft training: version 0 cannot be gone back to: %s", error)
            return
        self._manifest.earlier = [number if version == 0 else version for version in self._manifest.earlier]
        self._manifest.keep(number)
        self.audit.write("added", "server", version=number, path=first)

    async def _show(self, orders: dict[str, int], more: dict[str, int]) -> None:
        shown = sorted(set(orders.values()))
        if not await self._engine.set_state(**orders, **more):
            raise SwapRefused(f"version {' or '.join(map(str, shown))} is not resident on every rank any more")
        self._used = [v for v in self._used if v not in shown] + shown

    def _note(self) -> None:
        """A disk that takes no note does not stop a change: only a restarted server would not know of it."""
        try:
            self._manifest.save(self.versions.root)
        except OSError as error:
            logger.error("draft training: what is active cannot be noted in %s: %s", self.versions.root, error)

    def _check_held(self, who: str) -> None:
        if self.holder not in (None, who):
            raise DraftHeld(f"{self.holder} decides which draft is active; end it with DELETE /draft/{self.holder}")

    async def _load(self, version: int) -> None:
        """Raises SwapRefused, and then no rank has the version."""
        try:
            await asyncio.wait_for(self._load_on_every_rank(version), _LOAD_LIMIT_S)
        except TimeoutError as error:
            self.failed[version] = f"not loaded on every rank within {_LOAD_LIMIT_S:.0f} s"
            await self._refused(version, self.failed[version], error)

    async def _load_on_every_rank(self, version: int) -> None:
        banks = [rank["bank"] for rank in await self.ranks()]
        if not all(version in bank["resident_versions"] for bank in banks):
            full = self._to_evict({v for bank in banks for v in bank["resident_versions"]} - {version})
            for old in full:
                await self._engine.set_state(draft_training_evict=old)
        await self._engine.set_state(draft_training_load=version)
        while True:
            resident = all(version in bank["resident_versions"] for bank in banks)
            # One rank answers for its group; where another is still loading, or refused, the group declines.
            if resident and await self._engine.set_state(draft_training_prepare=version):
                return
            await asyncio.sleep(_POLL_S)
            banks = [rank["bank"] for rank in await self.ranks()]
            for bank in banks:
                if reason := bank["refused"].get(str(version)):
                    await self._refused(version, reason)

    async def _refused(self, version: int, reason: str, cause: Exception | None = None) -> None:
        await self._engine.set_state(draft_training_evict=version)
        self.audit.write("refused", "server", version=version, why=reason)
        raise SwapRefused(reason) from cause

    def _to_evict(self, resident: set[int]) -> list[int]:
        """Versions whose place a new one takes: the longest unused; the active one, arms, and if possible the one to
        roll back to, stay. Raises SwapRefused where all are needed."""
        slots = self._run.settings.bank_slots
        kept = {self.active, *self._manifest.pinned}
        rank = {version: place for place, version in enumerate(self._used)}
        going = sorted(resident - kept, key=lambda v: (v in self.earlier[-1:], rank.get(v, -1), v))
        surplus = len(resident) + 1 - slots
        if surplus > len(going):
            raise SwapRefused(
                f"the {slots} slots of the draft bank hold versions {', '.join(map(str, sorted(resident)))}, all of "
                "them in use; start the server with more --draft-bank-slots, or end the A/B"
            )
        return going[: max(0, surplus)]
