#!/usr/bin/env bash
# Compare two drafts on a live server of the tiny target on CPU, under load, and promote the better one. Takes two
# checkpoints, or after `make demo` none: then an early version of the demo's draft against its best one.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate
export SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null' EXIT
a=${1:-demo/run/versions/initial} b=${2:-demo/run/versions/best}

python -m sglang.launch_server --model-path examples/tiny_target --device cpu --dtype float32 --sleep-on-idle \
  --served-model-name default --max-total-tokens 16384 --max-running-requests 16 --log-level warning \
  --enable-draft-training --draft-training-trainer none --draft-training-run-dir compared/run \
  --speculative-draft-model-path "$a" &
until curl --silent --fail --output /dev/null http://127.0.0.1:30000/health_generate; do sleep 1; done

sglang-specforge traffic --requests 100000 > /dev/null &
sglang-specforge ab start --a active --b "$b" --window-s 2 --promote --wait --html compared/report.html
sglang-specforge versions
sglang-specforge events
