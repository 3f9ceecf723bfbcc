#!/usr/bin/env bash
# Prologue-OneStage: the full AR-B with labels in the place of the joint AR; it leaves ar.safetensors, there is no stage 2.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --size B --onestage --ar_size B --data "$DATA/train" --compile --out "$RUNS/prologue_onestage" "$@"
