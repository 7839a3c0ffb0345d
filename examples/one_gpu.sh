#!/usr/bin/env bash
# Serve a model and train its draft on the same GPU: examples/one_gpu.sh MODEL [flags of SGLang's].
# SGLang leaves two fifths of the memory to the trainer: weights, gradients and optimizer of the draft, the target's head
# and embedding, and a step's activations. In another terminal: .venv/bin/sglang-specforge status --watch
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python -m sglang.launch_server --model-path "${1:?give a model}" --mem-fraction-static 0.6 \
  --enable-draft-training --draft-training-trainer-device cuda:0 "${@:2}"
