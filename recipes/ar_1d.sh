#!/usr/bin/env bash
# AR-B on the 1D tokenizer, 400 epochs at batch 512, 2e-4 to 5e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens tokenizer_1d
$LAUNCH train_ar.py --size B --tokenizer "$RUNS/tokenizer_1d/tokenizer.safetensors" --codes "$RUNS/tokenizer_1d/codes.npz" \
    --compile --out "$RUNS/ar_1d" "$@"
