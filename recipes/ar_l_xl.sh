#!/usr/bin/env bash
# Prologue L-XL: AR-XL, weight decay 0.05, 150 epochs more than L-L; batch 2048, warmup 62.5k steps, 4e-4 to 1e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_l
$LAUNCH train_ar.py --size XL --tokenizer "$RUNS/prologue_l/tokenizer.safetensors" --codes "$RUNS/prologue_l/codes.npz" \
    --batch_size 2048 --steps 593750 --warmup 62500 --hold 0 --lr 4e-4 --min_lr 1e-5 --weight_decay 0.05 \
    --compile --out "$RUNS/ar_l_xl" "$@"
