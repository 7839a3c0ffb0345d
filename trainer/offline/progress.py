"""What an offline run shows in the terminal."""

import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.evaluate import Simulated
from trainer.learner import Trained


class ProgressLine:
    """A bar with loss, tokens/s, MFU and memory; a line for each version, which is all where there is no terminal."""

    def __init__(self, planned_steps: int) -> None:
        self._console = Console()
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("step", total=planned_steps, now="")
        self._tokens, self._since_s = 0, time.monotonic()
        self._bar.start()

    def trained(self, result: Trained) -> None:
        self._tokens += result.tokens
        mfu = "" if result.mfu is None else f"  MFU {result.mfu:.0%}"
        loss = "-" if result.loss is None else f"{result.loss:.3f}"
        now = f"loss {loss}  {self._tokens_per_s():.0f} tokens/s{mfu}  {_memory()}"
        self._bar.update(self._task, completed=result.step, now=now)

    def published(self, version: int, step: int, simulated: Simulated) -> None:
        length = "-" if simulated.length is None else f"{simulated.length:.3f}"
        self._console.print(
            f"version {version} at step {step}: held-out acceptance length {length}, "
            f"{self._tokens_per_s():.0f} tokens/s"
        )

    def close(self, damaged: list[str]) -> None:
        self._bar.stop()
        for what in damaged:
            self._console.print(f"left out: {what}", style="red", highlight=False, soft_wrap=True)

    def _tokens_per_s(self) -> float:
        return self._tokens / max(1e-9, time.monotonic() - self._since_s)


def _memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return f"{pages * 4096 / 2**30:.1f} GiB"
