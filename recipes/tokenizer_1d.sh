#!/usr/bin/env bash
# The 1D tokenizer of Table 3: 256 learned queries carry the image. Base size, LPIPS-VGG, 150 epochs at batch 256.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --size B --layout 1d --data "$DATA/train" --compile --out "$RUNS/tokenizer_1d" "$@"
