"""Everything that needs a GPU, in one command, on a machine with CUDA 13, Python 3.12 and torch 2.11, and no network::

    python benchmarks/gpu/collect.py                        # before, on a machine with a package index
    python3 benchmarks/gpu/run.py [--only STEP,...] [--out DIR]

It installs the wheels beside the machine's own packages, makes its targets, and runs one step after another, each for
a limited time; what fails is listed, and the next one runs. ``DIR`` receives ``results.json``, ``results.md`` and a log
of each step. With ``--device cpu`` it rehearses: a small target, and the steps that a CPU can run.
"""

import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from site_folder import ROOT, SITE, environment, make_site

HERE = Path(__file__).parent
TARGETS = HERE / "targets"
# Hopper's own attention kernels are not among the wheels, nor what compiles graphs of prompts.
FLAGS = {
    "cuda": "--attention-backend triton --sampling-backend pytorch --cuda-graph-max-bs-decode 16 "
    "--cuda-graph-backend-prefill disabled --mem-fraction-static 0.4",
    "cpu": "",
}
TAIL_LINES = 40


@dataclass(frozen=True)
class Step:
    """A command of ours, by the arguments of Python; ``{target}`` is a folder, ``{json}`` and ``{out}`` its results."""

    command: str
    minutes: float
    target: str | None = None
    dtype: str | None = None
    cpu: bool = True


_DEMO = "-m sglang_specforge demo --model {target} --device {device} --minutes 3 --out {out}"
_TESTS = "-m pytest -q -p no:cacheprovider tests/e2e/test_capture.py tests/e2e/test_loop.py"
STEPS = {
    "seams": Step("-m server_patches check", 1),
    "lossless": Step("benchmarks/lossless.py --target {target} --json {json}", 9, "1b", "float32"),  # compiles
    "demo": Step(_DEMO, 7, "1b", "bfloat16"),
    "capture": Step("benchmarks/capture_overhead.py --quick --target {target} --json {json}", 5, "1b", "bfloat16"),
    "swap": Step("benchmarks/swap.py --minutes 1.5 --target {target} --json {json}", 6, "1b", "bfloat16"),
    "drafting": Step("benchmarks/drafting.py --target {target} --json {json}", 8, "1b", "bfloat16"),
    "transport": Step("benchmarks/transport.py --quick --json {json}", 3),
    "sampling": Step("benchmarks/chain_sampling.py --device {device} --json {json}", 2),
    "trainer": Step("benchmarks/trainer_vs_specforge.py --quick --device {device} --json {json}", 5),
    "tests": Step(_TESTS, 9, cpu=False),
    "demo_8b": Step(_DEMO, 9, "8b", "bfloat16", cpu=False),
}


def run_step(name: str, step: Step, device: str, out: Path) -> dict:
    json_file, log, own = out / f"{name}.json", out / f"{name}.log", out / name
    names = {"device": device, "json": json_file, "out": own}
    if step.target:
        names["target"] = make_target("10m" if device == "cpu" else step.target, device)
    flags = f"{FLAGS[device]} --dtype {step.dtype}" if step.dtype else FLAGS[device]
    served = {"SPECFORGE_SERVER_DEVICE": device, "SPECFORGE_SERVER_FLAGS": flags}
    words = [word.format(**names) for word in shlex.split(step.command)]
    started_s = time.monotonic()
    with log.open("wb") as file:
        command = ["timeout", "--signal=INT", "--kill-after=30", str(int(60 * step.minutes)), sys.executable, *words]
        code = subprocess.call(command, cwd=ROOT, env=environment() | served, stdout=file, stderr=subprocess.STDOUT)
    return {
        "step": name, "command": " ".join(["python", *words]), "server flags": flags, "exit code": code,
        "timed out": code in (124, 137), "seconds": round(time.monotonic() - started_s, 1),
        "figures": json.loads(json_file.read_text()) if json_file.exists() else None,
        "tail": log.read_text(errors="replace").splitlines()[-TAIL_LINES:],
    }  # fmt: skip


def make_target(size: str, device: str) -> Path:
    folder = TARGETS / size
    if not (folder / "config.json").exists():
        command = [sys.executable, HERE / "make_target.py", size, folder, "--device", device]
        subprocess.run(command, check=True, env=environment())
    return folder


def describe(device: str) -> dict:
    """The machine and its versions, as the steps see them."""
    script = (
        "import json, torch, sglang, transformers, triton; cuda = torch.cuda.is_available(); print(json.dumps({"
        "'gpu': torch.cuda.get_device_name() if cuda else None, 'cuda': torch.version.cuda, 'torch': torch.__version__,"
        "'sglang': sglang.__version__, 'transformers': transformers.__version__, 'triton': triton.__version__}))"
    )
    told = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    if told.returncode:
        print(told.stderr)
        raise typer.Exit(2)
    return {"device": device, "python": platform.python_version(), **json.loads(told.stdout.splitlines()[-1])}


def save(out: Path, machine: dict, results: list[dict]) -> None:
    (out / "results.json").write_text(json.dumps({"machine": machine, "steps": results}, indent=1) + "\n")
    lines = ["# GPU run", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| step | outcome | seconds | figures |", "| --- | --- | ---: | --- |"]
    for r in results:
        outcome = "timed out" if r["timed out"] else "passed" if r["exit code"] == 0 else f"failed ({r['exit code']})"
        ratios = (r["figures"] or {}).get("ratios", {})
        figures = "; ".join(f"{name} {value:.3f}" for name, value in ratios.items())
        lines.append(f"| {r['step']} | {outcome} | {r['seconds']:.0f} | {figures} |")
    for r in results:
        lines += ["", f"## {r['step']}", "", f"`{r['command']}`, servers with `{r['server flags']}`", ""]
        lines += ["```", *r["tail"], "```"]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def main(
    only: Annotated[str | None, typer.Option(help=f"Of {', '.join(STEPS)}.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = HERE / "results",
    device: Annotated[str, typer.Option(help="cuda, or cpu to rehearse.")] = "cuda",
) -> None:
    names = only.split(",") if only else [name for name, step in STEPS.items() if step.cpu or device == "cuda"]
    if unknown := set(names) - set(STEPS):
        raise typer.BadParameter(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if not SITE.exists():
        make_site()
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    machine, results = describe(device), []
    for name in names:
        print(f"{name} ...", flush=True)
        results.append(run_step(name, STEPS[name], device, out))
        print(f"{name}: exit code {results[-1]['exit code']}, {results[-1]['seconds']:.0f} s", flush=True)
        save(out, machine, results)
    raise typer.Exit(any(r["exit code"] for r in results))


if __name__ == "__main__":
    typer.run(main)
