#!/usr/bin/env bash
# Prologue-Base: 16 prologue tokens of 1,024 codes, 256 visual tokens of 16,384, LPIPS-VGG, 750k steps at batch 256.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --size B --data "$DATA/train" --compile --out "$RUNS/prologue_b" "$@"
