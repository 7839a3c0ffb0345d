#!/usr/bin/env bash
# Serve the tiny target with draft training on a CPU; run from the checkout after `make install`.
# In another terminal: .venv/bin/sglang-specforge traffic, and .venv/bin/sglang-specforge status --watch
set -euo pipefail
cd "$(dirname "$0")/.."
export SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1
exec .venv/bin/python -m sglang.launch_server --device cpu --dtype float32 --model-path examples/tiny_target \
  --served-model-name default --max-total-tokens 32768 \
  --enable-draft-training --draft-training-publish-every-s 20 --draft-training-learning-rate 2e-3 \
  --draft-training-batch-tokens 1024 --draft-training-loss-on all "$@"
