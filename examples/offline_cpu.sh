#!/usr/bin/env bash
# The whole offline way with the tiny target on a CPU, in some minutes; run from the checkout after `make install`.
# Prompts, the target's own answers, stored states, a trained draft, and what it would have achieved.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-offline-demo} url=http://127.0.0.1:30000 bin=.venv/bin
mkdir -p "$out"

SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1 $bin/python -m sglang.launch_server --device cpu --dtype float32 \
  --model-path examples/tiny_target --max-total-tokens 32768 --log-level warning --sleep-on-idle \
  --enable-draft-training --draft-training-trainer none --draft-training-run-dir "$out/server" >"$out/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until $bin/sglang-specforge status --url $url >/dev/null 2>&1; do
  kill -0 $server || { tail "$out/server.log"; exit 1; }
  sleep 1
done

$bin/python - "$out/prompts.jsonl" <<'PYTHON'
import itertools, json, sys
from sglang_specforge.traffic import stream_prompts

with open(sys.argv[1], "w") as out:
    for prompt in itertools.islice(stream_prompts(seed=0), 100):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "to be regenerated"}]
        out.write(json.dumps({"messages": turns}) + "\n")
PYTHON
$bin/sglang-specforge prepare-data "$out/prompts.jsonl" --tokenizer examples/tiny_target --out "$out/data.parquet" \
  --regenerate $url --max-new-tokens 64 --draft-vocab-size 768
$bin/sglang-specforge capture --url $url --data "$out/data.parquet" --out "$out/states" --estimate
$bin/sglang-specforge capture --url $url --data "$out/data.parquet" --out "$out/states"
kill $server

$bin/python -m trainer --data "$out/states" --run-dir "$out/run" --epochs 12 --batch-tokens 1024 --ttt-steps 3 \
  --learning-rate 2e-3 --warmup-steps 20 --schedule cosine --draft-vocab-size 768 --publish-every-steps 50
$bin/sglang-specforge evaluate "$out/run/versions/best" --data "$out/states"
