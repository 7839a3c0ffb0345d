"""What the demo sees of a server while it learns: looks at it over time, and what they add up to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sglang_specforge.traffic import Tally

WINDOW_S = 30.0


@dataclass(frozen=True)
class Look:
    """Counters at one moment, all since the server's start."""

    s: float
    passes: int
    committed: int
    completion_tokens: int
    version: int
    trained: int

    @classmethod
    def at(cls, status: dict[str, Any], tally: Tally) -> "Look":
        acceptance = status["acceptance"]
        return cls(
            tally.elapsed_s, acceptance["passes"], acceptance["tokens"], tally.completion_tokens,
            status["draft"]["active_version"], status["tokens"]["trained"],
        )  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """From one look to a later one."""

    first: Look
    last: Look

    @property
    def acceptance_length(self) -> float:
        passes = self.last.passes - self.first.passes
        return (self.last.committed - self.first.committed) / passes if passes else float("nan")

    @property
    def shown_length(self) -> str:
        return "-" if self.last.passes == self.first.passes else f"{self.acceptance_length:.2f}"

    @property
    def tokens_per_s(self) -> float:
        return (self.last.completion_tokens - self.first.completion_tokens) / max(1e-9, self.last.s - self.first.s)


class Curve:
    """Looks in their order."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    @property
    def now(self) -> Stretch:
        """The last half minute."""
        return self.up_to(len(self.looks) - 1, WINDOW_S)

    @property
    def first_version(self) -> Stretch:
        """While the draft was the one that the server started with; it may have been tried before the first look."""
        first = self.looks[0]
        start = Look(0.0, 0, 0, 0, first.version, 0)
        return Stretch(start, [look for look in self.looks if look.version == first.version][-1])

    def line(self) -> str:
        look = self.looks[-1]
        return (
            f"{look.s:4.0f} s  acceptance length {self.now.shown_length}  version {look.version}  "
            f"{look.trained} tokens trained  {self.now.tokens_per_s:.0f} tokens/s"
        )

    def table(self, tally: Tally, until_s: float) -> Table:
        table = Table(show_header=False, title="traffic")
        table.add_row("time", f"{self.looks[-1].s:.0f} of {until_s:.0f} s")
        table.add_row(f"acceptance length, last {WINDOW_S:.0f} s", self.now.shown_length)
        table.add_row(f"tokens/s, last {WINDOW_S:.0f} s", f"{self.now.tokens_per_s:.0f}")
        table.add_row("requests", f"{tally.requests}, {len(tally.failures)} failed")
        return table

    def plot(self, file: Path) -> None:
        from matplotlib.figure import Figure  # here: it takes a second that no other command needs

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        points = [(self.looks[i].s, self.up_to(i, WINDOW_S / 2).acceptance_length) for i in range(1, len(self.looks))]
        axes.plot(*zip(*points, strict=True), linewidth=2)
        for before, after in zip(self.looks, self.looks[1:], strict=False):
            if after.version != before.version:
                axes.axvline(after.s, color="grey", linewidth=0.8, linestyle=":")
                axes.annotate(f"{after.version}", (after.s, 1), xycoords=("data", "axes fraction"), fontsize=7)
        axes.set(xlabel="seconds of traffic", ylabel="tokens committed per verify step", ylim=(0.9, None))
        axes.set_title(
            "Acceptance length while the server serves (dotted: a draft version goes live; gap: nothing is drafted)",
            pad=14,
        )
        figure.savefig(file, dpi=120)

    def up_to(self, index: int, window_s: float) -> Stretch:
        """The last ``window_s`` before the look at ``index``."""
        last = self.looks[index]
        return Stretch(next(look for look in self.looks if look.s >= last.s - window_s), last)
