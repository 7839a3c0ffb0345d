"""What the benchmarks share: peak memory of a call, a server that captures, and the record of a run."""

import ctypes
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_specforge.server_process import ServerProcess

TINY_TARGET = Path(__file__).parents[1] / "examples" / "tiny_target"
_M_MMAP_THRESHOLD = -3


def peak_bytes(call: Callable[[], Any]) -> int:
    """Highest resident set during a call, above the one before it."""
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
        "--model-path", target, "--dtype", "float32", "--log-level", "warning", "--sleep-on-idle",
        "--enable-draft-training", "--draft-training-trainer", "none", "--draft-training-run-dir", folder / "run",
        "--draft-training-draft-vocab-size", 768, "--draft-drafting", "always", *arguments,
    ]  # fmt: skip
    return ServerProcess.start(folder / "log", given)


def save_record(
    file: Path, command: str, ratios: dict[str, float], samples: list[dict[str, Any]], **versions: str
) -> None:
    """The JSON that every benchmark writes, all at once."""
    record = {
        "machine": {
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version(), **versions},
        "command": command,
        "ratios": ratios,
        "samples": samples,
    }
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
        part.write(json.dumps(record, indent=1) + "\n")
    Path(part.name).replace(file)


def _resident(name: str) -> int:
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith(name))
    return int(line.split()[1]) << 10
