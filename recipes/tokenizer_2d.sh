#!/usr/bin/env bash
# The 2D baseline of Tables 1, 3 and A3: no prologue, no AR in stage 1. Base size; --size L is its Large counterpart.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --size B --layout 2d --data "$DATA/train" --compile --out "$RUNS/tokenizer_2d" "$@"
