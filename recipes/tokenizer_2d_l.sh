#!/usr/bin/env bash
# The 2D tokenizer of Table A3's L-B group: Prologue-Large without the prologue and without the AR
# model, everything else as there.
#
# 200 epochs (1M steps at batch 256) to 1e-5. The authors published no script of it.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --out "$RUNS/tokenizer_2d_l" --data "$DATA/train" --compile \
    --size L --layout 2d --crop random --flip \
    --perceptual convnext --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
    --r1_weight 0.01 --r1_every 25 \
    --steps 1000000 --batch_size 256 --lr 1e-4 --min_lr 1e-5 --warmup 20000 --hold 100000 \
    --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 "$@"
