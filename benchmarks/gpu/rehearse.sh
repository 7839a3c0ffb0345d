#!/usr/bin/env bash
# The GPU kit as far as it goes without a GPU: collect the wheels, make the image's Python of packages, import what a
# GPU's server imports, and run the steps that a CPU can run. Takes a Python 3.12 and half an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3.12}"
work="${1:-$(mktemp -d)}"

"$python" -m venv "$work/image"
"$work/image/bin/python" -m pip install --quiet --requirement benchmarks/gpu/image.txt
rm -rf benchmarks/gpu/.site
"$work/image/bin/python" benchmarks/gpu/collect.py
"$work/image/bin/python" benchmarks/gpu/run.py --device cpu --only seams
PYTHONPATH="benchmarks/gpu/.site:." "$work/image/bin/python" benchmarks/gpu/as_if_cuda.py
"$work/image/bin/python" benchmarks/gpu/run.py --device cpu --out "$work/results"
cat "$work/results/results.md"
