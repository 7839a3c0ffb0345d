"""What the benchmarks share: options, peak memory of a call, a mean of ratios, servers, and the record of a run."""

import ctypes
import json
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import scipy.stats
import torch
import typer

from sglang_specforge.client import ask, writable
from sglang_specforge.new_draft import init_draft
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import Tally

ROOT = Path(__file__).parents[1]
TINY_TARGET = ROOT / "examples" / "tiny_target"
OFFLINE_DATA = ROOT / "offline-demo" / "states"  # of examples/offline_cpu.sh
DEMO_DRAFT = ROOT / "demo" / "run" / "versions" / "best"  # of ``make demo``
_M_MMAP_THRESHOLD = -3
_SERVED = ("--dtype", "float32", "--log-level", "warning", "--sleep-on-idle")

Quick = Annotated[bool, typer.Option("--quick", help="Less of it: ends within a minute and a half on two cores.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the figures.", callback=writable)]
Target = Annotated[Path, typer.Option(help="Folder of the target.")]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Highest memory during a call, above what was held before it: a GPU's where torch's default device is one,
    otherwise the resident set."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)  # large blocks go back to the system when they are freed
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def start_capturing(target: Path, folder: Path, *arguments: Any) -> ServerProcess:
    """A real server in float32 without a trainer: whoever binds its spans endpoint gets what it computes."""
    given = [
        "--model-path", target, *_SERVED,
        "--enable-draft-training", "--draft-training-trainer", "none", "--draft-training-run-dir", folder / "run",
        "--draft-training-draft-vocab-size", 768, "--draft-drafting", "always", *arguments,
    ]  # fmt: skip
    return ServerProcess.start(folder / "log", given)


def start_plain(target: Path, folder: Path, *arguments: Any) -> ServerProcess:
    """A real server in float32 without speculation and without the plugin: the peer."""
    return ServerProcess.start(folder / "plain", ["--model-path", target, *_SERVED, *arguments])


def add_random_draft(server: ServerProcess, target: Path, folder: Path, seed: int) -> int:
    """Its version."""
    dtype = server.status()["served_dtype"]
    draft = init_draft(str(target), folder / f"draft{seed}", draft_vocab_size=768, dtype=dtype, seed=seed)
    answer = ask("POST", server.url, "/draft/versions", None, json={"path": str(draft)}, timeout=120)
    return answer.json()["version"]


def must_exist(path: Path, made_by: str) -> None:
    """Of what a benchmark rests on.

    Raises:
        typer.Exit: code 2, after saying how to make it.
    """
    if not path.exists():
        typer.echo(f"error: there is no {path}; it is made by {made_by}", err=True)
        raise typer.Exit(2)


def stop_at_failures(tally: Tally) -> None:
    """A figure of a load that failed in part says nothing."""
    if tally.failures:
        raise SystemExit(f"{len(tally.failures)} requests failed, the first with {tally.failures[0]}")


def mean_ratio(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean, and its 95% confidence interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    reach = error * scipy.stats.t.ppf(0.975, len(logs) - 1)
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def save_record(file: Path, ratios: dict[str, float], samples: list[dict[str, Any]], **versions: str) -> None:
    """The JSON that every benchmark writes, all at once; of where this machine keeps it, its name alone."""
    command = " ".join(sys.argv)
    record = {
        "machine": {
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version(), **versions},
        "command": command.replace(str(file), file.name) if file.is_absolute() else command,
        "ratios": ratios,
        "samples": samples,
    }
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
        part.write(json.dumps(record, indent=1) + "\n")
    Path(part.name).replace(file)


def _resident(name: str) -> int:
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith(name))
    return int(line.split()[1]) << 10
