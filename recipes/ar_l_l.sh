#!/usr/bin/env bash
# Prologue L-L: AR-L, 800 epochs at batch 2048, 62.5k steps of warmup, 4e-4 to 1e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_l
$LAUNCH train_ar.py --size L --tokenizer "$RUNS/prologue_l/tokenizer.safetensors" --codes "$RUNS/prologue_l/codes.npz" \
    --batch_size 2048 --steps 500000 --warmup 62500 --hold 0 --lr 4e-4 --min_lr 1e-5 \
    --compile --out "$RUNS/ar_l_l" "$@"
