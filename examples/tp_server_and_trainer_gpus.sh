#!/usr/bin/env bash
# Serve a model on the first half of this machine's GPUs, and train its draft on the others, which the trainer finds idle:
# examples/tp_server_and_trainer_gpus.sh MODEL [flags of SGLang's]. GPUS=N takes the first N alone.
set -euo pipefail
cd "$(dirname "$0")/.."
half=$((${GPUS:-$(nvidia-smi --list-gpus | wc -l)} / 2))
exec .venv/bin/python -m sglang.launch_server --model-path "${1:?give a model}" --tp-size "$half" \
  --enable-draft-training --draft-training-trainer-processes "$half" "${@:2}"
