#!/usr/bin/env bash
# Prologue-Large: decoder 24 x 1024, 4,096 visual codes, ConvNeXt-S as perceptual loss, 1M steps at batch 256.
# Table A2: --codebook_size 16384, or --perceptual vgg.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --size L --data "$DATA/train" --compile --out "$RUNS/prologue_l" "$@"
