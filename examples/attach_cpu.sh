#!/usr/bin/env bash
# Two servers of the tiny target on CPU, and one trainer of two processes that learns from both and publishes to both.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate
export SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
trap 'kill $(jobs -p) 2>/dev/null' EXIT

for port in 30000 30001; do
  python -m sglang.launch_server --model-path examples/tiny_target --device cpu --port "$port" \
    --max-total-tokens 16384 --max-running-requests 16 --sleep-on-idle --log-level warning \
    --enable-draft-training --draft-training-trainer none --draft-training-draft-vocab-size 768 \
    --draft-training-run-dir "attached/server-$port" &
done
until curl --silent --fail --output /dev/null http://127.0.0.1:30000/health_generate &&
  curl --silent --fail --output /dev/null http://127.0.0.1:30001/health_generate; do sleep 1; done

torchrun --standalone --nproc-per-node 2 -m trainer attach \
  --server http://127.0.0.1:30000 --server http://127.0.0.1:30001 --run-dir attached/trainer \
  --batch-tokens 512 --learning-rate 2e-3 --loss-on all --publish-every-s 10 &
until sglang-specforge status --json | grep -q '"state": "waiting"'; do sleep 1; done

for port in 30000 30001; do
  sglang-specforge traffic --url "http://127.0.0.1:$port" --requests 100 --max-tokens 48 --seed "$port"
  sglang-specforge status --url "http://127.0.0.1:$port"
done
