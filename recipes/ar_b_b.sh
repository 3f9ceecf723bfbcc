#!/usr/bin/env bash
# Prologue B-B: AR-B, 12 x 768, 400 epochs at batch 512, 2e-4 to 5e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_b
$LAUNCH train_ar.py --size B --tokenizer "$RUNS/prologue_b/tokenizer.safetensors" --codes "$RUNS/prologue_b/codes.npz" \
    --compile --out "$RUNS/ar_b_b" "$@"
