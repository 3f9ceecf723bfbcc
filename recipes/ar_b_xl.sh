#!/usr/bin/env bash
# Prologue B-XL: AR-XL, 32 x 1280, 400 epochs at batch 512, 2e-4 to 5e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_b
$LAUNCH train_ar.py --size XL --tokenizer "$RUNS/prologue_b/tokenizer.safetensors" --codes "$RUNS/prologue_b/codes.npz" \
    --compile --out "$RUNS/ar_b_xl" "$@"
