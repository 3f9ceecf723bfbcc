#!/usr/bin/env bash
# Prologue-Post: a prologue encoder of 10 x 512 for a frozen 2D tokenizer, ours or a released directory (INIT).
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --size B --layout post --init "${INIT:-$RUNS/tokenizer_2d/tokenizer.safetensors}" \
    --data "$DATA/train" --compile --out "$RUNS/prologue_post" "$@"
