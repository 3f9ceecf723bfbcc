#!/usr/bin/env bash
# AR-B on Prologue-Post, 400 epochs at batch 512, 2e-4 to 5e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_post
$LAUNCH train_ar.py --size B --tokenizer "$RUNS/prologue_post/tokenizer.safetensors" --codes "$RUNS/prologue_post/codes.npz" \
    --compile --out "$RUNS/ar_post" "$@"
