#!/bin/sh
# Trains the base on one GPU, from the corpus to the model: on_gpu.sh CORPUS.parquet OUTPUT [MINUTES]
# One process does it in one sitting, so checkpoints stay in a temporary folder, and OUTPUT has the model and the log.
set -eu
corpus=$1 output=$2 minutes=${3:-7}
work=$(mktemp -d)
export PYTHONPATH="$(dirname "$0")/../.." PYTHONUNBUFFERED=1
python3 -m scripts.pretrain.tokens "$corpus" "$work/corpus.npz"
python3 -m scripts.pretrain "$work/corpus.npz" "$work/base" --minutes "$minutes" --device cuda \
  --batch-tokens 65536 --micro-batch-tokens 65536 --evaluate-every 20e6 --save-minutes 60
mkdir -p "$output"
cp -r "$work/base/model" "$work/base/log.jsonl" "$output"
