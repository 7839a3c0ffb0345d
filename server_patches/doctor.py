"""``sglang-specforge doctor``: could a server with draft training start here, and on what?"""

import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from server_patches.targets import Imported, differences

console = Console(soft_wrap=True)


class Finding(NamedTuple):
    """``problem`` says what keeps such a server from starting; None where nothing does."""

    what: str
    found: str
    problem: str | None = None


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is here of what draft training needs; exit with 1 where a server with it could not start."""
    findings = list(examine())
    if json:
        console.print_json(data=[finding._asdict() for finding in findings])
    else:
        table = Table("", "found", "", title="draft training on this machine")
        for what, found, problem in findings:
            table.add_row(what, found, "ok" if problem is None else problem)
        console.print(table)
    raise typer.Exit(any(finding.problem for finding in findings))


def examine() -> Iterator[Finding]:
    """One finding after another; those of SGLang last, as they take seconds."""
    yield Finding("Python", platform.python_version())
    yield from _torch()
    yield from _transports()
    yield _plugin()
    yield from _seams()


def _torch() -> Iterator[Finding]:
    import torch

    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    yield Finding("torch", f"{torch.__version__}, {', '.join(sorted(names)) or 'no GPU'}")
    from server_patches.cpu import install

    if install.needs_portable_kernels():
        install.install_kernels()
        yield Finding("kernels", "portable ones, on the CPU: for development and tests")
    elif names or install.is_cpu_engine():
        version = importlib.util.find_spec("sgl_kernel") and importlib.metadata.version("sglang-kernel")
        yield Finding("kernels", version or "none", None if version else "install sglang-kernel")
    else:
        yield Finding("kernels", "none for this machine", install.HOW_TO_ASK)


def _transports() -> Iterator[Finding]:
    import zmq

    memory = hasattr(os, "memfd_create")
    yield Finding("shared memory", "anonymous" if memory else "none: states cross in ZMQ frames")
    curve = zmq.has("curve")
    yield Finding("ZMQ", f"{zmq.zmq_version()}, {'with' if curve else 'without'} CURVE (trainers on other machines)")
    pulled = importlib.util.find_spec("mooncake") is not None
    yield Finding("Mooncake", "installed" if pulled else "not installed: states cannot be pulled (PD, RDMA)")


def _plugin() -> Finding:
    """SGLang loads the plugins that SGLANG_PLUGINS names, where it names any."""
    found = [entry.name for entry in importlib.metadata.entry_points(group="sglang.srt.plugins")]
    chosen = [name.strip() for name in os.getenv("SGLANG_PLUGINS", "").split(",") if name.strip()]
    problem = None
    if "specforge" not in found:
        problem = "install sglang-specforge with pip, so that SGLang finds its entry points"
    elif chosen and "specforge" not in chosen:
        problem = f"SGLANG_PLUGINS={','.join(chosen)} leaves it out; add specforge"
    return Finding("plugin of SGLang", "specforge" if "specforge" in found else "not found", problem)


def _seams() -> Iterator[Finding]:
    from server_patches.supported import SUPPORTED, installed

    version, support = importlib.metadata.version("sglang"), installed()
    with warnings.catch_warnings(action="ignore"):  # of what SGLang misses for other machines
        problems = differences(support.TARGETS, Imported())
    held = len(support.TARGETS) - len(problems)
    found = f"{version}; {held} of {len(support.TARGETS)} seams of {support.VERSION} hold"
    yield Finding("SGLang", found, "; ".join([*problems, f"supported: {SUPPORTED}"]) if problems else None)
