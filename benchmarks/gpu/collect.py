"""Collect the wheels that a GPU machine without a package index needs, on a machine with one::

    python benchmarks/gpu/collect.py [--out DIR] [--most-mib 60]

What SGLang's wheels hold for other GPUs, other models' kernels or other uses is left out of them, and what is left is
packed tighter; pip installs them as any other (``site_folder.py``).
"""

import csv
import fnmatch
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
PYTHON, ABIS = "3.12", ("cp312", "abi3", "none")
PLATFORMS = ["any"] + [
    f"manylinux{age}_x86_64" for age in (*(f"_2_{glibc}" for glibc in range(34, 4, -1)), 2014, 2010, 1)
]
LEFT_OUT = {
    "sglang_kernel": [  # of the libraries, those of Hopper that an EAGLE3 draft on a Llama calls
        "sgl_kernel/flash_ops*", "sgl_kernel/flashmla_ops*", "sgl_kernel/infllm_ops*", "sgl_kernel/sm100/*",
    ],
    "sglang": ["sglang/srt/*/_core.*.so", "sglang/multimodal_gen/*", "sglang/test/*"],
    "flashinfer_python": ["flashinfer/data/cutlass/*", "flashinfer/data/cccl/*"],  # CUDA's compiler has its own cccl
    "river": ["river/datasets/*.csv.*"],
}  # fmt: skip


def download(requirements: Path, folder: Path) -> list[Path]:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder,
        "--requirement", requirements, "--python-version", PYTHON, "--implementation", "cp",
    ]  # fmt: skip
    command += [part for abi in ABIS for part in ("--abi", abi)]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    if subprocess.run(command).returncode:  # pip has said why
        raise typer.Exit(2)
    return sorted(folder.glob("*.whl"))


def repack(wheel: Path, folder: Path) -> Path:
    """The wheel without what is left out, compressed with LZMA."""
    left_out = LEFT_OUT.get(wheel.name.partition("-")[0], [])
    packed = folder / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as new:
        names = [n for n in old.namelist() if not any(fnmatch.fnmatch(n, pattern) for pattern in left_out)]
        for name in names:
            content = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                content = _without(content.decode(), set(names)).encode()
            new.writestr(old.getinfo(name), content, zipfile.ZIP_LZMA)
    return packed


def _without(record: str, names: set[str]) -> str:
    kept = io.StringIO()
    csv.writer(kept, lineterminator="\n").writerows(row for row in csv.reader(io.StringIO(record)) if row[0] in names)
    return kept.getvalue()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the wheels.")] = HERE / "wheels",
    most_mib: Annotated[float, typer.Option(help="Exit code 1 where they are more.")] = 60.0,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for wheel in out.glob("*.whl"):
        wheel.unlink()
    with tempfile.TemporaryDirectory() as folder:
        packed = [repack(wheel, out) for wheel in download(HERE / "wheels.txt", Path(folder))]
    sizes = sorted(((wheel.stat().st_size, wheel.name) for wheel in packed), reverse=True)
    for size, name in sizes[:12]:
        print(f"{size / 2**20:6.1f} MiB  {name}")
    total_mib = sum(size for size, _ in sizes) / 2**20
    print(f"{total_mib:6.1f} MiB  in {len(sizes)} wheels, in {out}")
    raise typer.Exit(total_mib > most_mib)


if __name__ == "__main__":
    typer.run(main)
