#!/usr/bin/env bash
# Prologue B-L: AR-L, 24 x 1024, 400 epochs at batch 512, 2e-4 to 5e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_b
$LAUNCH train_ar.py --size L --tokenizer "$RUNS/prologue_b/tokenizer.safetensors" --codes "$RUNS/prologue_b/codes.npz" \
    --compile --out "$RUNS/ar_b_l" "$@"
