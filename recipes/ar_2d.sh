#!/usr/bin/env bash
# AR-B on the 2D baseline, 400 epochs at batch 512, 2e-4 to 5e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens tokenizer_2d
$LAUNCH train_ar.py --size B --tokenizer "$RUNS/tokenizer_2d/tokenizer.safetensors" --codes "$RUNS/tokenizer_2d/codes.npz" \
    --compile --out "$RUNS/ar_2d" "$@"
