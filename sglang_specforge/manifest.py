"""What a run folder's server has in service: ``versions/manifest.json``, from which a restarted server goes on."""

from pathlib import Path
from typing import Literal

import msgspec

from sglang_specforge.drafts import CheckpointError

Mode = Literal["auto", "propose", "off"]  # of the gate
Drafting = Literal["always", "auto", "never"]
_REMEMBERED = 16  # of those that were active, and of those that were added


class Manifest(msgspec.Struct, kw_only=True):
    """Written by the server alone; the trainer reads what it must not delete."""

    active: int = 0
    chosen: bool = False  # somebody put it into service, not the trainer
    first: str = "initial"  # folder of version 0, the draft that a server started with before there were others
    earlier: list[int] = []  # versions that were active before, the latest last
    pinned: list[int] = []  # arms of an A/B
    added: list[int] = []  # by hand, the latest last
    moved: dict[str, float] = {}  # slices ("": all) whose traffic changed, and when, in seconds of the epoch
    gate: Mode | None = None  # chosen while the server ran; None: as it was started
    drafting: Drafting | None = None  # likewise

    @property
    def in_use(self) -> set[int]:
        return {self.active, *self.earlier[-1:], *self.pinned, *self.added}

    def activated(self, version: int, *, chosen: bool = False) -> None:
        """Note that a version took the active one's place."""
        earlier = [v for v in self.earlier if v not in (version, self.active)]
        self.active, self.chosen, self.earlier = version, chosen, [*earlier, self.active][-_REMEMBERED:]

    def keep(self, version: int) -> None:
        """Note that somebody added a version: it is not the trainer's to delete."""
        self.added = [*self.added, version][-_REMEMBERED:]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Of a folder of versions; a fresh one where there is none.

        Raises:
            CheckpointError: it is not readable as one.
        """
        file = folder / "manifest.json"
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()
        except (OSError, msgspec.MsgspecError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}; mend it, or delete it to go on from the newest version"
            ) from error

    def save(self, folder: Path) -> None:
        """All at once."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "manifest.json.part"
        part.write_bytes(msgspec.json.encode(self))
        part.replace(folder / "manifest.json")
